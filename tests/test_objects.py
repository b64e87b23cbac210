"""What becomes of the sprites in a continuation."""

from types import SimpleNamespace

import numpy as np
from ml_collections import ConfigDict

from jaxvid.data import sprites
from jaxvid.data.transforms import normalize
from jaxvid.evaluators import sprites as evaluator


def test_objects_are_kept_lost_or_added(monkeypatch):
    ids = [0, 1, 2]
    scenes = [sprites.scene(i, "validation") for i in ids]
    video = np.stack([sprites.render(scene, 16, 32) for scene in scenes])
    colours = {sprite.colour for sprite in scenes[2].description.sprites}
    other = next(
        scene
        for scene in (sprites.scene(i, "validation") for i in range(99))
        if not colours & {sprite.colour for sprite in scene.description.sprites}
    )
    guess = video.copy()
    guess[1] = 128  # all is lost
    guess[2, 4:] = sprites.render(other, 16, 32)[4:]
    monkeypatch.setattr(evaluator, "samples", lambda run, batch, rng: normalize(guess))
    batch = {"video": video, "id": np.array(ids)}
    held_out = SimpleNamespace(batches=lambda limit: [(None, batch, [0, 1, 2])])
    run = SimpleNamespace(task=SimpleNamespace(given=4), config=ConfigDict({"data": {}}))
    found = evaluator.continuations(run, held_out, 1)
    assert found["objects_real"].tolist() == [1, 1, 1]
    assert found["objects"].tolist() == [1, 0, 0]
    expected = len(other.description.sprites)
    assert found["objects_added"].tolist() == [0, 0, expected]
    assert found["objects_added_copy_last"].tolist() == [0, 0, 0]

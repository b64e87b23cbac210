"""Samples and continuations of a run on sprites, read by the oracle of the data."""

import numpy as np
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data.sprite_oracle import describe, steady_sprites
from jaxvid.data.sprites import kind, scene
from jaxvid.data.transforms import to_uint8
from jaxvid.evaluators.held_out import HeldOut, open_held_out, samples
from jaxvid.tasks.base import Run

CLIPS = 64


def steady(run: Run) -> dict:
    """Shares of clips whose sprites keep colour and shape, of samples and of the data itself.

    {"clips", "samples", "data"}: of that many samples without given frames, and of that many
    held-out clips, which a perfect model would reach. See `sprite_oracle.steady_sprites`.
    """
    config = ConfigDict(run.config.to_dict())
    config.sample.num = CLIPS
    with open_held_out(run._replace(config=config)) as clips:
        sampled = clips.sample(run.params, run.frozen)
    source = data.make_source(config.data, "validation")
    real = (source.read(index)["video"] for index in range(CLIPS))
    shares = {
        name: float(np.mean([bool(steady_sprites(clip)) for clip in videos]))
        for name, videos in (("samples", sampled), ("data", real))
    }
    return {"clips": CLIPS, **shares}


def continuations(run: Run, held_out: HeldOut, batches: int) -> dict[str, np.ndarray]:
    """{metric: values [clips]} of continuations by a run on sprites, read by `describe`.

    objects: share of the clip's sprites that are there, with their colour, size and shape.
    objects_added: sprites of other colours. The same of repeating the last given frame
    (`*_copy_last`) and of the real clip (`*_real`), which shows the errors of the reader.
    """
    given, rows = run.task.given, []
    for rng, batch, new in held_out.batches(batches):
        real = np.asarray(batch["video"])
        later = real[:, given:]
        guesses = {
            "": to_uint8(np.asarray(samples(run, batch, rng)))[:, given:],
            "_copy_last": np.repeat(real[:, given - 1 : given], later.shape[1], axis=1),
            "_real": later,
        }
        for row in new:
            clip = int(batch["id"][row])
            truth = scene(clip, "validation", **kind(run.config.data)).description.sprites
            rows.append(
                {
                    name + suffix: value
                    for suffix, clips in guesses.items()
                    for name, value in _compare(truth, clips[row]).items()
                }
            )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def kept(run: Run, video_BTHWC: np.ndarray) -> dict[str, float]:
    """Shares of windows of the first held-out clips, real or continued by a run on sprites.

    steady: of those that show one to three sprites which keep colour and shape. same: of those that
    show so just the sprites of the clip, none of them changed, gone or new.
    """
    options = kind(run.config.data)
    found = [set(steady_sprites(video_THWC)) for video_THWC in video_BTHWC]
    truth = [
        {(sprite.colour, sprite.shape) for sprite in view.description.sprites}
        for view in (scene(index, "validation", **options) for index in range(len(found)))
    ]
    same = [seen == drawn for seen, drawn in zip(found, truth)]
    return {"steady": float(np.mean([bool(seen) for seen in found])), "same": float(np.mean(same))}


def _compare(truth, video_THWC):
    """The figures of one clip; sprites of a clip have different colours."""
    found = {sprite.colour: sprite for sprite in describe(video_THWC).sprites}
    same = [
        sprite.colour in found
        and (found[sprite.colour].size, found[sprite.colour].shape) == (sprite.size, sprite.shape)
        for sprite in truth
    ]
    added = found.keys() - {sprite.colour for sprite in truth}
    return {"objects": np.mean(same), "objects_added": float(len(added))}

"""What becomes of the objects in a continuation, for data whose objects can be read from pixels."""

import numpy as np

from jaxvid.data import sprites
from jaxvid.data.transforms import to_uint8
from jaxvid.evaluators.held_out import HeldOut, samples
from jaxvid.tasks.base import Run

DATA = "sprites"  # the source whose objects can be read


def scores(run: Run, held_out: HeldOut, batches: int) -> dict[str, np.ndarray]:
    """{metric: values [clips]} of continuations by a run on sprites, read by `sprites.describe`.

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
            truth = sprites.scene(clip, "validation").description.sprites
            rows.append(
                {
                    name + suffix: value
                    for suffix, clips in guesses.items()
                    for name, value in _compare(truth, clips[row]).items()
                }
            )
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


def _compare(truth, video_THWC):
    """The figures of one clip; sprites of a clip have different colours."""
    found = {sprite.colour: sprite for sprite in sprites.describe(video_THWC).sprites}
    same = [
        sprite.colour in found
        and (found[sprite.colour].size, found[sprite.colour].shape) == (sprite.size, sprite.shape)
        for sprite in truth
    ]
    added = found.keys() - {sprite.colour for sprite in truth}
    return {"objects": np.mean(same), "objects_added": float(len(added))}

"""Sprites that leave the picture and return with the same colour and shape.

One sprite stands in the middle, goes out to the right, is away for a gap, and comes back the same
way. All sprites have the same size, place and path, so colour and shape are all that there is to
remember. While it is away the picture is the ground and a clock. Neither depends on the sprite: the
grey and the texture of the ground are drawn independently of it and never change, and the clock is
white or black by that grey. The clock is a bar along the lower edge. It fills the edge until
CLOCK frames are left, then it shrinks with every frame, and the sprite follows its last one. So
every frame of a long gap is like one of a short gap.
"""

import dataclasses
from types import MappingProxyType

import numpy as np

from jaxvid import checks
from jaxvid.data import recall, source, sprite_oracle, sprites

RADIUS = float(np.mean(sprites.SIZES["large"]))  # of the disc of equal area
MIDDLE = np.array([0.5, 0.5])
STEP = np.array([0.3, 0.0])  # way per frame
RAMP = 2  # frames in which a sprite is on its way and some of it shows
STANDING = (1, 3)  # frames in which it stands before it goes
READ = 3  # frames that the oracle reads, in which it stands again
CLOCK = 4  # frames before the return in which the clock shrinks
THICKNESS = 1 / 12  # of the clock


@dataclasses.dataclass(frozen=True)
class Visitor(sprites.Sprite):
    """A sprite that goes out from `start` by `velocity` and comes back; see `centre`."""

    lead: int  # frames before the gap
    gap: int  # frames in which nothing of it shows

    def centre(self, time_T):
        """Centre [T, 2] at times in frames. It turns round in the middle of the gap."""
        since = time_T - (self.lead - RAMP - 1)
        until = self.lead + self.gap + RAMP - time_T
        steps_T = np.maximum(np.minimum(since, until), 0.0)
        return self.start + steps_T[:, None] * self.velocity


def paint_clock(video_THWC: np.ndarray, view: sprites.Scene) -> None:
    """Draw the clock into the frames of the gap, in place."""
    [sprite], (T, size) = view.sprites, video_THWC.shape[:2]
    ink, pixel = 255.0 * (view.grey < 0.5), np.arange(size)
    rows_H = np.clip(pixel + 1 - size * (1 - THICKNESS), 0, 1)
    for t in range(sprite.lead, min(sprite.lead + sprite.gap, T)):
        left = sprite.lead + sprite.gap - t
        columns_W = np.clip(size * min(left / CLOCK, 1.0) - pixel, 0, 1)
        cover_HW1 = (rows_H[:, None] * columns_W)[..., None]
        frame_HWC = video_THWC[t] + cover_HW1 * (ink - video_THWC[t])
        video_THWC[t] = np.rint(frame_HWC)


class Source(recall.Recall):
    """Clips of a sprite that leaves and returns. config: also difficulty, as of sprites."""

    leads = (STANDING[0] + RAMP, STANDING[1] + RAMP)
    answer = RAMP + READ
    smallest = 24
    chance = MappingProxyType(
        {
            "colour": 1 / len(sprites.COLOURS),
            "shape": 1 / len(sprites.SHAPES),
            "both": 1 / sprites.NUM_CLASSES,
        }
    )

    def __init__(self, config, split):
        super().__init__(config, split)
        checks.between("difficulty", config.difficulty, 0, 1)
        self._difficulty = float(config.difficulty)

    def name(self, index):
        return f"sprites-recall-{self._split}-{index}"

    def scene(self, index) -> sprites.Scene:
        """The scene of clip `index`: one Visitor."""
        rng = np.random.default_rng((source.SPLITS.index(self._split), index))
        colour = list(sprites.COLOURS)[rng.integers(len(sprites.COLOURS))]
        shape = sprites.SHAPES[rng.integers(len(sprites.SHAPES))]
        grey, waves = float(rng.uniform(0.05, 0.95)), sprites.draw_waves(rng)
        attributes = sprites.Attributes("large", colour, shape, "right")
        sprite = Visitor(attributes, RADIUS, MIDDLE, STEP, 0.0, 0.0, *self.draw(rng))
        return sprites.Scene((sprite,), (0,), grey, waves)

    def back(self, index):
        [sprite] = self.scene(index).sprites
        return sprite.lead + sprite.gap

    def scores(self, index, video_THWC):
        """{"colour", "shape", "both"}: 1.0 if the returned sprite has the right one, else 0.0."""
        [sprite] = self.scene(index).sprites
        colour, shape = sprite_oracle.lone_sprite(video_THWC[RAMP:])
        is_right = colour == sprite.attributes.colour, shape == sprite.attributes.shape
        return dict(zip(self.chance, map(float, (*is_right, all(is_right)))))

    def render(self, index):
        view, window = self.scene(index), self._window
        video_THWC = sprites.render(view, window.frames, window.size, difficulty=self._difficulty)
        paint_clock(video_THWC, view)
        return video_THWC

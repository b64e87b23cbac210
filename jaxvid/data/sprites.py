"""Sprites: a generated video set that needs no download, with exact captions.

One to three coloured shapes move over a ground, turn, bounce off the walls and pass behind each
other. A clip is a pure function of (split, index), defined in the unit square: `size` is only the
resolution of its rendering, and a longer clip continues a shorter one. `sprite_oracle` reads them
back from pixels alone, so samples can be scored without a network.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

from jaxvid import checks
from jaxvid.data import source, transforms
from jaxvid.errors import UserError

# Saturated hues 60 degrees apart: `sprite_oracle` separates them from any near-grey ground by hue.
COLOURS = {
    "red": (0.90, 0.15, 0.15),
    "yellow": (0.90, 0.90, 0.15),
    "green": (0.15, 0.85, 0.15),
    "cyan": (0.15, 0.90, 0.90),
    "blue": (0.20, 0.20, 0.95),
    "magenta": (0.90, 0.15, 0.90),
}
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Range of the radius of the disc of equal area, in units of the picture's side length.
SIZES = {"large": (0.165, 0.180), "": (0.125, 0.135), "small": (0.090, 0.100)}
NUM_CLASSES = len(SHAPES) * len(COLOURS)
FREE_RUN = 6.0  # frames before the first bounce of a sprite


class Attributes(NamedTuple):
    """The words for one sprite in a caption; `direction` is that of its start, "" if it stays."""

    size: str
    colour: str
    shape: str
    direction: str

    def __str__(self):
        noun = " ".join(word for word in (self.size, self.colour, self.shape) if word)
        return f"a {noun} moves {self.direction}" if self.direction else f"a {noun} stays"


class Description(NamedTuple):
    """The sprites in order of size, largest first, and their caption."""

    caption: str
    sprites: tuple[Attributes, ...]


def caption(sprites) -> str:
    """Attributes, in order -> "a red square moves left, a small blue circle moves up"."""
    return ", ".join(str(sprite) for sprite in sprites)


def label(sprite: Attributes) -> int:
    """Class in [0, NUM_CLASSES) of a sprite: its shape and its colour."""
    return SHAPES.index(sprite.shape) * len(COLOURS) + list(COLOURS).index(sprite.colour)


@dataclasses.dataclass(frozen=True)
class Sprite:
    """One moving shape; lengths in units of the picture's side, x to the right and y down."""

    attributes: Attributes
    radius: float  # of the disc of equal area
    start: np.ndarray  # [2]
    velocity: np.ndarray  # [2], per frame
    angle: float
    spin: float  # radians per frame

    @property
    def reach(self):
        """Radius of the circumscribed circle, which bounces off the walls."""
        return REACH[self.attributes.shape] * self.radius

    def centre(self, time_T):
        """Centre [T, 2] at times in frames: a triangle wave between the walls."""
        span = 1.0 - 2.0 * self.reach
        phase_T2 = (self.start - self.reach + time_T[:, None] * self.velocity) / span
        return self.reach + span * np.abs(phase_T2 - 2.0 * np.round(phase_T2 / 2.0))


@dataclasses.dataclass(frozen=True)
class Scene:
    """Sprites in order of size, the order of painting, and the random numbers of the ground."""

    sprites: tuple[Sprite, ...]
    painting: tuple[int, ...]
    grey: float
    waves: np.ndarray  # [G, 6]: frequencies x y (cycles per picture), phase, amplitudes r g b

    @property
    def description(self):
        sprites = tuple(sprite.attributes for sprite in self.sprites)
        return Description(caption(sprites), sprites)


def scene(
    index: int, split: str = "train", most: int = 3, sizes: int = 3, turning: bool = True
) -> Scene:
    """The scene of clip `index` of a split: one to `most` sprites of the first `sizes` SIZES.

    No two have the same size. If `turning`, half of them turn; else all stand upright. Each split
    has a random stream of its own.
    """
    rng = np.random.default_rng((source.SPLITS.index(split), index))
    count = int(rng.integers(1, most + 1))
    names = [list(SIZES)[i] for i in sorted(rng.permutation(sizes)[:count])]
    colours = rng.permutation(len(COLOURS))[:count]
    shapes = rng.integers(0, len(SHAPES), count)
    sprites = tuple(
        _sprite(rng, size, list(COLOURS)[colour], SHAPES[shape], turning)
        for size, colour, shape in zip(names, colours, shapes)
    )
    painting = tuple(int(i) for i in rng.permutation(count))
    return Scene(sprites, painting, float(rng.uniform(0.05, 0.95)), draw_waves(rng))


def kind(config) -> dict:
    """The options of `scene` in a data section; runs of earlier versions have none of them."""
    return {
        "most": config.get("max_sprites", 3),
        "sizes": config.get("sizes", 3),
        "turning": config.get("turning", True),
    }


def _sprite(rng, size, colour, shape, turning):
    direction = list(DIRECTIONS)[rng.integers(len(DIRECTIONS))]
    radius = rng.uniform(*SIZES[size])
    reach = REACH[shape] * radius
    span = 1.0 - 2.0 * reach
    speed = rng.uniform(0.03, 0.06)
    tilt = rng.uniform(-0.2, 0.2)
    heading = np.array(DIRECTIONS[direction])
    velocity = speed * (np.cos(tilt) * heading + np.sin(tilt) * heading[::-1])
    # Along its direction there is room for the free run; across, any position.
    run = min(FREE_RUN * speed, span)
    along = rng.uniform(0.0, span - run)
    across = rng.uniform(0.0, span)
    start = np.where(heading < 0, reach + run + along, reach + along)
    start = np.where(heading == 0, reach + across, start)
    turns = rng.random() < 0.5 and turning
    angle = rng.uniform(0.0, 2 * np.pi) if turns else 0.0
    spin = rng.choice((-1.0, 1.0)) * rng.uniform(0.05, 0.15) if turns else 0.0
    attributes = Attributes(size, colour, shape, direction)
    return Sprite(attributes, radius, start, velocity, angle, spin)


def draw_waves(rng):
    """Four nearly grey gratings: only sprites have much chroma."""
    count = 4
    frequency = rng.uniform(-6.0, 6.0, (count, 2))
    phase = rng.uniform(0.0, 2 * np.pi, (count, 1))
    amplitude = rng.uniform(0.03, 0.09, (count, 1)) + rng.uniform(-0.012, 0.012, (count, 3))
    return np.concatenate([frequency, phase, amplitude], axis=1)


# Half side, inradius and arm of the shapes whose area is that of the unit disc.
_SQUARE = np.sqrt(np.pi) / 2
_TRIANGLE = np.sqrt(np.pi / np.sqrt(27))
_ARM = 0.28  # half width of the cross's arms in units of their length
_CROSS = np.sqrt(np.pi / (8 * _ARM - 4 * _ARM**2))
REACH = {
    "circle": 1.0,
    "square": _SQUARE * np.sqrt(2),
    "triangle": 2 * _TRIANGLE,
    "cross": _CROSS * np.hypot(1, _ARM),
}


def _distance(shape, x, y, radius):
    """Signed distance to the edge of the shape, negative inside (inexact near outer corners)."""
    if shape == "circle":
        return np.sqrt(x * x + y * y) - radius
    if shape == "triangle":
        sides = np.maximum(np.abs(x) * np.float32(np.sqrt(3) / 2) - y * np.float32(0.5), y)
        return sides - np.float32(_TRIANGLE * radius)
    x, y = np.abs(x), np.abs(y)
    if shape == "square":
        return np.maximum(x, y) - np.float32(_SQUARE * radius)
    arm, width = np.float32(_CROSS * radius), np.float32(_CROSS * _ARM * radius)
    return np.maximum(np.maximum(x, y) - arm, np.minimum(x, y) - width)


def _coverage(sprite, time_T, size):
    """Fraction [T, H, W] of each pixel covered by the sprite, from distances at pixel centres."""
    centre_T2 = sprite.centre(time_T)
    pixel = (np.arange(size) + 0.5) / size
    x_TW = (pixel - centre_T2[:, :1]).astype(np.float32)
    y_TH = (pixel - centre_T2[:, 1:]).astype(np.float32)
    angle_T = sprite.angle + sprite.spin * time_T
    cos_T1 = np.cos(angle_T).astype(np.float32)[:, None]
    sin_T1 = np.sin(angle_T).astype(np.float32)[:, None]
    x_THW = (cos_T1 * x_TW)[:, None, :] + (sin_T1 * y_TH)[:, :, None]
    y_THW = (cos_T1 * y_TH)[:, :, None] - (sin_T1 * x_TW)[:, None, :]
    distance_THW = _distance(sprite.attributes.shape, x_THW, y_THW, np.float32(sprite.radius))
    return np.clip(np.float32(0.5) - np.float32(size) * distance_THW, 0.0, 1.0)


def _ground(view, size, difficulty):
    """Ground [H, W, 3] in [0, 1]: one grey plus `difficulty` times the gratings."""
    pixel = (np.arange(size) + 0.5) / size
    ground_HWC = np.full((size, size, 3), view.grey, np.float32)
    if difficulty > 0:
        for fx, fy, phase, *amplitude in view.waves:
            wave_HW = np.sin(2 * np.pi * (fx * pixel[None, :] + fy * pixel[:, None]) + phase)
            ground_HWC += np.float32(difficulty) * wave_HW[..., None] * np.float32(amplitude)
    return np.clip(ground_HWC, 0.0, 1.0)


def render(
    view: Scene, frames: int, size: int, *, stride: int = 1, difficulty: float = 0.0
) -> np.ndarray:
    """Scene -> video uint8 [T, H, W, 3]; `stride` is the time between frames."""
    time_T = np.arange(frames, dtype=np.float64) * stride
    video_CTHW = np.empty((3, frames, size, size), np.float32)
    video_CTHW[:] = 255.0 * _ground(view, size, difficulty).transpose(2, 0, 1)[:, None]
    for position in view.painting:
        sprite = view.sprites[position]
        cover_THW = _coverage(sprite, time_T, size)
        for channel_THW, colour in zip(video_CTHW, COLOURS[sprite.attributes.colour]):
            channel_THW += cover_THW * (np.float32(255.0 * colour) - channel_THW)
    video_THWC = np.empty((frames, size, size, 3), np.uint8)
    video_THWC[...] = np.rint(video_CTHW, out=video_CTHW).transpose(1, 2, 3, 0)
    return video_THWC


class Source(source.Source):
    """Sprite clips of one split."""

    num_classes = NUM_CLASSES
    captions = True

    def __init__(self, config, split):
        if config.flip:
            raise UserError(
                "flip=True: captions would be wrong for mirrored sprites; use flip=False"
            )
        checks.between("difficulty", config.difficulty, 0, 1)
        self._split = split
        self._window = transforms.Window.of(config)
        self._difficulty = float(config.difficulty)
        self._kind = kind(config)
        checks.between("sizes", self._kind["sizes"], 1, len(SIZES))
        remedy = f"each has a size of its own; use 1 to sizes={self._kind['sizes']}"
        is_possible = 1 <= self._kind["most"] <= self._kind["sizes"]
        checks.require(is_possible, "max_sprites", self._kind["most"], remedy)
        self._count = config.num_clips if split == "train" else source.VALIDATION_CLIPS

    def __len__(self):
        return self._count

    def name(self, index):
        return f"sprites-{self._split}-{index}"

    def read(self, index, rng=None):
        """Clip `index`, always the same: the rng is not used."""
        del rng
        view, window = scene(index, self._split, **self._kind), self._window
        video_THWC = render(
            view, window.frames, window.size, stride=window.stride, difficulty=self._difficulty
        )
        description = view.description
        return {
            "video": video_THWC,
            "label": label(description.sprites[0]),
            "caption": description.caption,
            "attributes": description.sprites,
        }

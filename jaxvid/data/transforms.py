"""Transforms of a clip between its source and the batch: window, crop, flip, resize and range."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from jaxvid import checks

MAX_FRAMES = 2**20  # in a file, and so in a clip or a stride
MAX_SIZE = 2**13  # pixels


@dataclasses.dataclass(frozen=True)
class Window:
    """A clip of `frames` frames, `stride` source frames apart, `size` pixels square."""

    frames: int
    size: int
    stride: int = 1
    random_crop: bool = False
    flip: bool = False

    @classmethod
    def of(cls, config) -> "Window":
        """The window of config.data; raises UserError for values outside their bounds."""
        for field, most in (("frames", MAX_FRAMES), ("size", MAX_SIZE), ("stride", MAX_FRAMES)):
            checks.at_least(field, config[field], 1, at_most=most)
        checks.choose("crop", config.crop, ("random", "center"))
        return cls(config.frames, config.size, config.stride, config.crop == "random", config.flip)

    @property
    def span(self) -> int:
        """Number of consecutive source frames that the window covers."""
        return (self.frames - 1) * self.stride + 1

    def start(self, available: int, rng: np.random.Generator | None) -> int:
        """The first source frame: uniform with an rng, centred without."""
        last = available - self.span
        return last // 2 if rng is None else int(rng.integers(last + 1))

    def choose(self, pieces: Sequence[Sequence[int]], rng: np.random.Generator | None):
        """The frames of a window within one of the pieces, which hold the frames in order.

        Uniform over all windows with an rng. Without one: the middle of the longest piece.
        """
        if rng is None:
            pieces = [max(pieces, key=len)]
        fitting = [piece for piece in pieces if len(piece) >= self.span]
        start = self.start(
            sum(len(piece) - self.span + 1 for piece in fitting) + self.span - 1, rng
        )
        for piece in fitting:
            windows = len(piece) - self.span + 1
            if start < windows:
                return piece[start : start + self.span : self.stride]
            start -= windows

    def augment(self, video_THWC, rng: np.random.Generator | None):
        """Crop to a square of `size` and, with `flip`, mirror half of the clips.

        Without an rng: the central square, not mirrored.
        """
        H, W = video_THWC.shape[1:3]
        top, left = H - self.size, W - self.size
        if self.random_crop and rng is not None:
            top, left = int(rng.integers(top + 1)), int(rng.integers(left + 1))
        else:
            top, left = top // 2, left // 2
        video_THWC = video_THWC[:, top : top + self.size, left : left + self.size]
        if self.flip and rng is not None and rng.random() < 0.5:
            return mirror(video_THWC)
        return np.ascontiguousarray(video_THWC)


def mirror(video_THWC):
    """Left to right. The copy by channel is five times as fast as numpy's copy of the whole."""
    mirrored_THWC = np.empty_like(video_THWC, order="C")
    for channel in range(video_THWC.shape[-1]):
        mirrored_THWC[..., channel] = video_THWC[:, :, ::-1, channel]
    return mirrored_THWC


def cover(height: int, width: int, size: int) -> tuple[int, int]:
    """(height, width) of a picture after scaling its shorter side to `size`."""
    short = min(height, width)
    return max(size, round(height * size / short)), max(size, round(width * size / short))


def normalize(video):
    """uint8 in [0, 255] -> float32 in [-1, 1]; numpy or jax arrays of any shape."""
    return video.astype(np.float32) * np.float32(1 / 127.5) - np.float32(1.0)


def to_uint8(video):
    """Float in [-1, 1] -> uint8, rounded and clipped; the inverse of `normalize`."""
    scaled = video.astype(np.float32) * np.float32(127.5) + np.float32(127.5)
    return scaled.round().clip(0, 255).astype(np.uint8)

"""Frame schedules: which frame is denoised in which iteration, as static tables for `lax.scan`.

All schedules follow one rule. Frame i waits for start_i iterations and then takes its N steps in a
row. After iteration k = 1..I its step index is clip(k - start_i, 0, N), where 0 is pure noise and N
is finished. Synchronous sampling, AR-Diffusion's AD(s) (Sun et al. 2025), Diffusion Forcing's
pyramid (Chen et al. 2024) and SkyReels-V2's causal blocks (Chen et al. 2025) choose start_i.
"""

import dataclasses
import functools
import math

import numpy as np

from jaxvid import checks

NAMES = ("synchronous", "ad", "autoregressive", "pyramid", "block_causal")


@dataclasses.dataclass(frozen=True)
class FrameSchedule:
    """Every frame takes `sample_steps` steps; frame i starts after int(i // block * s) iterations.

    At most `window` frames are noisy at once. Hashable, so a schedule can be static under jit. Only
    the tables take memory: [I, F] of frames times iterations, [I] and [F] of one of them. Sampling
    with a cache makes none of them.
    """

    frames: int
    sample_steps: int
    s: float
    block: int
    window: int

    def start(self, frame: int) -> int:
        """Iterations before the first step of a frame, which may lie beyond the last one."""
        return int(frame // self.block * self.s)

    @functools.cached_property
    def start_F(self) -> np.ndarray:
        """`start` of every frame, int64 [F]."""
        return np.array([self.start(frame) for frame in range(self.frames)])

    @property
    def iterations(self) -> int:
        return self.sample_steps + self.start(self.frames - 1)

    @property
    def evaluations(self) -> int:
        """Frame evaluations by a network with a cache: one per step, and one commit per frame."""
        return self.frames * self.sample_steps + self.frames

    @property
    def in_flight(self) -> int:
        """The most frames that are noisy at once.

        These are the frames that start before the first is finished: int((i + m) s) - int(i s) is
        at least int(m s), so no later iteration has more.
        """
        blocks = int(self.sample_steps / self.s)
        while int(blocks * self.s) < self.sample_steps:
            blocks += 1
        return min(blocks * self.block, self.frames)

    @functools.cached_property
    def index_IF(self) -> np.ndarray:
        """Step index of every frame after each iteration, int32 [I, F]."""
        return np.clip(self._age_IF, 0, self.sample_steps).astype(np.int32)

    @functools.cached_property
    def update_IF(self) -> np.ndarray:
        """Whether an iteration takes a step of a frame, bool [I, F]."""
        return (self._age_IF >= 1) & (self._age_IF <= self.sample_steps)

    @functools.cached_property
    def active_I2(self) -> np.ndarray:
        """Each iteration steps the frames first .. stop - 1: (first, stop), int32 [I, 2]."""
        k_I = np.arange(1, self.iterations + 1)
        first_I = np.searchsorted(self.start_F, k_I - self.sample_steps)
        stop_I = np.searchsorted(self.start_F, k_I)
        return np.stack([first_I, stop_I], axis=1).astype(np.int32)

    @functools.cached_property
    def finished_I(self) -> np.ndarray:
        """Number of finished frames after each iteration, int32 [I]."""
        k_I = np.arange(1, self.iterations + 1)
        return np.searchsorted(self.start_F, k_I - self.sample_steps, side="right").astype(np.int32)

    @functools.cached_property
    def window_stop_I(self) -> np.ndarray:
        """End of AR-Diffusion's moved window, int32 [I]: it follows the last started frame.

        An iteration reads the frames window_stop_I - window .. window_stop_I - 1.
        """
        return np.clip(self.active_I2[:, 1], self.window, self.frames)

    @property
    def _age_IF(self):
        return np.arange(1, self.iterations + 1)[:, None] - self.start_F


def ad(frames: int, sample_steps: int, s: int, window: int | None = None) -> FrameSchedule:
    """AR-Diffusion's AD(s): each frame starts `s` iterations after the frame before it.

    s = 0 is synchronous, s = sample_steps finishes one frame after another. Raises UserError unless
    s is whole and 0 <= s <= sample_steps, and if more than `window` frames would be noisy at once.
    """
    return block_causal(frames, sample_steps, block=1, s=s, window=window)


def synchronous(frames: int, sample_steps: int, window: int | None = None) -> FrameSchedule:
    """All frames together: full-sequence diffusion. Raises UserError if they exceed `window`."""
    _check_sizes(frames, sample_steps, window)
    if window is not None:
        smallest = math.ceil(sample_steps / window)
        remedy = f"{_noisy(frames, window)}; use schedule='ad' with s >= {smallest}"
        checks.require(frames <= window, "schedule", "synchronous", remedy)
    return ad(frames, sample_steps, 0, window)


def autoregressive(frames: int, sample_steps: int, window: int | None = None) -> FrameSchedule:
    """Each frame starts when the frame before it is finished."""
    return ad(frames, sample_steps, sample_steps, window)


def block_causal(
    frames: int, sample_steps: int, block: int, s: int | None = None, window: int | None = None
) -> FrameSchedule:
    """AD(s) by blocks: `block` frames share their steps; the last block may be shorter.

    s=None starts a block when the block before it is finished. Raises UserError as `ad` does.
    """
    _check_sizes(frames, sample_steps, window)
    checks.at_least("block", block, 1)
    s = sample_steps if s is None else s
    _check_difference(s, sample_steps)
    checks.require(s == int(s), "s", s, "must be a whole number; use schedule='pyramid'")
    window = min(window or frames, frames)
    remedy = f"longer than window={window}; use block <= {window}"
    checks.require(min(block, frames) <= window, "block", block, remedy)
    smallest = math.ceil(sample_steps / max(window // block, 1))
    return _windowed(frames, sample_steps, int(s), block, window, smallest)


def pyramid(frames: int, sample_steps: int, u: float, window: int | None = None) -> FrameSchedule:
    """Diffusion Forcing's pyramid: frame i starts after int(i u) iterations, u a float.

    Raises UserError unless 0 <= u <= sample_steps, and if more than `window` frames would be noisy
    at once. Messages call u by its name in `make_frame_schedule`, s.
    """
    _check_sizes(frames, sample_steps, window)
    _check_difference(u, sample_steps)
    window = min(window or frames, frames)
    smallest = math.ceil(1000 * sample_steps / window) / 1000
    return _windowed(frames, sample_steps, u, 1, window, smallest)


def make_frame_schedule(
    name: str,
    frames: int,
    sample_steps: int,
    *,
    s: float | None = None,
    window: int | None = None,
    block: int = 1,
) -> FrameSchedule:
    """The FrameSchedule called `name`, one of NAMES.

    `s` is the s of ad and block_causal and the u of pyramid; `block` belongs to block_causal.
    Raises UserError for an unknown name (the field `schedule`), a missing s, and whatever the
    schedule itself refuses.
    """
    checks.choose("schedule", name, NAMES)
    if name == "synchronous":
        return synchronous(frames, sample_steps, window)
    if name == "autoregressive":
        return autoregressive(frames, sample_steps, window)
    if name == "block_causal":
        return block_causal(frames, sample_steps, block, s, window)
    remedy = f"schedule={name!r} needs a number; use 0 to {sample_steps}"
    checks.require(s is not None, "s", s, remedy)
    return (ad if name == "ad" else pyramid)(frames, sample_steps, s, window)


def _windowed(frames, sample_steps, s, block, window, smallest):
    """The schedule; UserError naming `smallest` if more than `window` frames are noisy at once."""
    if s == 0 or block >= frames:  # all frames together, in one block
        schedule = FrameSchedule(frames, sample_steps, sample_steps, frames, window)
    else:
        schedule = FrameSchedule(frames, sample_steps, s, block, window)
    noisy = schedule.in_flight
    remedy = f"use s >= {smallest:g} (sample_steps={sample_steps})"
    checks.require(noisy <= window, "s", s, f"{_noisy(noisy, window)}; {remedy}")
    return schedule


def _noisy(frames, window):
    return f"{frames} frames would be noisy at once but window={window}"


def _check_sizes(frames, sample_steps, window):
    checks.at_least("frames", frames, 1)
    checks.at_least("sample_steps", sample_steps, 1)
    if window is not None:
        checks.at_least("window", window, 1)


def _check_difference(s, sample_steps):
    remedy = f"use 0 (all frames together) to {sample_steps}, the steps (one frame after another)"
    written = int(s) if math.isfinite(s) and s == int(s) else s  # as the user writes it
    checks.require(0 <= s <= sample_steps, "s", written, remedy)

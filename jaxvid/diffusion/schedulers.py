"""Frame schedules: which frame is denoised when, as static tables for one `lax.scan`.

All schedules are one rule. Frame i waits for start_i iterations, then takes its N steps in a row:
after iteration k = 1..K its step index is clip(k - start_i, 0, N), where 0 is untouched noise and N
is finished. Synchronous sampling, AR-Diffusion's AD(s) (Sun et al. 2025), Diffusion Forcing's
pyramid (Chen et al. 2024) and SkyReels-V2's causal blocks (Chen et al. 2025) choose start_i.
"""

import dataclasses
import functools
import math

import numpy as np

from jaxvid.errors import UserError


@dataclasses.dataclass(frozen=True)
class FrameSchedule:
    """`sample_steps` steps for every frame, frame i after `start_F[i]` iterations (non-decreasing).

    At most `window` frames are ever noisy at once. Hashable, so that it can be static under jit.
    """

    start_F: tuple[int, ...]
    sample_steps: int
    window: int

    @property
    def frames(self):
        return len(self.start_F)

    @property
    def iterations(self):
        return self.sample_steps + self.start_F[-1]

    @property
    def evaluations(self):
        """Frame evaluations by a network with a cache: each step once, and one commit per frame."""
        return self.frames * self.sample_steps + self.frames

    @functools.cached_property
    def index(self):
        """Step index of every frame after each iteration, int32 [K, F]."""
        return np.clip(self._age_KF, 0, self.sample_steps).astype(np.int32)

    @functools.cached_property
    def update(self):
        """Whether iteration k takes a step of frame i, bool [K, F]."""
        return (self._age_KF >= 1) & (self._age_KF <= self.sample_steps)

    @functools.cached_property
    def active_K2(self):
        """Frames first .. stop - 1 take a step in each iteration, int32 [K, 2]."""
        first_K = np.sum(self._age_KF > self.sample_steps, axis=1)
        stop_K = np.sum(self._age_KF >= 1, axis=1)
        return np.stack([first_K, stop_K], axis=1).astype(np.int32)

    @functools.cached_property
    def window_stop_K(self):
        """End of the moved window in each iteration, int32 [K]: as far as frames have started.

        Iteration k sees frames window_stop_K[k] - window .. window_stop_K[k] - 1 (AR-Diffusion).
        """
        return np.clip(self.active_K2[:, 1], self.window, self.frames)

    @property
    def _age_KF(self):
        return np.arange(1, self.iterations + 1)[:, None] - np.array(self.start_F)


def ad(frames, sample_steps, s, window=None):
    """AR-Diffusion's adaptive difference: each frame starts `s` iterations after the one before.

    s = 0 is synchronous, s = sample_steps one frame after another. Raises UserError unless s is
    whole and 0 <= s <= sample_steps, and if more than `window` frames would be noisy at once.
    """
    return block_causal(frames, sample_steps, block=1, s=s, window=window)


def synchronous(frames, sample_steps, window=None):
    """All frames together: full-sequence diffusion. Raises UserError if they exceed `window`."""
    _check_sizes(frames, sample_steps, window)
    if frames > (window or frames):
        raise UserError(
            f"schedule='synchronous': {frames} frames would be noisy at once but window={window}; "
            f"use schedule='ad' with s >= {math.ceil(sample_steps / window)}"
        )
    return ad(frames, sample_steps, 0, window)


def autoregressive(frames, sample_steps, window=None):
    """Each frame starts when the one before has finished."""
    return ad(frames, sample_steps, sample_steps, window)


def block_causal(frames, sample_steps, block, s=None, window=None):
    """AD(s) by blocks of `block` frames that share a step; the last block may be shorter.

    s=None starts a block when the one before has finished. Raises UserError as `ad` does.
    """
    _check_sizes(frames, sample_steps, window)
    if block < 1:
        raise UserError(f"block={block}: a block holds at least 1 frame; use block >= 1")
    s = sample_steps if s is None else s
    if s != int(s):
        raise UserError(f"s={s}: iterations between frames are whole; use schedule='pyramid'")
    _check_difference(s, sample_steps)
    window = min(window or frames, frames)
    if min(block, frames) > window:
        raise UserError(f"block={block}: longer than window={window}; use block <= {window}")
    start_F = tuple(i // block * int(s) for i in range(frames))
    smallest = math.ceil(sample_steps / max(window // block, 1))
    return _windowed(start_F, sample_steps, window, s, smallest)


def pyramid(frames, sample_steps, u, window=None):
    """Diffusion Forcing's pyramid: frame i starts after int(i u) iterations, u a float.

    Raises UserError unless 0 <= u <= sample_steps, and if more than `window` frames would be noisy
    at once; messages call u by its name in the config, s.
    """
    _check_sizes(frames, sample_steps, window)
    _check_difference(u, sample_steps)
    window = min(window or frames, frames)
    start_F = tuple(int(i * u) for i in range(frames))
    smallest = math.ceil(1000 * sample_steps / window) / 1000
    return _windowed(start_F, sample_steps, window, u, smallest)


def make(name, frames, sample_steps, *, s=None, window=None, block=1):
    """The FrameSchedule called `name`: synchronous, ad, autoregressive, pyramid or block_causal.

    `s` is the difference of ad and block_causal and the u of pyramid; `block` is block_causal's.
    Raises UserError for an unknown name, a missing s and whatever the schedule itself refuses.
    """
    if name in ("ad", "pyramid") and s is None:
        raise UserError(f"s=None: schedule={name!r} needs it; use s=0..{sample_steps}")
    if name == "synchronous":
        return synchronous(frames, sample_steps, window)
    if name == "ad":
        return ad(frames, sample_steps, s, window)
    if name == "autoregressive":
        return autoregressive(frames, sample_steps, window)
    if name == "pyramid":
        return pyramid(frames, sample_steps, s, window)
    if name == "block_causal":
        return block_causal(frames, sample_steps, block, s, window)
    names = "synchronous, ad, autoregressive, pyramid, block_causal"
    raise UserError(f"schedule={name!r}: unknown frame schedule; use one of {names}")


def _windowed(start_F, sample_steps, window, s, smallest):
    """The schedule if at most `window` frames are ever noisy; `smallest` is the s that would do."""
    schedule = FrameSchedule(start_F, sample_steps, window)
    first_K, stop_K = schedule.active_K2.T
    noisy = int(np.max(stop_K - first_K))
    if noisy > window:
        raise UserError(
            f"s={s}: {noisy} frames would be noisy at once but window={window}; "
            f"use s >= {smallest:g} (sample_steps={sample_steps})"
        )
    return schedule


def _check_sizes(frames, sample_steps, window):
    for field, value in (("frames", frames), ("sample_steps", sample_steps), ("window", window)):
        if value is not None and value < 1:
            raise UserError(f"{field}={value}: must be positive; use {field} >= 1")


def _check_difference(s, sample_steps):
    if not 0 <= s <= sample_steps:
        raise UserError(
            f"s={s}: outside 0 (all frames together) .. sample_steps (one after another); "
            f"use 0 <= s <= {sample_steps}"
        )

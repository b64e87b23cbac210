"""Sampling of causal video as functions of the network alone.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`, as in `diffusion.samplers`.
Whoever owns one (a task) makes `predict` of its weights, condition and guidance, and a state that
has read the condition.
"""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import to_uint8
from jaxvid.diffusion import samplers
from jaxvid.diffusion.frame_schedules import FrameSchedule
from jaxvid.tasks.base import Run

SECONDS = 10  # between lines of progress


def sample_clip(
    predict: Callable,
    state,
    given_BPNC: jax.Array,
    rng,
    *,
    solver: samplers.Solver,
    schedule: FrameSchedule,
    memory: str,
    window: int,
) -> jax.Array:
    """A clip that begins with clean `given_BPNC` -> clean latents [B, P + schedule.frames, N, C].

    memory: "cache" reads finished frames from the state, "none" evaluates all frames in every
    iteration, "window" those inside a moved window of `window` frames.
    """
    x_BFNC = initial_noise(rng, given_BPNC, schedule.frames, solver=solver)
    if memory == "cache":
        x_BFNC, _ = samplers.sample_cached(
            predict,
            x_BFNC,
            samplers.commit(predict, given_BPNC, state),
            rng,
            solver=solver,
            schedule=schedule,
            given=given_BPNC.shape[1],
        )
    else:
        x_BFNC = samplers.sample_uncached(
            predict,
            x_BFNC,
            state,
            rng,
            solver=solver,
            schedule=schedule,
            given_BPNC=given_BPNC,
            window=window if memory == "window" else None,
        )
    return jnp.concatenate([given_BPNC, x_BFNC], axis=1)


def initial_noise(rng, given_BPNC: jax.Array, frames: int, *, solver) -> jax.Array:
    """x_BTNC of the frames that follow the given ones; a function of `rng` and a frame's index."""
    B, P, N, C = given_BPNC.shape
    return noise_of(rng, P, (B, frames, N, C), solver=solver)


def noise_of(rng, first, shape_BTNC: tuple[int, ...], *, solver) -> jax.Array:
    """The noise x_BTNC of frames first, first + 1, .."""
    frame_T = first + jnp.arange(shape_BTNC[1])
    return samplers.frame_noise(
        rng, frame_T, jnp.full_like(frame_T, solver.noise.num_steps), shape_BTNC
    )


def advance(predict: Callable, x_BWNC, state, piece: samplers.Piece, given, rng, *, solver, plan):
    """`samplers.advance` in a stream of which `given` frames precede the first sampled one."""
    B, _, N, C = x_BWNC.shape

    def noise(frame, count):
        return noise_of(rng, given + frame, (B, count, N, C), solver=solver)

    options = dict(solver=solver, plan=plan, given=given)
    return samplers.advance(predict, x_BWNC, state, piece, rng, noise, **options)


class Carry(NamedTuple):
    """All that a stream needs to go on: the frames in flight, the state, and where it stands."""

    x_BWNC: jax.Array
    state: Any
    position: samplers.Position


class Stream(Iterator):
    """Yields clean latents [B, t, N, C] as soon as their frames are finished.

    step: (x_BWNC, state, piece) -> (x_BWNC, state, finished), a compiled `advance`. One program
    serves a stream of any length, and memory and the time of a piece do not grow. `carry` is what
    another Stream with the same step and schedule goes on from, after the frames yielded so far.
    frames: how many frames to sample in all. first: given latents to yield before them, or None.
    """

    def __init__(self, step: Callable, carry: Carry, schedule: FrameSchedule, frames: int, first):
        self.carry, self._step, self._frames, self._first = carry, step, frames, first
        self._plan = samplers.stream_plan(schedule)
        position = samplers.Position(*map(int, carry.position))
        self._pieces = samplers.pieces(schedule, self._plan, position=position, endless=True)

    @property
    def is_whole(self) -> bool:
        """Whether all finished frames were yielded, so another stream can go on from `carry`."""
        return self.carry.position[1] <= self._frames

    def __next__(self) -> jax.Array:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while (done := int(self.carry.position[1])) < self._frames:
            piece, position = next(self._pieces)
            *carry, finished = self._step(self.carry.x_BWNC, self.carry.state, piece)
            self.carry = Carry(*carry, position)
            if position.finished > done:
                return finished[:, : min(position.finished, self._frames) - done]
        raise StopIteration


class Decoded(Iterator):
    """Iterates over (uint8 video of the next frames, seconds for latents, seconds for decoding).

    A video of `frames` frames by a run whose task is a `Generator`, under the conditions `cond` of
    `Task.sample`. Of all frames so far it holds the states of stream and decoder alone.
    """

    def __init__(self, run: Run, cond: dict, frames: int, rng: jax.Array):
        self._run, self._decoding = run, None
        options = dict(frozen=run.frozen, frames=frames)
        self._open = lambda carry: run.task.stream(run.params, rng, cond, carry=carry, **options)
        self._latents = self._open(None)

    def state(self):
        """What the stream and its decoding go on from, a tree of arrays; None if they cannot."""
        return (self._latents.carry, self._decoding) if self._latents.is_whole else None

    def restore(self, state):
        """Go on from a state."""
        carry, self._decoding = state
        self._latents = self._open(carry)

    def __next__(self) -> tuple[np.ndarray, float, float]:
        begin = time.perf_counter()
        z_BTNC = jax.block_until_ready(next(self._latents))
        ready = time.perf_counter()
        clip, self._decoding = self._run.task.decode(self._run.frozen, z_BTNC, self._decoding)
        clip = to_uint8(np.asarray(clip))
        return clip, ready - begin, time.perf_counter() - ready


def shown(pieces: Decoded, frames: int, done: int = 0) -> Iterator[tuple]:
    """The pieces of a video of `frames` frames, `done` of them before, with lines of progress."""
    last = time.perf_counter()
    for piece in pieces:
        yield piece
        done += piece[0].shape[1]
        if time.perf_counter() - last > SECONDS:
            last = time.perf_counter()
            print(f"{done} of {frames} frames", file=sys.stderr)

"""Sampling of causal video as functions of the network alone.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`, as in `diffusion.samplers`.
Whoever owns one (a task) makes `predict` of its weights, condition and guidance, and a state that
has read the condition.
"""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.data.transforms import to_uint8
from jaxvid.diffusion import guidance, samplers
from jaxvid.diffusion.frame_schedules import FrameSchedule
from jaxvid.mixers import skip
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


class Kept(NamedTuple):
    """Finished latents of a stream of which a state can be made anew; see `read_again`.

    first_BSNC: the frames 0 .. S - 1, zeros where they are not finished. last_BRNC: the last R
    frames, the newest in the last place. total: int32, finished frames, given ones included.
    """

    first_BSNC: jax.Array
    last_BRNC: jax.Array
    total: Any


def keep_nothing(first: int, last: int, shape_BNC: tuple[int, ...]) -> Kept:
    """The Kept of a stream before its first frame, with S = first and R = last."""
    B, N, C = shape_BNC
    return Kept(jnp.zeros((B, first, N, C)), jnp.zeros((B, last, N, C)), jnp.int32(0))


@jax.jit
def keep(kept: Kept, new_BTNC: jax.Array, count) -> Kept:
    """The Kept after the first `count` of the frames new_BTNC."""
    first_BSNC, last_BRNC, total = kept
    S, R, count = first_BSNC.shape[1], last_BRNC.shape[1], jnp.int32(count)
    new_T = jnp.arange(new_BTNC.shape[1])
    place_T = jnp.where(new_T < count, total + new_T, S)
    first_BSNC = first_BSNC.at[:, place_T].set(new_BTNC, mode="drop")
    longer = jnp.concatenate([last_BRNC, new_BTNC], axis=1)
    last_BRNC = jax.lax.dynamic_slice_in_dim(longer, count, R, axis=1)
    return Kept(first_BSNC, last_BRNC, total + count)


def read_again(predict: Callable, state, kept: Kept):
    """The state after the frames of a stream, made of `state`, which has read no frame yet.

    The first frames are committed and then the last ones, one by one. Those between them are
    skipped, so all have the positions that they had.
    """
    S, R = kept.first_BSNC.shape[1], kept.last_BRNC.shape[1]
    begin = jnp.maximum(kept.total - R, 0)
    first = jnp.minimum(S, begin)

    def committing(frames_BTNC):
        def one(place, state):
            frame_B1NC = jax.lax.dynamic_slice_in_dim(frames_BTNC, place, 1, axis=1)
            return samplers.commit(predict, frame_B1NC, state)

        return one

    state = samplers.commit(predict, kept.last_BRNC[:, :0], state)  # in the form that it keeps
    state = jax.lax.fori_loop(0, first, committing(kept.first_BSNC), state) if S else state
    state = _skipped(state, begin - first)
    return jax.lax.fori_loop(R - (kept.total - begin), R, committing(kept.last_BRNC), state)


def _skipped(state, frames):
    if isinstance(state, guidance.Histories):
        return guidance.Histories(skip(state.states, frames), state.frames + frames)
    return skip(state, frames)


class Carry(NamedTuple):
    """All that a stream needs to go on: the frames in flight, the state, and where it stands.

    kept: the finished frames that a switch reads again, None if the stream cannot switch.
    """

    x_BWNC: jax.Array
    state: Any
    position: samplers.Position
    kept: Kept | None = None


class Stream(Iterator):
    """Yields clean latents [B, t, N, C] as soon as their frames are finished.

    step: (x_BWNC, state, piece) -> (x_BWNC, state, finished), a compiled `advance`. One program
    serves a stream of any length, and memory and the time of a piece do not grow. `carry` is what
    another Stream with the same step and schedule goes on from, after the frames yielded so far.
    frames: how many frames to sample in all. first: given latents to yield before them, or None.
    start_anew: (cond, kept) -> the state that has read these conditions and the frames that
    `carry` keeps, for `switch`.
    """

    def __init__(
        self,
        step: Callable,
        carry: Carry,
        schedule: FrameSchedule,
        frames: int,
        first,
        start_anew: Callable | None = None,
    ):
        self.carry, self._step, self._frames, self._first = carry, step, frames, first
        self._plan, self._start_anew = samplers.stream_plan(schedule), start_anew
        position = samplers.Position(*map(int, carry.position))
        self._pieces = samplers.pieces(schedule, self._plan, position=position, endless=True)

    @property
    def is_whole(self) -> bool:
        """Whether all finished frames were yielded, so another stream can go on from `carry`."""
        return self.carry.position[1] <= self._frames

    def switch(self, cond: dict):
        """Go on under other conditions: a new state reads them and the last frames again.

        What was yielded stays. The frames in flight keep the noise that they have left, and take
        their other steps under the new conditions.
        """
        state = self._start_anew(cond, self.carry.kept)
        self.carry = self.carry._replace(state=state)

    def __next__(self) -> jax.Array:
        if self._first is not None:
            first, self._first = self._first, None
            return first
        while (done := int(self.carry.position[1])) < self._frames:
            piece, position = next(self._pieces)
            x_BWNC, state, finished = self._step(self.carry.x_BWNC, self.carry.state, piece)
            kept, count = self.carry.kept, position.finished - done
            kept = keep(kept, finished, count) if kept and count else kept
            self.carry = Carry(x_BWNC, state, position, kept)
            if count:
                return finished[:, : min(position.finished, self._frames) - done]
        raise StopIteration


class Decoded(Iterator):
    """Iterates over (uint8 video of the next frames, seconds for latents, seconds for decoding).

    A video of `frames` frames by a run whose task is a `Generator`, under the conditions `cond` of
    `Task.sample`. Of all frames so far it holds the states of stream and decoder alone.

    switches: {frame: conditions that replace those of `cond` from this video frame on}, each frame
    one that `Generator.check_switch` accepts. A switch acts just before the piece after the frames
    before it. So they do not depend on it, nor does `state`, and a stream that goes on from a state
    may have other switches after the frames made so far.
    """

    def __init__(
        self,
        run: Run,
        cond: dict,
        frames: int,
        rng: jax.Array,
        switches: Mapping[int, dict] = MappingProxyType({}),
    ):
        self._run, self._cond, self._decoding, self._done = run, cond, None, 0
        self._switches = sorted(switches.items())
        options = dict(frozen=run.frozen, frames=frames)
        self._open = lambda carry: run.task.stream(run.params, rng, cond, carry=carry, **options)
        self._latents = self._open(None)

    def state(self):
        """What the stream and its decoding go on from, a tree of arrays; None if they cannot."""
        return (self._latents.carry, self._decoding) if self._latents.is_whole else None

    def restore(self, state, done: int):
        """Go on from a state after `done` video frames."""
        carry, self._decoding = state
        self._latents, self._done = self._open(carry), done
        self._switches = [(frame, new) for frame, new in self._switches if frame >= done]

    def switch(self, conditions: dict):
        """Go on under these conditions, and under those of the stream where they have none."""
        self._latents.switch({**self._cond, **conditions})

    def __next__(self) -> tuple[np.ndarray, float, float]:
        begin = time.perf_counter()
        if self._switches and self._switches[0][0] <= self._done:
            frame, conditions = self._switches.pop(0)
            if frame < self._done:
                raise ValueError(f"a piece went on to frame {self._done}, past the switch {frame}")
            self.switch(conditions)
        z_BTNC = jax.block_until_ready(next(self._latents))
        ready = time.perf_counter()
        clip, self._decoding = self._run.task.decode(self._run.frozen, z_BTNC, self._decoding)
        clip = to_uint8(np.asarray(clip))
        self._done += clip.shape[1]
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

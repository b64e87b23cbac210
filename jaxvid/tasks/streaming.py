"""Sampling of causal video as functions of the network alone.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`, as in `diffusion.samplers`.
Whoever owns one (a task) makes `predict` of its weights, condition and guidance, and a state that
has read the condition.
"""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.diffusion import samplers
from jaxvid.diffusion.frame_schedules import FrameSchedule


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
    if memory == "cache":
        x_BFNC, state = begin(predict, state, given_BPNC, rng, solver=solver, schedule=schedule)
        x_BFNC, _ = samplers.sample_cached(
            predict,
            x_BFNC,
            state,
            rng,
            solver=solver,
            schedule=schedule,
            given=given_BPNC.shape[1],
        )
    else:
        x_BFNC = samplers.sample_uncached(
            predict,
            initial_noise(rng, given_BPNC, solver=solver, schedule=schedule),
            state,
            rng,
            solver=solver,
            schedule=schedule,
            given_BPNC=given_BPNC,
            window=window if memory == "window" else None,
        )
    return jnp.concatenate([given_BPNC, x_BFNC], axis=1)


def begin(predict: Callable, state, given_BPNC: jax.Array, rng, *, solver, schedule):
    """(noise of the frames to come x_BFNC, state that has read the given frames)."""
    B, P = given_BPNC.shape[:2]
    _, state = predict(given_BPNC, jnp.zeros((B, P), jnp.int32), state)
    return initial_noise(rng, given_BPNC, solver=solver, schedule=schedule), state


def initial_noise(rng, given_BPNC: jax.Array, *, solver, schedule) -> jax.Array:
    """x_BFNC of the frames that follow the given ones; a function of `rng` and a frame's index."""
    B, P, N, C = given_BPNC.shape
    frame_F = np.arange(P, P + schedule.frames)
    t_F = np.full_like(frame_F, solver.noise.num_steps)
    return samplers.frame_noise(rng, frame_F, t_F, (B, schedule.frames, N, C))


def advance(predict: Callable, x_BFNC, state, rows, rng, *, solver, schedule, given: int):
    """(x_BFNC, state) after some rows of the schedule's plan; `given` frames precede the buffer."""
    return samplers.advance(
        predict,
        x_BFNC,
        state,
        rows,
        rng,
        solver=solver,
        plan=samplers.plan(schedule),
        levels=solver.noise.levels(schedule.sample_steps),
        given=given,
    )


def finished_frames(step: Callable, x_BFNC, state, schedule: FrameSchedule) -> Iterator[jax.Array]:
    """Yield clean latents [B, t, N, C] as soon as their frames are finished.

    step: (x_BFNC, state, rows) -> (x_BFNC, state), a compiled `advance`. It is called once between
    two yields, always with rows of one length, so one program serves a video of any length.
    """
    for rows, frames in samplers.split_after_commits(samplers.plan(schedule)):
        x_BFNC, state = step(x_BFNC, state, rows)
        yield x_BFNC[:, frames]

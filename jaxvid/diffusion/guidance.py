"""Guidance: combinations of predictions that steer a sampler by its condition or its history."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvid.diffusion.noise import NoiseSchedule
from jaxvid.diffusion.samplers import frame_noise


def classifier_free(predict: Callable, scale: float) -> Callable:
    """Classifier-free guidance (Ho and Salimans 2022): uncond + scale (cond - uncond).

    Takes and returns predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state). The given `predict`
    is called on a doubled batch, conditional half first, so the state must have read the contexts
    [condition; null]. Exact for every prediction type, since x0, eps and v are affine in each
    other.
    """

    def guided(x_BTNC, t_BT, state):
        both, state = predict(jnp.concatenate([x_BTNC] * 2), jnp.concatenate([t_BT] * 2), state)
        cond_BTNC, uncond_BTNC = jnp.split(both, 2)
        return uncond_BTNC + scale * (cond_BTNC - uncond_BTNC), state

    return guided


class Past(NamedTuple):
    """What one evaluation of the network reads beside the frames that are noisy.

    frames: the window that it sees, its own frame included; None = that of the network, 0 = no
    finished frame at all. level: the timestep that finished frames are noised to, 0 = clean.
    conditional: whether it reads the condition.
    """

    frames: int | None = None
    level: int = 0
    conditional: bool = True


NOTHING = Past(frames=0, conditional=False)


def history_terms(history: float, condition: float, past: Past) -> dict[Past, float]:
    """The weights of the predictions s that history guidance adds up; they sum to 1.

    History guidance of Diffusion Forcing (Song et al. 2025, DFoT, eq. 6) with the scale `history`,
    and classifier-free guidance with the scale `condition`. With the history H and the condition c

        s(H, c) + (history - 1) (s(past) - s()) + (condition - 1) (s(H, c) - s(H))

    so a scale of 1 is no guidance. s() reads neither. Vanilla guidance is by all of the past,
    fractional guidance by a noised past, and temporal guidance by a short one. Equal terms are
    merged, and those of weight 0 are left out.
    """
    whole = Past()
    terms = dict.fromkeys((whole, past, Past(conditional=False), NOTHING), 0.0)
    for term, weight in (
        *((whole, 1.0), (past, history - 1), (NOTHING, 1 - history)),
        *((whole, condition - 1), (Past(conditional=False), 1 - condition)),
    ):
        terms[term] += weight
    return {term: weight for term, weight in terms.items() if weight}


class Histories(NamedTuple):
    """The state of a stream with history guidance: one for each term, and the frames it has read.

    states: in the order of the terms. frames: int32.
    """

    states: tuple
    frames: Any


@dataclasses.dataclass(frozen=True)
class HistoryGuided:
    """A network, as samplers call it, whose prediction is the sum of those of some pasts.

    terms: see `history_terms`. predicts: the network of each term, which differs where the window
    does. A finished frame is committed to each state as its past has it: clean, noised by noise
    that depends on `rng` and the index of the frame alone, or not at all; skip(state, frames) then
    moves the positions on. So a step costs one evaluation for each term, a commit for each with a
    past. Exact for every prediction type, since x0, eps and v are affine in each other.
    """

    terms: Mapping[Past, float]
    predicts: Sequence[Callable]
    skip: Callable
    noise: NoiseSchedule
    rng: jax.Array

    def __call__(self, x_BTNC, t_BT, state: Histories):
        parts = zip(self.terms.values(), self.predicts, state.states)
        return sum(w * predict(x_BTNC, t_BT, own)[0] for w, predict, own in parts), state

    def commit(self, x_BTNC, state: Histories) -> Histories:
        """The state after the finished frames x_BTNC."""
        T = x_BTNC.shape[1]
        parts = zip(self.terms, self.predicts, state.states)
        states = tuple(
            self.skip(own, T)
            if past.frames == 0
            else predict(*self._as_read(x_BTNC, past.level, state.frames), own)[1]
            for past, predict, own in parts
        )
        return Histories(states, state.frames + jnp.int32(T))

    def _as_read(self, x_BTNC, level, first):
        """(x_BTNC, t_BT) of finished frames first, first + 1, .. noised to a level."""
        B, T = x_BTNC.shape[:2]
        t_BT = jnp.full((B, T), level, jnp.int32)
        if not level:
            return x_BTNC, t_BT
        # No sampler draws noise at timesteps from num_steps + 1 on.
        draw_T = jnp.full(T, self.noise.num_steps + level)
        eps_BTNC = frame_noise(self.rng, first + jnp.arange(T), draw_T, x_BTNC.shape)
        return self.noise.add_noise(x_BTNC, eps_BTNC, t_BT), t_BT

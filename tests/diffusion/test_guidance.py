"""History guidance: Gaussian frames in closed form, the terms that it evaluates and commits."""

import collections
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import frame_schedules, samplers
from jaxvid.diffusion.guidance import NOTHING, Histories, HistoryGuided, Past, history_terms
from jaxvid.diffusion.noise import make_noise_schedule

FLOW = samplers.Solver(make_noise_schedule("flow"), "x0")
WHOLE, NULL, SPREAD = Past(), Past(conditional=False), 0.5
FRACTIONAL = Past(level=400)


@pytest.mark.parametrize(
    "arguments, terms",
    [
        ((1.0, 1.0, WHOLE), {WHOLE: 1}),
        ((1.0, 3.0, FRACTIONAL), {WHOLE: 3, NULL: -2}),
        ((1.5, 1.0, WHOLE), {WHOLE: 1.5, NOTHING: -0.5}),
        ((0.0, 1.0, WHOLE), {NOTHING: 1}),
        ((1.5, 1.0, FRACTIONAL), {WHOLE: 1, FRACTIONAL: 0.5, NOTHING: -0.5}),
        ((1.5, 2.0, WHOLE), {WHOLE: 2.5, NULL: -1, NOTHING: -0.5}),
        ((2.0, 1.0, Past(4, 10)), {WHOLE: 1, Past(4, 10): 1, NOTHING: -1}),
    ],
)
def test_equal_terms_are_merged_and_those_of_weight_0_left_out(arguments, terms):
    assert history_terms(*arguments) == terms


class Last(NamedTuple):
    """The state of the network below: the last frame it read, and how many it read or skipped."""

    last_B1NC: jax.Array
    is_known: jax.Array
    frames: jax.Array


def skip(state, frames):
    return state._replace(frames=state.frames + frames)


def gaussian(x_BTNC, t_BT, state, calls=None, name=None):
    """The exact network of frames z_f ~ N(0.8 z_{f-1} + 0.3, SPREAD^2), -1 for an unknown z_{f-1}.

    It denoises one frame at a time. calls counts evaluations by (name, frames).
    """
    noise = FLOW.noise
    alpha, sigma = (jnp.take(S, t_BT)[..., None, None] for S in (noise.alpha_S, noise.sigma_S))
    if calls is not None:
        jax.debug.callback(lambda T: calls.update({(name, int(T)): 1}), x_BTNC.shape[1])
    mean = 0.8 * jnp.where(state.is_known, state.last_B1NC, -1.0) + 0.3
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    x0 = mean + gain * (x_BTNC - alpha * mean)
    if not x_BTNC.shape[1]:
        return x0, state
    return x0, Last(x_BTNC[:, -1:], jnp.bool(True), state.frames + x_BTNC.shape[1])


START = Last(jnp.zeros((1, 1, 1, 3)), jnp.bool(False), jnp.int32(0))
RNG = jax.random.key(5)
STEPS, FRAMES = 250, 5


def guided(terms, calls=None):
    predicts = [functools.partial(gaussian, calls=calls, name=name) for name in terms]
    network = HistoryGuided(terms, predicts, skip, FLOW.noise, RNG)
    return network, Histories((START,) * len(terms), jnp.int32(0))


def sample(network, state):
    x_BFNC = jax.random.normal(jax.random.key(1), (1, FRAMES, 1, 3))
    schedule = frame_schedules.autoregressive(FRAMES, STEPS)

    @jax.jit
    def run(x_BFNC, state):
        options = dict(solver=FLOW, schedule=schedule)
        return samplers.sample_cached(network, x_BFNC, state, RNG, **options)

    clip, state = run(x_BFNC, state)
    jax.effects_barrier()
    return np.asarray(x_BFNC), np.asarray(clip), state


@pytest.mark.parametrize("scale", [0.0, 1.5, 3.0])
def test_vanilla_guidance_of_gaussian_frames_scales_the_shift_of_the_mean(scale):
    """Both scores have the spread of a frame, so the guided one is that of a Gaussian, and its flow
    takes noise x to mean + SPREAD x."""
    noise, clip, state = sample(*guided(history_terms(scale, 1.0, WHOLE)))
    last, without = None, 0.8 * -1 + 0.3
    for f in range(FRAMES):
        with_past = without if last is None else 0.8 * last + 0.3
        last = without + scale * (with_past - without) + SPREAD * noise[:, f]
        np.testing.assert_allclose(clip[:, f], last, rtol=2e-2, atol=2e-2)
        last = clip[:, f]
    assert [int(own.frames) for own in state.states] == [FRAMES] * len(state.states)


def test_a_step_costs_one_evaluation_for_each_term_and_nothing_is_committed_to_no_past():
    calls = collections.Counter()
    terms = history_terms(1.5, 1.0, FRACTIONAL)
    _, clip, _ = sample(*guided(terms, calls))
    counts = {name: sum(n for (own, _), n in calls.items() if own == name) for name in terms}
    assert counts == {WHOLE: FRAMES * (STEPS + 1), FRACTIONAL: FRAMES * (STEPS + 1)} | {
        NOTHING: FRAMES * STEPS
    }
    calls.clear()
    alone = history_terms(1.0, 1.0, FRACTIONAL)
    _, conditional, _ = sample(*guided(alone, calls))
    assert sum(calls.values()) == FRAMES * (STEPS + 1)
    np.testing.assert_array_equal(conditional, sample(gaussian, START)[1])
    assert np.abs(clip - conditional).max() > 1e-2


def test_each_term_reads_its_own_past():
    """One step of guidance is the weighted sum of the runs of its terms, each with its state."""
    terms = history_terms(1.5, 1.0, FRACTIONAL)
    network, state = guided(terms)
    z_BTNC = jax.random.normal(jax.random.key(2), (1, 4, 1, 3))
    x_BTNC, t_BT = z_BTNC[:, :1] + 1, jnp.full((1, 1), 700)
    for f in range(3):
        state = network.commit(z_BTNC[:, f : f + 1], state)
    clean, draw = z_BTNC[:, 2:3], (np.array([2]), np.array([1000 + 400]))
    eps_BTNC = samplers.frame_noise(RNG, *draw, clean.shape)
    noised = FLOW.noise.alpha_S[400] * clean + FLOW.noise.sigma_S[400] * eps_BTNC
    wanted = 0
    for weight, last in ((1.0, clean), (0.5, noised), (-0.5, None)):
        own = START if last is None else Last(last, jnp.bool(True), jnp.int32(3))
        wanted += weight * gaussian(x_BTNC, t_BT, own)[0]
    np.testing.assert_allclose(network(x_BTNC, t_BT, state)[0], wanted, atol=1e-5)

    at_once = network.commit(z_BTNC[:, :3], guided(terms)[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), at_once, state)

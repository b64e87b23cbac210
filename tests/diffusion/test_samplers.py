"""Samplers: the exact cache against running everything, official numbers, counted evaluations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import guidance, samplers, schedulers, schedules
from jaxvid.models.dit import DiT
from tests.mixers.test_mixers import disturbed

N = 50


@functools.lru_cache
def network(arrangement="joint", window=16, sinks=0):
    """(model, params, start state) of a small random DiT whose every path carries a signal."""
    model = DiT(
        width=16,
        depth=2,
        heads=2,
        grid=(1, 2),
        arrangement=arrangement,
        mixer={"name": "softmax", "window": window, "sinks": sinks},
    )
    rng = jax.random.key(0)
    context = jax.random.normal(rng, (1, 3, 5))
    x, t = jnp.zeros((1, 2, 2, 3)), jnp.zeros((1, 2), jnp.int32)
    params = disturbed(model.init(rng, x, t, context))
    _, state = model.apply(params, x[:, :0], t[:, :0], context)
    return model, params, state


def draw(schedule, memory, model, params, state, given=0, window=None, solver=None, seen=None):
    """A clip by `samplers.cached` or `uncached`; `seen` collects the frames of each evaluation."""
    solver = solver or samplers.Solver(schedules.make("linear"), "v")
    rng = jax.random.key(1)
    total = given + schedule.frames
    noise = samplers.frame_noise(rng, np.arange(total), np.full(total, 1000), (1, total, 2, 3))
    given_BPNC, x_BFNC = 0.5 * noise[:, :given], noise[:, given:]

    def predict(x, t, state):
        if seen is not None:
            jax.debug.callback(lambda: seen.append(x.shape[1]))
        return model.apply(params, x, t, None, state)

    @jax.jit
    def run(x_BFNC, state):
        options = dict(solver=solver, schedule=schedule)
        if memory == "cache":
            _, state = model.apply(params, given_BPNC, jnp.zeros((1, given), int), None, state)
            return samplers.cached(predict, x_BFNC, state, rng, given=given, **options)[0]
        return samplers.uncached(
            predict, x_BFNC, state, rng, given_BPNC=given_BPNC, window=window, **options
        )

    result = np.asarray(run(x_BFNC, state))
    jax.effects_barrier()
    return result


@pytest.mark.parametrize(
    "s, frames", [(0, 16)] + [(s, frames) for s in (4, 5, 10, 50) for frames in (16, 40)]
)
def test_cached_equals_uncached(s, frames):
    schedule = schedulers.ad(frames, N, s, window=16)
    seen = []
    cached = draw(schedule, "cache", *network(), seen=seen)
    np.testing.assert_allclose(cached, draw(schedule, "none", *network()), atol=1e-5)
    assert sum(seen) == frames * N + frames == schedule.evaluations


@pytest.mark.parametrize("arrangement, window, sinks", [("factorised", 16, 0), ("joint", 6, 2)])
def test_cached_equals_uncached_after_given_frames(arrangement, window, sinks):
    schedule = schedulers.pyramid(9, 10, 2.5, window=6)
    net = network(arrangement, window, sinks)
    cached = draw(schedule, "cache", *net, given=4)
    np.testing.assert_allclose(cached, draw(schedule, "none", *net, given=4), atol=1e-5)


def test_blocks_and_ancestral_noise_are_the_same_with_a_cache():
    schedule = schedulers.block_causal(8, 10, block=3, s=5)
    solver = samplers.Solver(schedules.make("cosine"), "x0", eta=1.0)
    cached = draw(schedule, "cache", *network(), solver=solver)
    np.testing.assert_allclose(cached, draw(schedule, "none", *network(), solver=solver), atol=1e-5)
    flow = samplers.Solver(schedules.make("flow", shift=3.0), "v")
    euler = draw(schedule, "cache", *network(), solver=flow)
    np.testing.assert_allclose(euler, draw(schedule, "none", *network(), solver=flow), atol=1e-5)


def test_the_first_frame_is_the_same_for_every_schedule():
    first = [draw(schedulers.ad(4, 10, s), "cache", *network())[:, 0] for s in (0, 3, 10)]
    for frame in first[1:]:
        np.testing.assert_allclose(frame, first[0], atol=1e-5)


def test_moved_window_is_exact_until_it_moves():
    schedule = schedulers.ad(10, 10, 3)
    full = draw(schedule, "none", *network())
    np.testing.assert_array_equal(draw(schedule, "none", *network(), window=10), full)
    moved = draw(schedule, "none", *network(), window=6)
    np.testing.assert_allclose(moved[:, :3], full[:, :3], atol=1e-5)
    assert np.abs(moved[:, -1] - full[:, -1]).max() > 1e-3


def test_pieces_cut_the_plan_and_lose_nothing():
    plan = samplers.plan(schedulers.ad(7, 10, 4))
    finished, iterations = [], []
    for rows, done in samplers.pieces(plan):
        assert len(rows["width"]) == 10
        finished += list(range(7))[done]
        busy = rows["width"] > 0
        iterations += list(rows["iteration"][busy])
    assert finished == list(range(7))
    assert iterations == list(plan.rows["iteration"])


# AR-Diffusion's sampler on a toy denoiser, tanh of the mean of the frames so far. Its own code
# blends idle frames, which moves them by up to 6e-5; these are its numbers with them left alone.
OFFICIAL = {
    0: [-0.137005, -0.081393, -0.087273, -0.018507, -0.027335, 0.054857, 0.042880, 0.134277],
    2: [-0.136992, -0.081383, 0.017320, 0.072978, 0.104975, 0.151359, 0.157750, 0.196499],
    5: [-0.136992, -0.081383, 0.025025, 0.080577, 0.108722, 0.153748, 0.158992, 0.196968],
}


@pytest.mark.parametrize("s", OFFICIAL)
def test_official_sampler_on_a_toy_denoiser(s):
    def predict(x_BTNC, t_BT, state):
        total, seen = state
        sums = total + jnp.cumsum(x_BTNC, axis=1)
        count = seen + jnp.arange(1, x_BTNC.shape[1] + 1)
        mean_BTNC = sums / count[:, None, None]
        x0 = 0.5 * jnp.tanh(mean_BTNC) * (1 - t_BT[..., None, None] / 2000) + 0.1
        return x0, (sums[:, -1:], count[-1])

    x_BFNC = jnp.linspace(-1.5, 1.5, 8).reshape(1, 4, 1, 2)
    state = (jnp.zeros((1, 1, 1, 2)), jnp.int32(0))
    solver = samplers.Solver(schedules.make("linear"), "x0")
    options = dict(solver=solver, schedule=schedulers.ad(4, 5, s))
    rng = jax.random.key(0)
    empty = x_BFNC[:, :0]
    uncached = samplers.uncached(predict, x_BFNC, state, rng, given_BPNC=empty, **options)
    cached, _ = samplers.cached(predict, x_BFNC, state, rng, **options)
    np.testing.assert_allclose(uncached.reshape(-1), OFFICIAL[s], atol=2e-5)
    np.testing.assert_allclose(cached.reshape(-1), OFFICIAL[s], atol=2e-5)


def test_guidance_combines_the_halves():
    def predict(x, t, state):
        return x * jnp.repeat(state, len(x) // 2)[:, None, None, None], state

    x, t = jnp.ones((2, 3, 1, 1)), jnp.zeros((2, 3), jnp.int32)
    y, state = guidance.classifier_free(predict, 3.0)(x, t, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(y, 1 + 3 * (2 - 1))
    assert state.shape == (2,)

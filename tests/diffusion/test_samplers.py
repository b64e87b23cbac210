"""Samplers: the exact cache against running everything, official numbers, counted evaluations."""

import collections
import functools
import itertools
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import frame_schedules, guidance, samplers
from jaxvid.diffusion.noise import make_noise_schedule
from jaxvid.errors import UserError
from jaxvid.models.dit import DiT
from tests.laws import disturbed

LINEAR = samplers.Solver(make_noise_schedule("linear"), "v")
FLOW = samplers.Solver(make_noise_schedule("flow", shift=3.0), "v")
NOISY = LINEAR._replace(end="noisy")
ANCESTRAL = samplers.Solver(make_noise_schedule("cosine"), "x0", eta=1.0)
ANCESTRAL_NOISY = ANCESTRAL._replace(end="noisy")

# (schedule, solver, given frames, (arrangement, window, sinks) of the network)
ROWS = {
    "synchronous": (frame_schedules.ad(4, 8, 0), LINEAR, 0, ("joint", 4, 0)),
    "ad": (frame_schedules.ad(10, 8, 2, window=4), LINEAR, 0, ("joint", 4, 0)),
    "autoregressive": (frame_schedules.ad(6, 8, 8), LINEAR, 0, ("joint", 4, 0)),
    "noisy": (frame_schedules.ad(6, 8, 2, window=4), NOISY, 0, ("joint", 4, 0)),
    "blocks": (frame_schedules.block_causal(7, 8, block=2, s=4), ANCESTRAL, 0, ("joint", 4, 0)),
    "sinks": (frame_schedules.pyramid(9, 8, 2.5, window=6), ANCESTRAL_NOISY, 4, ("joint", 6, 2)),
    "factorised": (frame_schedules.pyramid(7, 8, 2.5), FLOW, 3, ("factorised", 8, 0)),
}


@functools.cache
def network(arrangement, window, sinks):
    """(model, params, start state) of a small random DiT without zeros in its parameters."""
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
    params = disturbed(jax.jit(model.init)(rng, x, t, context))
    _, state = jax.jit(model.apply)(params, x[:, :0], t[:, :0], context)
    return model, params, state


@functools.cache
def sample(name, cached, window=None):
    """(a clip of a row, numbers of frames of all evaluations), with a cache or without."""
    schedule, solver, given, options = ROWS[name]
    model, params, state = network(*options)
    rng, evaluated = jax.random.key(1), []
    total = given + schedule.frames
    noise = samplers.frame_noise(rng, np.arange(total), np.full(total, 1000), (1, total, 2, 3))
    given_BPNC, x_BFNC = 0.5 * noise[:, :given], noise[:, given:]

    def predict(x, t, state):
        jax.debug.callback(lambda: evaluated.append(x.shape[1]))
        return model.apply(params, x, t, None, state)

    @jax.jit
    def run(x_BFNC, state):
        options = dict(solver=solver, schedule=schedule)
        if not cached:
            options |= dict(given_BPNC=given_BPNC, window=window)
            return samplers.sample_uncached(predict, x_BFNC, state, rng, **options)
        _, state = model.apply(params, given_BPNC, jnp.zeros((1, given), int), None, state)
        return samplers.sample_cached(predict, x_BFNC, state, rng, given=given, **options)[0]

    clip = np.asarray(run(x_BFNC, state))
    jax.effects_barrier()
    return clip, evaluated


@pytest.mark.parametrize("name", ROWS)
def test_cached_equals_uncached(name):
    schedule = ROWS[name][0]
    clip, evaluated = sample(name, cached=True)
    np.testing.assert_allclose(clip, sample(name, cached=False)[0], atol=1e-5)
    assert sum(evaluated) == schedule.frames * (8 + 1) == schedule.evaluations


def test_the_first_frame_is_the_same_for_every_schedule():
    first = [sample(name, cached=True)[0][:, 0] for name in ("synchronous", "ad", "autoregressive")]
    np.testing.assert_allclose(first[1:], [first[0]] * 2, atol=1e-5)


def test_moved_window_is_exact_until_it_moves():
    full, _ = sample("blocks", cached=False)
    moved, _ = sample("blocks", cached=False, window=5)
    np.testing.assert_allclose(moved[:, :2], full[:, :2], atol=1e-5)
    assert np.abs(moved[:, -1] - full[:, -1]).max() > 1e-3


SCHEDULES = (
    frame_schedules.ad(7, 10, 4),
    frame_schedules.ad(30, 10, 1, window=10),
    frame_schedules.ad(3, 10, 1),
    frame_schedules.autoregressive(3, 5),
    frame_schedules.synchronous(4, 5),
    frame_schedules.block_causal(7, 6, block=3, s=4),
    frame_schedules.pyramid(9, 8, 2.5),
    frame_schedules.pyramid(9, 4, 0.4),
)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pieces_are_the_table_of_the_schedule(schedule):
    """Replayed, they take every step of every frame once, in the iteration that the table says."""
    for plan in (samplers.clip_plan(schedule), samplers.stream_plan(schedule)):
        clip = plan == samplers.clip_plan(schedule)
        index_F = np.zeros(schedule.frames + plan.slots, int)
        iteration, done = 0, 0
        for piece, position in samplers.pieces(schedule, plan, endless=not clip):
            assert piece.first == done and len(piece.width_U) == plan.rows
            for row, width in enumerate(np.take(plan.widths, piece.width_U)):
                n_T = piece.age_W[:width] + row
                index_F[done : done + width] += (n_T >= 0) & (n_T < plan.sample_steps)
                if width:
                    wanted = schedule.index_IF[min(iteration, schedule.iterations - 1)]
                    np.testing.assert_array_equal(index_F[: schedule.frames], wanted)
                    iteration += 1
            done += plan.commits[piece.commit]
            assert (index_F[: min(done, schedule.frames)] == plan.sample_steps).all()
            assert position == (iteration, done)
            if done >= schedule.frames:
                break
        assert done >= schedule.frames and iteration >= schedule.iterations


def test_a_stream_goes_on_from_a_position():
    schedule = frame_schedules.pyramid(9, 8, 2.5)
    plan = samplers.stream_plan(schedule)
    whole = list(samplers.pieces(schedule, plan))
    again = list(samplers.pieces(schedule, plan, position=whole[2][1]))
    assert len(again) == len(whole) - 3
    jax.tree.map(np.testing.assert_array_equal, again, whole[3:])


def test_streams_of_all_lengths_have_one_plan_and_take_no_memory():
    """Tables of frames times iterations would take over 700 MB for 4,000 frames."""
    short = samplers.stream_plan(frame_schedules.ad(20, 50, 5, window=16))
    assert short == samplers.Plan(50, 10, 5, (0, 1, 2, 3, 5, 10), (0, 1))
    schedule = frame_schedules.ad(10**9, 50, 5, window=16)
    plan = samplers.stream_plan(schedule)
    assert plan == short
    tracemalloc.start()
    first_pieces = itertools.islice(samplers.pieces(schedule, plan), 4000)
    [(piece, position)] = collections.deque(first_pieces, maxlen=1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert position == (4000 * 5, 4000 - 9) and peak < 10**6
    assert np.take(plan.widths, piece.width_U).tolist() == [10] * 5  # no frame but those in flight


def test_a_stream_that_a_scan_cannot_carry_is_refused_in_one_line():
    model, params, _ = network("joint", 4, 0)
    unbounded = model.clone(mixer={"name": "softmax", "window": None})
    x, t = jnp.zeros((1, 6, 2, 3)), jnp.zeros((1, 0), jnp.int32)
    _, growing = jax.eval_shape(unbounded.apply, params, x[:, :0], t)
    growing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), growing)
    for net, start, message in (
        (model, None, "^state=None: start the stream"),
        (unbounded, growing, "^state: changes its shape .* give it a window"),
    ):

        def predict(x, t, state, net=net):
            return net.apply(params, x, t, None, state)

        options = dict(solver=LINEAR, schedule=frame_schedules.ad(6, 8, 8))
        with pytest.raises(UserError, match=message) as error:
            samplers.sample_cached(predict, x, start, jax.random.key(0), **options)
        assert "\n" not in str(error.value)


# AR-Diffusion's sampler on a toy denoiser, tanh of the mean of the frames so far. Its own code
# blends idle frames, which moves them by up to 6e-5; these are its numbers without the blending.
OFFICIAL = {
    0: [-0.137005, -0.081393, -0.087273, -0.018507, -0.027335, 0.054857, 0.042880, 0.134277],
    2: [-0.136992, -0.081383, 0.017320, 0.072978, 0.104975, 0.151359, 0.157750, 0.196499],
    5: [-0.136992, -0.081383, 0.025025, 0.080577, 0.108722, 0.153748, 0.158992, 0.196968],
}


@pytest.mark.parametrize("s", OFFICIAL)
def test_official_sampler_on_a_toy_denoiser(s):
    def predict(x_BTNC, t_BT, state):
        total, count = state
        sums = total + jnp.cumsum(x_BTNC, axis=1)
        counts = count + jnp.arange(1, x_BTNC.shape[1] + 1)
        mean_BTNC = sums / counts[:, None, None]
        x0 = 0.5 * jnp.tanh(mean_BTNC) * (1 - t_BT[..., None, None] / 2000) + 0.1
        return x0, (sums[:, -1:], counts[-1])

    x_BFNC = jnp.linspace(-1.5, 1.5, 8).reshape(1, 4, 1, 2)
    state = (jnp.zeros((1, 1, 1, 2)), jnp.int32(0))
    solver = samplers.Solver(make_noise_schedule("linear"), "x0", end="noisy")
    options = dict(solver=solver, schedule=frame_schedules.ad(4, 5, s))
    rng = jax.random.key(0)
    empty = x_BFNC[:, :0]
    uncached = samplers.sample_uncached(predict, x_BFNC, state, rng, given_BPNC=empty, **options)
    cached, _ = samplers.sample_cached(predict, x_BFNC, state, rng, **options)
    np.testing.assert_allclose(uncached.reshape(-1), OFFICIAL[s], atol=2e-5)
    np.testing.assert_allclose(cached.reshape(-1), OFFICIAL[s], atol=2e-5)


def oracle(noise, prediction, x0_BFNC):
    """A perfect network of frames that all begin together: it knows the clean clip."""

    def predict(x_BTNC, t_BT, state):
        alpha, sigma = (jnp.take(S, t_BT)[..., None, None] for S in (noise.alpha_S, noise.sigma_S))
        eps = (x_BTNC - alpha * x0_BFNC) / jnp.where(sigma > 0, sigma, 1)
        return noise.target(x0_BFNC, eps, t_BT, prediction), state

    return predict


@pytest.mark.parametrize("name", ["linear", "linear_baseline", "cosine", "sigmoid", "flow"])
def test_a_perfect_network_ends_at_the_clip(name):
    """To more than 100 dB. The released sampler keeps the noise of timestep 0."""
    x0_BFNC = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 3, 4, 5)), jnp.float32)
    rng, start = jax.random.key(0), jax.random.normal(jax.random.key(1), x0_BFNC.shape)

    def decibels(num_steps, steps, prediction, end, eta=0.0):
        noise = make_noise_schedule(name, num_steps)
        solver = samplers.Solver(noise, prediction, eta, end)
        clip, _ = jax.jit(
            lambda x: samplers.sample_cached(
                oracle(noise, prediction, x0_BFNC),
                x,
                (),
                rng,
                solver=solver,
                schedule=frame_schedules.synchronous(3, steps),
            )
        )(start)
        error = np.square(np.asarray(clip, np.float64) - x0_BFNC).mean()
        return 10 * np.log10(4 / max(error, 1e-30))

    for num_steps, steps, prediction, eta in (
        (1000, 1, "x0", 0.0),
        (1000, 10, "v", 1.0),
        (1000, 50, "v", 0.0),
        (50, 49, "v", 0.0),
        (50, 7, "v" if name == "flow" else "eps", 0.0),
    ):
        assert decibels(num_steps, steps, prediction, "clean", eta) > 100, (num_steps, steps)
    noisy = decibels(1000, 50, "v", "noisy")
    if name == "linear":
        assert noisy == pytest.approx(10 * np.log10(4 / 1e-4), abs=1.5)
    assert (noisy > 100) == (name == "flow")


def test_guidance_combines_the_halves():
    def predict(x, t, state):
        return x * jnp.repeat(state, len(x) // 2)[:, None, None, None], state

    x, t = jnp.ones((2, 3, 1, 1)), jnp.zeros((2, 3), jnp.int32)
    y, state = guidance.classifier_free(predict, 3.0)(x, t, jnp.array([2.0, 1.0]))
    np.testing.assert_allclose(y, 1 + 3 * (2 - 1))
    assert state.shape == (2,)

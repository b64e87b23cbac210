"""Shortcut forcing on Gaussian frames, where the exact step of any size is known."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import frame_schedules, samplers, shortcut
from jaxvid.diffusion.noise import make_noise_schedule

FINEST, LEVELS = 8, 65
FLOW = make_noise_schedule("flow", LEVELS)
MEAN, DEVIATION = 0.3, 0.5  # of the frames


def exact(x_BTNC, t_BT, size_BT):
    """The x0 whose step from t reaches the end of the probability flow at t - d, by its formula.

    Frames z ~ N(m, s^2) give x_t ~ N((1 - t) m, S(t)^2) with S(t)^2 = (1 - t)^2 s^2 + t^2, and the
    flow from t to r maps x to (1 - r) m + (x - (1 - t) m) S(r) / S(t).
    """
    t = t_BT[..., None, None] / (LEVELS - 1)
    r = t - shortcut.stride(size_BT, FINEST, LEVELS)[..., None, None] / (LEVELS - 1)

    def spread(t):
        return jnp.sqrt(((1 - t) * DEVIATION) ** 2 + t**2)

    moved = (1 - r) * MEAN + (x_BTNC - (1 - t) * MEAN) * spread(r) / spread(t)
    return x_BTNC + (moved - x_BTNC) * t / (t - r)


@functools.cache
def drawn():
    t_BT, size_BT = shortcut.draw(jax.random.key(0), (512, 6), FINEST, LEVELS)
    return np.asarray(t_BT), np.asarray(size_BT)


def test_sizes_are_uniform_and_levels_lie_on_their_grid():
    t_BT, size_BT = drawn()
    stride_BT = shortcut.stride(size_BT, FINEST, LEVELS)
    assert shortcut.sizes(FINEST) == 4 and set(stride_BT.flat) == {16, 32, 64}
    assert (t_BT % stride_BT == 0).all() and (t_BT >= stride_BT).all() and t_BT.max() == LEVELS - 1
    for size in (1, 2, 3):
        places = t_BT[size_BT == size] // shortcut.stride(size, FINEST, LEVELS)
        counts = np.bincount(places)[1:]
        assert len(counts) == FINEST >> size
        assert abs(counts.sum() - 1024) < 150 and abs(counts / counts.mean() - 1).max() < 0.2


def test_the_exact_step_of_gaussian_frames_is_its_own_target():
    t_BT, size_BT = drawn()
    x_BTNC = jax.random.uniform(jax.random.key(1), (*t_BT.shape, 2, 3), minval=-2, maxval=2)
    target = jax.jit(functools.partial(shortcut.target, exact, noise=FLOW, finest=FINEST))
    np.testing.assert_allclose(
        target(x_BTNC, t_BT, size_BT), exact(x_BTNC, t_BT, size_BT), atol=1e-6
    )


def test_a_wrong_step_is_not_its_own_target():
    t_BT, size_BT = drawn()
    x_BTNC = jax.random.normal(jax.random.key(1), (*t_BT.shape, 2, 3))

    def smallest(x_BTNC, t_BT, size_BT):
        return exact(x_BTNC, t_BT, 0 * size_BT)

    target = shortcut.target(smallest, x_BTNC, t_BT, size_BT, noise=FLOW, finest=FINEST)
    assert np.abs(target - smallest(x_BTNC, t_BT, size_BT)).max() > 0.1


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
def test_exact_steps_end_at_the_same_frames_for_every_number_of_steps(steps):
    """At the quantile of the data that the noise has among all noise."""
    size = (FINEST // steps).bit_length() - 1

    def predict(x_BTNC, t_BT, state):
        return exact(x_BTNC, t_BT, jnp.full_like(t_BT, size)), state

    noise = jax.random.normal(jax.random.key(2), (2, 5, 2, 3))
    clip, _ = samplers.sample_cached(
        predict,
        noise,
        (),
        jax.random.key(0),
        solver=samplers.Solver(FLOW, "x0"),
        schedule=frame_schedules.autoregressive(5, steps),
    )
    np.testing.assert_allclose(clip, MEAN + DEVIATION * noise, atol=1e-5)


def test_the_size_of_equal_steps():
    """Sizes 0 .. 4 of 16 smallest steps are 1, 2, 4, 8 and 16 of them."""
    found = shortcut.Shortcut(finest=16)
    assert found.sizes == 5
    for steps in (1, 2, 4, 8, 16):
        assert shortcut.stride(found.size_of(steps), 16, 65) * steps == 64
    assert list(range(8))[found.rows(8)] == [0, 4]

"""Resampling forcing: from which noise frames are made anew, and that each reads those before."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.diffusion import resampling
from jaxvid.diffusion.noise import make_noise_schedule

SCHEDULES = ("flow", "linear", "cosine")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_share_of_noise_is_a_shifted_logit_normal_on_every_schedule(name):
    noise = make_noise_schedule(name, 1000)
    t_B = np.asarray(resampling.draw(jax.random.key(0), 20_000, 0.6, noise))
    share_B = noise.sigma_S[t_B] / (noise.alpha_S[t_B] + noise.sigma_S[t_B])
    for deviations in (-1, 0, 1):  # quantiles of the normal distribution
        u = 1 / (1 + np.exp(-deviations))
        wanted = 0.6 * u / (1 - 0.4 * u)
        below = {-1: 0.1587, 0: 0.5, 1: 0.8413}[deviations]
        assert abs(np.quantile(share_B, below) - wanted) < 0.015


def test_a_frame_is_made_of_noise_and_of_the_frames_made_before():
    """A network whose frames are half their noisy self and half the mean of the past."""
    noise, z_BTNC = make_noise_schedule("flow", 100), jnp.arange(24.0).reshape(2, 4, 1, 3)

    def predict(x_BTNC, t_BT, state):
        total, count = state
        x0_BTNC = 0.5 * x_BTNC + 0.5 * (total / jnp.maximum(count, 1))[:, None]
        return x0_BTNC, (total + x_BTNC.sum(1), count + x_BTNC.shape[1])

    def run(z_BTNC):
        state = jnp.zeros((2, 1, 3)), jnp.int32(0)
        options = dict(noise=noise, prediction="x0")
        return resampling.resample(predict, z_BTNC, state, jax.random.key(3), 0.6, **options)

    rng_t, rng_eps = jax.random.split(jax.random.key(3))
    t_B = np.asarray(resampling.draw(rng_t, 2, 0.6, noise)) / 99
    eps_BTNC = np.asarray(jax.random.normal(rng_eps, z_BTNC.shape))
    share = t_B[:, None, None, None]
    x_BTNC, made = (1 - share) * np.asarray(z_BTNC) + share * eps_BTNC, []
    for f in range(4):
        past = np.mean(made, axis=0) if made else 0.0
        made.append(0.5 * x_BTNC[:, f] + 0.5 * past)
    np.testing.assert_allclose(run(z_BTNC), np.stack(made, axis=1), rtol=1e-5, atol=1e-5)
    assert not jax.grad(lambda z: run(z).sum())(z_BTNC).any()

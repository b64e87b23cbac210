"""Resampling forcing: training on a past as the network itself leaves it (Guo et al. 2025).

Teacher-forced frames read the clean past of the data. A sampled video reads its own frames, whose
errors training never showed, so they grow. Here some steps read a past that the network has made
anew with its present weights: each frame of the data is noised to a moderate level, denoised in one
step while it reads the frames made before, and committed. The targets stay those of the data, so
the network learns to lead an erring past back.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvid import checks
from jaxvid.diffusion.layouts import Layout
from jaxvid.diffusion.noise import NoiseSchedule


class Resampling(NamedTuple):
    """How often training reads its own frames; static under jit.

    share: of the teacher-forced steps. after: training steps before they do. shift: below 1 makes
    the noise weaker, from which a frame is made anew.
    """

    share: float = 0.0
    after: int = 0
    shift: float = 0.6

    def check(self, layout: Layout):
        """Raise UserError for values that cannot work."""
        checks.between("share", self.share, 0, 1)
        checks.between("after", self.after, 0, 2**31 - 1)
        checks.positive("shift", self.shift)
        remedy = "only teacher-forced steps read a clean past; use 0, or layout=teacher_forced"
        checks.require(not self.share or layout.teacher_forced, "share", self.share, remedy)


def draw(rng: jax.Array, batch: int, shift: float, noise: NoiseSchedule) -> jax.Array:
    """t_B int32 whose share of noise sigma / (alpha + sigma) is shifted from a logit-normal one."""
    u_B = jax.nn.sigmoid(jax.random.normal(rng, (batch,)))
    share_B = shift * u_B / (1 + (shift - 1) * u_B)
    share_S = noise.sigma_S / (noise.alpha_S + noise.sigma_S)
    return jnp.searchsorted(share_S, share_B).clip(0, len(share_S) - 1).astype(jnp.int32)


def resample(
    predict: Callable,
    z_BTNC: jax.Array,
    state: Any,
    rng: jax.Array,
    shift: float,
    *,
    noise: NoiseSchedule,
    prediction: str,
) -> jax.Array:
    """Clean frames -> the same frames made anew one after another, without gradient.

    predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state), as samplers call it.
    """
    rng_t, rng_eps = jax.random.split(rng)
    B, T = z_BTNC.shape[:2]
    t_B1 = draw(rng_t, B, shift, noise)[:, None]
    x_BTNC = noise.add_noise(z_BTNC, jax.random.normal(rng_eps, z_BTNC.shape), t_B1.repeat(T, 1))

    def step(state, x_BNC):
        x_B1NC = x_BNC[:, None]
        made_B1NC, _ = noise.split(predict(x_B1NC, t_B1, state)[0], x_B1NC, t_B1, prediction)
        _, state = predict(made_B1NC, jnp.zeros_like(t_B1), state)
        return state, made_B1NC[:, 0]

    _, made_TBNC = jax.lax.scan(step, state, x_BTNC.swapaxes(0, 1))
    return jax.lax.stop_gradient(made_TBNC.swapaxes(0, 1))

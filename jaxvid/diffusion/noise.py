"""Noise schedules: x_t = alpha_t x0 + sigma_t eps, with one integer timestep per frame.

Timesteps are int32 in 0..S-1, and larger is noisier. A schedule adds noise, gives the target of a
network, converts a prediction to (x0, eps), takes one DDIM step and weighs the loss.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks

PREDICTIONS = ("x0", "eps", "v")
WEIGHTS = ("uniform", "x0", "v", "ramp", "min_snr", "fused_snr")
MAX_STEPS = 10**6  # noise levels
FUSED_SNR_DECAY = 0.96  # per frame, of the SNR that earlier frames add


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The tables alpha_S and sigma_S, float32 [num_steps].

    Compared and hashed by name and options, so a schedule can be static under jit. Every method
    takes int timesteps `t` of any leading shape (`t_BT` for one per frame) and broadcasts them over
    the trailing axes of its array arguments.
    """

    name: str
    num_steps: int
    shift: float
    zero_terminal_snr: bool
    alpha_S: np.ndarray = dataclasses.field(compare=False, repr=False)
    sigma_S: np.ndarray = dataclasses.field(compare=False, repr=False)

    @property
    def is_flow(self) -> bool:
        return self.name == "flow"

    @property
    def ends_in_pure_noise(self) -> bool:
        return bool(self.alpha_S[-1] == 0)

    def check(self, prediction: str, weight: str = "uniform") -> None:
        """Raise UserError for a prediction or a kind of `weight` that this schedule cannot have."""
        checks.choose("prediction", prediction, PREDICTIONS)
        remedy = f"undefined where the schedule {self.name!r} is pure noise; use v or x0"
        has_x0 = prediction != "eps" or not self.ends_in_pure_noise
        checks.require(has_x0, "prediction", prediction, remedy)
        checks.choose("weight", weight, WEIGHTS)

    def add_noise(self, x0: jax.Array, eps: jax.Array, t) -> jax.Array:
        """x_t = alpha_t x0 + sigma_t eps."""
        return _at(self.alpha_S, t, x0) * x0 + _at(self.sigma_S, t, x0) * eps

    def target(self, x0: jax.Array, eps: jax.Array, t, prediction: str) -> jax.Array:
        """The target of a network with this prediction at x_t. Raises UserError as `split` does."""
        self.check(prediction)
        if prediction == "x0":
            return x0
        if prediction == "eps":
            return eps
        if self.is_flow:
            return eps - x0
        return _at(self.alpha_S, t, x0) * eps - _at(self.sigma_S, t, x0) * x0

    def split(
        self, pred: jax.Array, x_t: jax.Array, t, prediction: str
    ) -> tuple[jax.Array, jax.Array]:
        """(x0, eps) of a prediction made at x_t.

        v is alpha eps - sigma x0 (Salimans & Ho 2022), on the flow schedule the velocity eps - x0.
        Raises UserError for an unknown prediction, and for eps where the last step is pure noise.
        """
        self.check(prediction)
        alpha, sigma = _at(self.alpha_S, t, x_t), _at(self.sigma_S, t, x_t)
        if prediction == "x0":
            # Without noise (flow, t = 0) eps is undefined; any finite number will do.
            return pred, (x_t - alpha * pred) / jnp.where(sigma > 0, sigma, 1)
        if prediction == "eps":
            return (x_t - sigma * pred) / alpha, pred
        if self.is_flow:
            return x_t - sigma * pred, x_t + alpha * pred
        return alpha * x_t - sigma * pred, sigma * x_t + alpha * pred

    def step(
        self, x0: jax.Array, eps: jax.Array, t_from, t_to, eta: float = 0.0, noise=None
    ) -> jax.Array:
        """x at t_to <= t_from by DDIM (Song et al. 2021, eq. 12); eta = 1 is ancestral sampling.

        On the flow schedule with eta = 0 this is Euler: x + (sigma_to - sigma_from) (eps - x0).
        `noise` is standard normal, shaped like x0, and required when eta > 0. Raises UserError for
        an eta outside 0..1.
        """
        checks.between("eta", eta, 0, 1)
        if eta:
            # fresh = eta sqrt(1 - SNR_from / SNR_to) is the share of new noise.
            drop = jnp.expm1(self.log_snr(t_from) - self.log_snr(t_to))
            fresh = eta * jnp.sqrt(jnp.where(jnp.asarray(t_from) > t_to, -drop, 0))
            fresh = _trailing(fresh, eps)
            eps = jnp.sqrt(1 - fresh**2) * eps + fresh * noise
        return self.add_noise(x0, eps, t_to)

    def weight(self, t_BT, kind: str, prediction: str, snr_clip: float = 5.0) -> jax.Array:
        """Loss weight of each frame, float32, shape of t_BT: frames on the last axis.

        uniform: 1. x0 and v: the loss becomes the squared error of x0 or v, for every prediction;
        where the SNR exceeds snr_clip, v weighs the error of x0 as at snr_clip. ramp: x0 times
        0.1 + 0.9 alpha_t (Dreamer 4, Hafner et al. 2025, with noise 1 - alpha_t). min_snr:
        min(SNR, snr_clip) times the squared error of x0 (Hang et al. 2023, who clip at 5).
        fused_snr: min_snr with the SNR of a frame and of the frames before it (Diffusion Forcing,
        Chen et al. 2024); frame f depends on frames <= f only. Raises UserError for an unknown
        kind (the field `weight`), and as `split` does.
        """
        self.check(prediction, kind)
        if kind == "uniform":
            return jnp.ones(t_BT.shape, jnp.float32)
        if kind in ("x0", "ramp"):
            alpha, sigma = jnp.take(self.alpha_S, t_BT), jnp.take(self.sigma_S, t_BT)
            of_x0 = {"x0": jnp.ones_like(sigma), "v": sigma**2, "eps": (sigma / alpha) ** 2}
            return of_x0[prediction] * (0.1 + 0.9 * alpha if kind == "ramp" else 1.0)
        snr = jnp.exp(self.log_snr(t_BT)) / snr_clip
        clipped = jnp.minimum(snr, 1.0)
        if kind == "v":
            clipped = self._inverse_variance(snr_clip * clipped) / snr_clip
        elif kind == "fused_snr":
            known = FUSED_SNR_DECAY * _past_snr(clipped)
            snr, clipped = known + (1 - known) * snr, known + (1 - known) * clipped
        if prediction == "x0":
            return snr_clip * clipped
        if prediction == "eps":
            return clipped / snr
        # |v error|^2 = |x0 error|^2 / sigma^2, for both definitions of v.
        return snr_clip * clipped / self._inverse_variance(snr_clip * snr)

    def log_snr(self, t) -> jax.Array:
        """log(alpha_t^2 / sigma_t^2), float32; infinite without noise or without signal."""
        with np.errstate(divide="ignore"):
            table_S = 2 * (np.log(self.alpha_S) - np.log(self.sigma_S))
        return jnp.take(table_S, t)

    def levels(self, sample_steps: int) -> np.ndarray:
        """Timestep of a frame at each step index, int32 [sample_steps + 1], falling to 0.

        Step n goes from levels[n] to levels[n + 1]; a finished frame has levels[-1]. Sampling
        starts at the last timestep if that is pure noise (Lin et al. 2023).
        Raises UserError unless 1 <= sample_steps < num_steps.
        """
        checks.between("sample_steps", sample_steps, 1, self.num_steps - 1)
        if self.ends_in_pure_noise:
            grid = np.linspace(self.num_steps - 1, 0, sample_steps + 1).round()
        else:
            grid = np.append(np.arange(sample_steps)[::-1] * self.num_steps // sample_steps + 1, 0)
        return grid.astype(np.int32)

    def _inverse_variance(self, snr):
        """1 / sigma^2."""
        return jnp.square(1 + jnp.sqrt(snr)) if self.is_flow else 1 + snr


def make_noise_schedule(
    name: str, num_steps: int = 1000, shift: float = 1.0, zero_terminal_snr: bool = False
) -> NoiseSchedule:
    """The NoiseSchedule called `name`.

    linear           beta in the latent-diffusion scaled-linear form, 1e-4 .. 2e-2 (AR-Diffusion)
    linear_baseline  the same, 8.5e-4 .. 1.2e-2 (its baselines, Stable Diffusion)
    cosine           Nichol & Dhariwal 2021, eq. 17
    sigmoid          Jabri et al. 2022, from -3 to 3 (Diffusion Forcing)
    flow             sigma = shift u / (1 + (shift - 1) u), u = t / (S - 1), alpha = 1 - sigma

    `zero_terminal_snr` rescales the first four so that the last step is pure noise
    (Lin et al. 2023, algorithm 1); flow always ends in pure noise.
    Raises UserError for an unknown name, fewer than 2 steps, and a shift of another schedule than
    flow.
    """
    checks.at_least("num_steps", num_steps, 2, at_most=MAX_STEPS)
    checks.choose("name", name, (*_SIGNAL_POWER, "flow"))
    if name == "flow":
        checks.positive("shift", shift)
        u_S = np.arange(num_steps) / (num_steps - 1)
        sigma_S = shift * u_S / (1 + (shift - 1) * u_S)
        alpha_S = 1 - sigma_S
    else:
        checks.require(shift == 1, "shift", shift, "only name='flow' has a shift; use 1")
        alpha_S = np.sqrt(_SIGNAL_POWER[name](num_steps))
        if zero_terminal_snr:
            alpha_S = (alpha_S - alpha_S[-1]) * alpha_S[0] / (alpha_S[0] - alpha_S[-1])
        sigma_S = np.sqrt(1 - alpha_S**2)
    tables = alpha_S.astype(np.float32), sigma_S.astype(np.float32)
    return NoiseSchedule(name, num_steps, float(shift), zero_terminal_snr, *tables)


def _scaled_linear(first, last):
    """alpha^2 of beta = linspace(sqrt(first), sqrt(last), 1000)^2.

    Another number of steps samples the same curve, so it ends in the same noise.
    """

    def signal_power(num_steps):
        beta = np.linspace(first**0.5, last**0.5, 1000) ** 2
        log_power = np.append(0, np.cumsum(np.log1p(-beta)))
        ends_S = np.arange(1, num_steps + 1) / num_steps
        return np.exp(np.interp(ends_S, np.arange(1001) / 1000, log_power))

    return signal_power


def _cosine(num_steps):
    u = np.arange(num_steps + 1) / num_steps
    return _clip_beta(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)


def _sigmoid(num_steps, start=-3.0, end=3.0):
    u = np.arange(num_steps + 1) / num_steps
    logistic = 1 / (1 + np.exp(-(start + u * (end - start))))
    return _clip_beta(logistic[-1] - logistic)


def _clip_beta(power):
    """alpha^2 of S steps from S + 1 unnormalised values; a step loses at most 99.9 %."""
    beta = 1 - power[1:] / power[:-1]
    return np.cumprod(1 - np.clip(beta, 0, 0.999))


_SIGNAL_POWER = {
    "linear": _scaled_linear(1e-4, 2e-2),
    "linear_baseline": _scaled_linear(8.5e-4, 1.2e-2),
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def _at(table_S, t, like):
    return _trailing(jnp.take(table_S, t), like)


def _trailing(x, like):
    return jnp.expand_dims(x, tuple(range(x.ndim, like.ndim)))


def _past_snr(snr):
    """m_{f-1} of m_0 = s_0, m_f = d m_{f-1} + (1 - d) s_f along the last axis; m_{-1} = 0."""
    frames = snr.shape[-1]
    age = np.arange(frames)[:, None] - np.arange(frames) - 1
    kernel = np.where(age >= 0, FUSED_SNR_DECAY ** np.maximum(age, 0), 0)
    kernel[:, 1:] *= 1 - FUSED_SNR_DECAY
    return jnp.matmul(snr, kernel.T.astype(np.float32), precision=jax.lax.Precision.HIGHEST)

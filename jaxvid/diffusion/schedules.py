"""Noise schedules: x_t = alpha_t x0 + sigma_t eps, with one integer timestep per frame.

Timesteps are int32 in 0..T-1 and larger is noisier. A schedule knows how to noise, what a network
is asked to predict, how to read (x0, eps) back from a prediction, and how to take one DDIM step.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import UserError

PREDICTIONS = ("x0", "eps", "v")
WEIGHTS = ("uniform", "x0", "min_snr", "fused_snr")
FUSED_SNR_DECAY = 0.96


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """Tables alpha_T, sigma_T float32 [num_steps]; compared and hashed by name and options, so that
    it can be static under jit.

    Every method takes int timesteps `t` of any leading shape (`t_BT` for one per frame) and
    broadcasts them over the trailing axes of the arrays beside it.
    """

    name: str
    num_steps: int
    shift: float
    zero_terminal_snr: bool
    alpha_T: np.ndarray = dataclasses.field(compare=False, repr=False)
    sigma_T: np.ndarray = dataclasses.field(compare=False, repr=False)

    @property
    def is_flow(self):
        return self.name == "flow"

    @property
    def ends_in_pure_noise(self):
        return bool(self.alpha_T[-1] == 0)

    def add_noise(self, x0, eps, t):
        """x_t = alpha_t x0 + sigma_t eps."""
        return _at(self.alpha_T, t, x0) * x0 + _at(self.sigma_T, t, x0) * eps

    def target(self, x0, eps, t, prediction):
        """What a network of this prediction should output at x_t. Raises UserError, see `split`."""
        self._check_prediction(prediction)
        if prediction == "x0":
            return x0
        if prediction == "eps":
            return eps
        if self.is_flow:
            return eps - x0
        return _at(self.alpha_T, t, x0) * eps - _at(self.sigma_T, t, x0) * x0

    def split(self, pred, x_t, t, prediction):
        """(x0, eps) of a prediction made at x_t. v is alpha eps - sigma x0 (Salimans & Ho 2022), or
        the velocity eps - x0 on the flow schedule.

        Raises UserError for an unknown prediction, and for eps where the last step is pure noise.
        """
        self._check_prediction(prediction)
        alpha, sigma = _at(self.alpha_T, t, x_t), _at(self.sigma_T, t, x_t)
        if prediction == "x0":
            # Where nothing is noise (flow, t = 0) eps is unknowable, and stays finite.
            return pred, (x_t - alpha * pred) / jnp.where(sigma > 0, sigma, 1)
        if prediction == "eps":
            return (x_t - sigma * pred) / alpha, pred
        if self.is_flow:
            return x_t - sigma * pred, x_t + alpha * pred
        return alpha * x_t - sigma * pred, sigma * x_t + alpha * pred

    def step(self, x0, eps, t_from, t_to, eta=0.0, noise=None):
        """x at t_to <= t_from by DDIM (Song et al. 2021, eq. 12); eta = 1 is ancestral sampling.

        On the flow schedule with eta = 0 this is Euler: x + (sigma_to - sigma_from) (eps - x0).
        `noise` is standard normal, shaped like x0, and needed when eta > 0. Raises UserError for an
        eta outside 0..1.
        """
        if not 0 <= eta <= 1:
            raise UserError(f"eta={eta}: a share of fresh noise; use 0 (DDIM) to 1 (ancestral)")
        if eta:
            # fresh = eta sqrt(1 - SNR_from / SNR_to) is the share of the noise drawn anew.
            drop = jnp.expm1(self.log_snr(t_from) - self.log_snr(t_to))
            fresh = eta * jnp.sqrt(jnp.where(jnp.asarray(t_from) > t_to, -drop, 0))
            fresh = _trailing(fresh, eps)
            eps = jnp.sqrt(1 - fresh**2) * eps + fresh * noise
        return self.add_noise(x0, eps, t_to)

    def weight(self, t_BT, kind, prediction, snr_clip=5.0):
        """Loss weight of each frame, float32, shape of t_BT: frames on the last axis.

        x0: the squared error of x0, whatever is predicted; min_snr: min(SNR, snr_clip) times that
        (Hang et al. 2023, who clip at 5); both are restated for the prediction.
        fused_snr: the same with what the frames before already reveal (Diffusion Forcing,
        Chen et al. 2024); frame f depends on frames <= f only.
        """
        self._check_prediction(prediction)
        if kind not in WEIGHTS:
            raise UserError(
                f"weight={kind!r}: unknown loss weight; use one of {', '.join(WEIGHTS)}"
            )
        if kind == "uniform":
            return jnp.ones(t_BT.shape, jnp.float32)
        if kind == "x0":
            alpha, sigma = jnp.take(self.alpha_T, t_BT), jnp.take(self.sigma_T, t_BT)
            return {"x0": jnp.ones_like(sigma), "v": sigma**2, "eps": (sigma / alpha) ** 2}[
                prediction
            ]
        snr = jnp.exp(self.log_snr(t_BT)) / snr_clip
        clipped = jnp.minimum(snr, 1.0)
        if kind == "fused_snr":
            known = FUSED_SNR_DECAY * _snr_of_past(clipped)
            snr, clipped = known + (1 - known) * snr, known + (1 - known) * clipped
        if prediction == "x0":
            return snr_clip * clipped
        if prediction == "eps":
            return clipped / snr
        # |v error|^2 = |x0 error|^2 / sigma^2, for both meanings of v.
        root = jnp.sqrt(snr_clip * snr)
        inverse_sigma = 1 + root if self.is_flow else jnp.sqrt(1 + root**2)
        return snr_clip * clipped / inverse_sigma**2

    def log_snr(self, t):
        """log(alpha_t^2 / sigma_t^2), float32; infinite where there is no noise or no signal."""
        with np.errstate(divide="ignore"):
            table_T = 2 * (np.log(self.alpha_T) - np.log(self.sigma_T))
        return jnp.take(table_T, t)

    def levels(self, sample_steps):
        """Timestep told to a frame at each step index, int32 [sample_steps + 1], falling to 0.

        Step n -> n + 1 goes from levels[n] to levels[n + 1]; a finished frame is told levels[-1].
        A schedule that ends in pure noise is walked from its last timestep (Lin et al. 2023).
        Raises UserError unless 1 <= sample_steps < num_steps.
        """
        if not 1 <= sample_steps < self.num_steps:
            raise UserError(
                f"sample_steps={sample_steps}: there are {self.num_steps} noise levels; "
                f"use 1 to {self.num_steps - 1}"
            )
        if self.ends_in_pure_noise:
            grid = np.linspace(self.num_steps - 1, 0, sample_steps + 1).round()
        else:
            grid = np.append(np.arange(sample_steps)[::-1] * self.num_steps // sample_steps + 1, 0)
        return grid.astype(np.int32)

    def _check_prediction(self, prediction):
        if prediction not in PREDICTIONS:
            raise UserError(
                f"prediction={prediction!r}: unknown; use one of {', '.join(PREDICTIONS)}"
            )
        if prediction == "eps" and self.ends_in_pure_noise:
            raise UserError(
                f"prediction='eps': says nothing of x0 where the schedule {self.name!r} is pure "
                "noise; use v or x0"
            )


def make(name, num_steps=1000, shift=1.0, zero_terminal_snr=False):
    """The NoiseSchedule called `name`.

    linear           beta in the latent-diffusion scaled-linear form, 1e-4 .. 2e-2 (AR-Diffusion)
    linear_baseline  the same, 8.5e-4 .. 1.2e-2 (its baselines, Stable Diffusion)
    cosine           Nichol & Dhariwal 2021, eq. 17
    sigmoid          Jabri et al. 2022, from -3 to 3 (Diffusion Forcing)
    flow             sigma = shift u / (1 + (shift - 1) u), u = t / (T - 1), alpha = 1 - sigma

    `zero_terminal_snr` rescales the first four so that the last step is pure noise
    (Lin et al. 2023, algorithm 1); flow ends there by itself.
    Raises UserError for an unknown name and for options that the schedule does not have.
    """
    if num_steps < 2:
        raise UserError(f"num_steps={num_steps}: a schedule needs 2 noise levels; use 1000")
    if name == "flow":
        if not shift > 0:
            raise UserError(f"shift={shift}: must be positive; use 1 for none")
        u_T = np.arange(num_steps) / (num_steps - 1)
        sigma_T = shift * u_T / (1 + (shift - 1) * u_T)
        alpha_T = 1 - sigma_T
    elif name in _SIGNAL_POWER:
        if shift != 1:
            raise UserError(f"shift={shift}: only name='flow' can shift; use 1")
        alpha_T = np.sqrt(_SIGNAL_POWER[name](num_steps))
        if zero_terminal_snr:
            alpha_T = (alpha_T - alpha_T[-1]) * alpha_T[0] / (alpha_T[0] - alpha_T[-1])
        sigma_T = np.sqrt(1 - alpha_T**2)
    else:
        names = ", ".join([*_SIGNAL_POWER, "flow"])
        raise UserError(f"name={name!r}: unknown noise schedule; use one of {names}")
    tables = alpha_T.astype(np.float32), sigma_T.astype(np.float32)
    return NoiseSchedule(name, num_steps, float(shift), zero_terminal_snr, *tables)


def _scaled_linear(first, last):
    """alpha^2 of beta = linspace(sqrt(first), sqrt(last), 1000)^2. Another number of steps walks
    the same curve in other strides, so that it ends in the same noise."""

    def signal_power(num_steps):
        beta = np.linspace(first**0.5, last**0.5, 1000) ** 2
        log_power = np.append(0, np.cumsum(np.log1p(-beta)))
        ends_T = np.arange(1, num_steps + 1) / num_steps
        return np.exp(np.interp(ends_T, np.arange(1001) / 1000, log_power))

    return signal_power


def _cosine(num_steps):
    u = np.arange(num_steps + 1) / num_steps
    return _clip_beta(np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)


def _sigmoid(num_steps, start=-3.0, end=3.0):
    u = np.arange(num_steps + 1) / num_steps
    logistic = 1 / (1 + np.exp(-(start + u * (end - start))))
    return _clip_beta(logistic[-1] - logistic)


def _clip_beta(power):
    """alpha^2 of T steps from T + 1 unnormalised values, each step losing at most 99.9 %."""
    beta = 1 - power[1:] / power[:-1]
    return np.cumprod(1 - np.clip(beta, 0, 0.999))


_SIGNAL_POWER = {
    "linear": _scaled_linear(1e-4, 2e-2),
    "linear_baseline": _scaled_linear(8.5e-4, 1.2e-2),
    "cosine": _cosine,
    "sigmoid": _sigmoid,
}


def _at(table_T, t, like):
    return _trailing(jnp.take(table_T, t), like)


def _trailing(x, like):
    return jnp.expand_dims(x, tuple(range(x.ndim, like.ndim)))


def _snr_of_past(snr):
    """m_{f-1} of m_0 = s_0, m_f = d m_{f-1} + (1 - d) s_f along the last axis; 0 before frame 0."""
    frames = snr.shape[-1]
    age = np.arange(frames)[:, None] - np.arange(frames) - 1
    kernel = np.where(age >= 0, FUSED_SNR_DECAY ** np.maximum(age, 0), 0)
    kernel[:, 1:] *= 1 - FUSED_SNR_DECAY
    return jnp.matmul(snr, kernel.T.astype(np.float32), precision=jax.lax.Precision.HIGHEST)

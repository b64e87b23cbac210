"""Gaussian latents: no codes, but a mean and a variance."""

import dataclasses

import jax
import jax.numpy as jnp

from jaxvid import checks
from jaxvid.layers.quantize.base import MAX_CHANNELS, Quantizer, mean


@dataclasses.dataclass(frozen=True)
class KL(Quantizer):
    """Gaussian latents (Kingma and Welling 2014), without codes.

    z [B, ..., 2 channels] = (mean, log variance clipped to [-30, 20]). z_q is drawn with `rng`, and
    is the mean without it. loss = weight KL, where `kl` is in nats per sample: summed over all
    tokens and channels of a sample and averaged over the B samples of the first axis, which suits
    the usual weight of 1e-6 (Rombach et al. 2022, Wang et al. 2024).
    """

    channels: int = 16
    weight: float = 1e-6

    def __post_init__(self):
        checks.at_least("channels", self.channels, 1, at_most=MAX_CHANNELS)
        checks.at_least("weight", self.weight, 0)

    @property
    def features(self) -> int:
        return 2 * self.channels

    def __call__(self, z, codebook=None, rng=None):
        del codebook
        self._check_features(z)
        mu, logvar = jnp.split(z.astype(jnp.float32), 2, axis=-1)
        logvar = jnp.clip(logvar, -30.0, 20.0)
        std = jnp.exp(logvar / 2)
        kl = (jnp.square(mu) + jnp.exp(logvar) - 1 - logvar).sum() / 2 / max(len(z), 1)
        z_q = mu if rng is None else mu + std * jax.random.normal(rng, mu.shape)
        return z_q, None, {"loss": self.weight * kl, "kl": kl, "std": mean(std)}

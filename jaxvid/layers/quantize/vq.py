"""Vector quantization with a learned codebook."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from jaxvid import checks
from jaxvid.layers.quantize.base import (
    HIGHEST,
    MAX_CHANNELS,
    Quantizer,
    dot,
    mse,
    straight_through,
    unit,
    usage,
)


def rotation(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """Exactly `z_q`, with the gradient of rotating and scaling z onto it (Fifty et al. 2024).

    z_q = |z_q| / |z| R z, where R is the product of two reflections that takes z / |z| to
    z_q / |z_q|, held constant. A token shorter than a thousandth of its code gets the gradient of
    `straight_through`: it has no direction, and the scale would make its gradient huge.
    """
    z_fixed, z_q = jax.lax.stop_gradient((z, z_q))
    u, q = unit(z_fixed), unit(z_q)
    w = unit(u + q)
    norm_z, norm_q = (jnp.sqrt(dot(x, x)) for x in (z_fixed, z_q))
    is_rotated = norm_z > 1e-3 * norm_q
    scale = norm_q / jnp.where(is_rotated, norm_z, 1.0)
    rotated = z - 2 * w * dot(w, z) + 2 * q * dot(u, z)
    return straight_through(jnp.where(is_rotated, scale * rotated, z), z_q)


ESTIMATORS = {"straight_through": straight_through, "rotation": rotation}


@dataclasses.dataclass(frozen=True)
class VQ(Quantizer):
    """The nearest of `codes` learned vectors (van den Oord et al. 2017).

    loss = commitment mean (z - sg(e))^2, plus mean (sg(z) - e)^2 for codes trained by gradient.

    channels: Z, low-dimensional (ViT-VQGAN, Yu et al. 2021). ema: decay of the running means that
    the codes follow; 0 trains the codes by gradient. normalize: tokens and codes have unit length
    (also ViT-VQGAN). restart: a code whose running mean of tokens per batch is lower than this
    becomes a random token; 0 never restarts. kmeans: k-means iterations on the first batch, the
    start of the codes; 0 starts from random codes. estimator: of the gradient, "straight_through"
    or "rotation". UserError for restart or kmeans without `ema`.
    """

    codes: int = 8192
    channels: int = 8
    ema: float = 0.99
    commitment: float = 0.25
    normalize: bool = True
    restart: float = 0.0
    kmeans: int = 0
    estimator: str = "straight_through"

    def __post_init__(self):
        checks.at_least("codes", self.codes, 2, at_most=2**24)
        checks.at_least("channels", self.channels, 1, at_most=MAX_CHANNELS)
        checks.at_least("commitment", self.commitment, 0)
        checks.below("ema", self.ema, 0, 1)
        checks.choose("estimator", self.estimator, ESTIMATORS)
        for name, most in (("restart", math.inf), ("kmeans", 1000)):
            value = getattr(self, name)
            checks.at_least(name, value, 0, at_most=most)
            remedy = f"needs codes that follow running means; use {name}=0 or ema=0.99"
            checks.require(not value or self.ema, name, value, remedy)

    @property
    def features(self) -> int:
        return self.channels

    @property
    def size(self) -> int:
        return self.codes

    def init(self, rng):
        """code_VZ is trained; or carried, with its running means count_V and sum_VZ."""
        code_VZ = self._project(jax.random.normal(rng, (self.codes, self.channels)))
        if not self.ema:
            return {"code_VZ": code_VZ}, {}
        return {}, {
            "code_VZ": code_VZ,
            "count_V": jnp.ones(self.codes),
            "sum_VZ": code_VZ,
            "updates": jnp.zeros((), jnp.int32),
        }

    def __call__(self, z, codebook=None, rng=None):
        del rng
        self._check_features(z)
        z = self._project(z)
        ids = self._nearest(z, codebook["code_VZ"])
        z_q = self._codes(ids, codebook)
        loss = self.commitment * mse(z, jax.lax.stop_gradient(z_q))
        if not self.ema:
            loss += mse(jax.lax.stop_gradient(z), z_q)
        return ESTIMATORS[self.estimator](z, z_q), ids, {"loss": loss, **usage(ids, self.size)}

    def _codes(self, ids, codebook):
        return self._project(jnp.take(codebook["code_VZ"], ids, axis=0))

    def update(self, codebook, z, ids, rng):
        """See `Quantizer`.

        n <- ema n + (1 - ema) count, s <- ema s + (1 - ema) sum z, code = s / n with n smoothed by
        Laplace (van den Oord et al. 2017, appendix A.1).
        """
        if not self.ema:
            return {}
        if not ids.size:
            return {name: codebook[name] for name in ("code_VZ", "count_V", "sum_VZ", "updates")}
        rng_kmeans, rng_restart = jax.random.split(rng)
        z_LZ = jax.lax.stop_gradient(self._project(z)).reshape(-1, self.channels)
        means = self._running_means(codebook, z_LZ, ids.reshape(-1))
        if self.kmeans:
            means = jax.lax.cond(
                codebook["updates"] == 0, lambda: self._k_means(z_LZ, rng_kmeans), lambda: means
            )
        if self.restart:
            means = self._restart(means, z_LZ, rng_restart)
        return {**means, "updates": codebook["updates"] + 1}

    def _running_means(self, codebook, z_LZ, ids_L):
        count_V, sum_VZ = self._sum_by_code(z_LZ, ids_L)
        count_V = self.ema * codebook["count_V"] + (1 - self.ema) * count_V
        sum_VZ = self.ema * codebook["sum_VZ"] + (1 - self.ema) * sum_VZ
        total = count_V.sum()
        smoothed_V = (count_V + 1e-5) / (total + self.codes * 1e-5) * total
        return {
            "code_VZ": self._project(sum_VZ / smoothed_V[:, None]),
            "count_V": count_V,
            "sum_VZ": sum_VZ,
        }

    def _k_means(self, z_LZ, rng):
        """Lloyd's iterations from random tokens; a centre without tokens does not move."""

        def iterate(_, code_VZ):
            count_V, sum_VZ = self._sum_by_code(z_LZ, self._nearest(z_LZ, code_VZ))
            mean_VZ = self._project(sum_VZ / jnp.maximum(count_V, 1)[:, None])
            return jnp.where(count_V[:, None] > 0, mean_VZ, code_VZ)

        code_VZ = jax.lax.fori_loop(0, self.kmeans, iterate, _random_tokens(z_LZ, self.codes, rng))
        count_V, _ = self._sum_by_code(z_LZ, self._nearest(z_LZ, code_VZ))
        count_V = jnp.maximum(count_V, 1)
        return {
            "code_VZ": code_VZ,
            "count_V": count_V,
            "sum_VZ": code_VZ * count_V[:, None],
        }

    def _restart(self, means, z_LZ, rng):
        token_VZ = _random_tokens(z_LZ, self.codes, rng)
        dead_V = means["count_V"] < self.restart
        dead_V1 = dead_V[:, None]
        return {
            "code_VZ": jnp.where(dead_V1, token_VZ, means["code_VZ"]),
            "count_V": jnp.where(dead_V, self.restart, means["count_V"]),
            "sum_VZ": jnp.where(dead_V1, self.restart * token_VZ, means["sum_VZ"]),
        }

    def _project(self, z):
        """Tokens or codes in float32, on the unit sphere if `normalize`."""
        z = z.astype(jnp.float32)
        return unit(z) if self.normalize else z

    def _nearest(self, z, code_VZ):
        """argmin |z - e|^2 = argmax z e - |e|^2 / 2."""
        score = jnp.matmul(z, code_VZ.T, precision=HIGHEST) - jnp.square(code_VZ).sum(1) / 2
        score = jax.lax.stop_gradient(score)
        return jax.lax.platform_dependent(score, cpu=_argmax_cpu, default=_argmax)

    def _sum_by_code(self, z_LZ, ids_L):
        """(number of tokens, sum of tokens) of each code."""
        ones_L = jnp.ones(ids_L.shape)
        return tuple(jax.ops.segment_sum(x, ids_L, self.codes) for x in (ones_L, z_LZ))


def _argmax(x):
    """Index of the first maximum along the last axis, int32."""
    return jnp.argmax(x, axis=-1).astype(jnp.int32)


def _argmax_cpu(x):
    """`_argmax` as two reductions, which XLA on CPU vectorizes; it does not vectorize argmax."""
    index = jnp.arange(x.shape[-1], dtype=jnp.int32)
    is_maximum = x == x.max(axis=-1, keepdims=True)
    return jnp.where(is_maximum, index, x.shape[-1] - 1).min(axis=-1)


def _random_tokens(z_LZ, number, rng):
    """`number` random tokens, the same on every device."""
    return z_LZ[jax.random.randint(rng, (number,), 0, len(z_LZ))]

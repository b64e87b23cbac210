"""The protocol of quantizers, and what several of them share."""

from typing import Any

import jax
import jax.numpy as jnp

from jaxvid import checks

HIGHEST = jax.lax.Precision.HIGHEST  # products in bfloat16 would flip ids


MAX_CHANNELS = 2**16  # of a latent


class Quantizer:
    """A quantizer, with defaults for one that has neither a codebook nor codes.

    features: channels of the encoder's output z. channels: of the latents z_q. size: of the
    vocabulary, 0 without codes.

    Quantizers are static and hashable. Only `VQ` has a codebook, and it is an argument: a tree of
    arrays in two parts, `trained` by gradient and `carried` in the training state.
    """

    features: int
    channels: int
    size: int = 0

    def __call__(
        self, z: jax.Array, codebook: Any = None, rng: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array | None, dict[str, jax.Array]]:
        """z [..., features] of any float dtype -> (z_q, ids, aux).

        z_q: [..., channels] float32; gradients pass through it to z. ids: [...] int32 in [0, size),
        None without codes. aux: float32 scalars, among them `loss`, a term of the training loss,
        and those of `usage` if there are codes. codebook: trained and carried parts together.
        rng: for latents drawn from a distribution; None gives their mean. Without tokens, as in a
        piece of a stream without frames, aux is 0, except `dead`. Raises UserError for another
        number of channels than `features`.
        """
        raise NotImplementedError

    def init(self, rng: jax.Array) -> tuple[dict, dict]:
        """(trained, carried) parts of the codebook."""
        del rng
        return {}, {}

    def update(self, codebook: Any, z: jax.Array, ids: jax.Array, rng: jax.Array) -> dict:
        """The carried part after a batch of z and its ids.

        All reductions over tokens span the global batch under jit, so every device computes the
        same. Without tokens it is unchanged.
        """
        del codebook, z, ids, rng
        return {}

    def lookup(self, ids: jax.Array, codebook: Any = None) -> jax.Array:
        """ids [...] of any int dtype -> z_q [..., channels] float32.

        UserError for ids outside [0, size); where they are not known, as under jit, such an id
        gives NaN. TypeError without codes.
        """
        if not self.size:
            raise TypeError(f"{type(self).__name__} has no codes")
        dtype, last = ids.dtype, self.size - 1
        remedy = "must be whole numbers; use the ids that the quantizer gave"
        checks.require(jnp.issubdtype(dtype, jnp.integer), "ids.dtype", str(dtype), remedy)
        if ids.size and not isinstance(ids, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                for extreme in (ids.min(), ids.max()):
                    checks.between("ids", int(extreme), 0, last)
        ids = jnp.asarray(ids).astype(jnp.int32)
        is_code = (ids >= 0) & (ids <= last)
        return jnp.where(is_code[..., None], self._codes(ids, codebook), jnp.nan)

    def _codes(self, ids: jax.Array, codebook: Any) -> jax.Array:
        """`lookup` of int32 ids in [0, size)."""
        raise NotImplementedError

    def _check_features(self, z):
        remedy = f"z must have the features={self.features} of the quantizer on its last axis"
        checks.require(z.shape[-1] == self.features, "z.shape", list(z.shape), remedy)


def usage(ids: jax.Array, size: int) -> dict[str, jax.Array]:
    """Perplexity exp(H) of ids, share of the `size` codes in use, number of the unused (`dead`).

    By sorting, so no array is as long as the vocabulary. Without ids no code is in use, and the
    perplexity is 0.
    """
    if not ids.size:
        unused = jnp.float32(size)
        return {"perplexity": jnp.zeros(()), "usage": jnp.zeros(()), "dead": unused}
    ids = jnp.sort(ids.reshape(-1))
    last, first = (jnp.searchsorted(ids, ids, side=side) for side in ("right", "left"))
    perplexity = jnp.exp(-jnp.log((last - first) / ids.size).mean())
    used = 1.0 + (ids[1:] != ids[:-1]).sum()
    size = float(size)  # may be 2^31, one more than the largest int32
    return {"perplexity": perplexity, "usage": used / size, "dead": size - used}


def straight_through(z: jax.Array, z_q: jax.Array) -> jax.Array:
    """Exactly `z_q`, with the gradient of `z` (Bengio et al. 2013)."""
    return jax.lax.stop_gradient(z_q) + (z - jax.lax.stop_gradient(z))


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """Dot products along the last axis, which stays with length 1."""
    return (a * b).sum(-1, keepdims=True)


def unit(x: jax.Array) -> jax.Array:
    """x / |x| along the last axis, with a finite gradient at zero."""
    return x * jax.lax.rsqrt(jnp.maximum(dot(x, x), 1e-24))


def mse(a: jax.Array, b: jax.Array) -> jax.Array:
    """Mean squared error, float32 []; 0 without elements."""
    return mean(jnp.square(a - b))


def mean(x: jax.Array) -> jax.Array:
    """The mean of all elements, float32 []; 0 if there are none."""
    return x.mean() if x.size else jnp.zeros(())

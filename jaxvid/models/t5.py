"""The text encoder of T5 1.1 (Raffel et al. 2020), for published weights (`jaxvid.encoding.t5`)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.layers.bias import MASKED, attend
from jaxvid.layers.linear import Linear

FARTHEST = 128  # distance from which on all share a bucket
EPSILON = 1e-6


class T5Encoder(nn.Module):
    """A `models.text.TextEncoder`: ids_BM of a vocabulary of T5, 0 = padding -> x_BMD float32.

    Pre-norm layers of attention among all positions and a gated MLP with tanh GELU, without biases
    (Shazeer 2020). Scores are not scaled. One table of biases by bucket of distance serves all
    layers. head_width: of a head; heads * head_width need not be `width`. hidden: of the MLP.
    buckets: rows of the table, half for each direction.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    head_width: int
    hidden: int
    buckets: int = 32
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BM):
        embed = nn.Embed(self.vocabulary, self.width, name="embed")
        x_BMD = embed(ids_BM.astype(jnp.int32)).astype(self.dtype)
        valid_BM = ids_BM > 0
        init = nn.initializers.normal(0.1)
        table_RA = self.param("bias", init, (self.buckets, self.heads))
        bias_AMM = table_RA[buckets(ids_BM.shape[1], self.buckets)].transpose(2, 0, 1)
        bias_BAMM = bias_AMM + jnp.where(valid_BM, 0.0, MASKED)[:, None, None]
        for layer in range(self.depth):
            h_BMD = RMSNorm(self.dtype, name=f"norm_{layer}")(x_BMD)
            x_BMD = x_BMD + self._attend(h_BMD, bias_BAMM, f"layer_{layer}")
            h_BMD = RMSNorm(self.dtype, name=f"mlp_norm_{layer}")(x_BMD)
            x_BMD = x_BMD + self._mlp(h_BMD, f"mlp_{layer}")
        x_BMD = RMSNorm(jnp.float32, name="norm")(x_BMD)
        return x_BMD * valid_BM[..., None]

    def _linear(self, name, features):
        return Linear(features, use_bias=False, dtype=self.dtype, name=name)

    def _attend(self, x_BMD, bias_BAMM, name):
        inner = self.heads * self.head_width
        q, k, v = (
            self._linear(f"{name}_{part}", inner)(x_BMD).reshape(
                *x_BMD.shape[:2], self.heads, self.head_width
            )
            for part in "qkv"
        )
        y_BMAK = attend(q, k, v, bias_BAMM, scale=1.0)
        return self._linear(f"{name}_out", self.width)(y_BMAK.reshape(*x_BMD.shape[:2], inner))

    def _mlp(self, x_BMD, name):
        gate = nn.gelu(self._linear(f"{name}_gate", self.hidden)(x_BMD), approximate=True)
        up = self._linear(f"{name}_up", self.hidden)(x_BMD)
        return self._linear(f"{name}_down", self.width)(gate * up)


class RMSNorm(nn.Module):
    """x / sqrt(mean x^2 + EPSILON) times a learned scale (Zhang and Sennrich 2019)."""

    dtype: Any

    @nn.compact
    def __call__(self, x):
        scale_D = self.param("scale", nn.initializers.ones, x.shape[-1:])
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + EPSILON)
        return (scale_D * x).astype(self.dtype)


def buckets(length: int, count: int) -> np.ndarray:
    """The bucket of key - query for each query and key of a text, int [M, M], in [0, count).

    Half of them are for keys behind the query. Of each half, half are distances of their own, and
    the others grow geometrically up to FARTHEST.
    """
    offset_MM = np.arange(length) - np.arange(length)[:, None]
    half, near = count // 2, count // 4
    distance_MM = np.abs(offset_MM)
    growth = np.log(np.maximum(distance_MM, near) / near) / np.log(FARTHEST / near)
    # The sum keeps whole numbers whole, whatever the logarithms round to.
    far_MM = near + (growth * (half - near) + 1e-9).astype(int)
    bucket_MM = np.where(distance_MM < near, distance_MM, np.minimum(far_MM, half - 1))
    return bucket_MM + half * (offset_MM > 0)

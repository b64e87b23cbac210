"""Text for generators: encoders of captions, and a reader that leaves the padding out."""

from typing import Any, Protocol

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.layers.bias import MASKED, attend
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.models.blocks import FeedForward, LayerNorm

BYTES = 256
CONV = 7  # bytes under the convolution before the layers, about a word
READS = 2  # times that queries read the text

_xavier = nn.initializers.xavier_uniform()


class TextEncoder(Protocol):
    """Captions as embeddings: ids_BM, integers with 0 as padding at the end -> x_BME float32.

    Padding is masked everywhere: its rows of x are zeros, and more of it changes no other row.
    """

    def __call__(self, ids_BM: jax.Array) -> jax.Array: ...


class ByteEncoder(nn.Module):
    """A `TextEncoder` of the UTF-8 bytes of captions, trained with its generator.

    Bytes need no vocabulary (ByT5, Xue et al. 2022). A convolution over CONV of them and then
    `depth` pre-norm layers of attention among all bytes, with rotary positions, -> width E. No norm
    ends them: what all captions share grows faster than what tells them apart, which a norm would
    then shrink to nothing.
    """

    width: int
    depth: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, ids_BM):
        valid_BM = ids_BM > 0
        keep_BM1 = valid_BM[..., None]
        embed = nn.Embed(
            BYTES, self.width, embedding_init=nn.initializers.normal(1.0), name="bytes"
        )
        x_BMD = embed(ids_BM.astype(jnp.int32)) * keep_BM1
        x_BMD = x_BMD + nn.gelu(nn.Conv(self.width, (CONV,), dtype=self.dtype, name="conv")(x_BMD))
        layers = _stack(_EncoderLayer, self.depth)
        x_BMD, _ = layers(self.heads, self.dtype, name="layers")(x_BMD, valid_BM)
        return keep_BM1 * x_BMD


class TextReader(nn.Module):
    """A text of any length as a fixed number of embeddings: x_BME, valid_BM -> y_BQD float32.

    Learned `queries` read the valid positions and each other, READS times (Perceiver, Jaegle et al.
    2021; that keys and values are those of text and queries together is Alayrac et al. 2022).
    Whoever reads y needs no mask. The queries start small, as those of Perceiver, so that y begins
    as the text.
    """

    queries: int
    width: int
    heads: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BME, valid_BM):
        x_BME = LayerNorm(dtype=self.dtype, name="norm")(x_BME)
        text_BMD = Linear(self.width, dtype=self.dtype, name="embed")(x_BME)
        shape, init = (self.queries, self.width), nn.initializers.normal(0.02)
        y_BQD = jnp.broadcast_to(self.param("queries", init, shape), (len(x_BME), *shape))
        valid = jnp.concatenate([valid_BM, jnp.ones(y_BQD.shape[:2], bool)], axis=1)
        layers = _stack(_ReaderLayer, READS)
        y_BQD, _ = layers(self.heads, self.dtype, name="layers")(y_BQD, text_BMD, valid)
        return y_BQD.astype(jnp.float32)


def _stack(layer, length):
    """The class of `length` layers with stacked parameters, one program for all of them."""
    axes, rngs = {"params": 0}, {"params": True}
    return nn.scan(layer, length=length, variable_axes=axes, split_rngs=rngs, in_axes=nn.broadcast)


class _EncoderLayer(nn.Module):
    """Attention among the valid ones of x_BMD and a GEGLU, each added to x."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x_BMD, valid_BM):
        h_BMD = LayerNorm(dtype=self.dtype, name="norm")(x_BMD)
        attention = _Attention(self.heads, rotary=True, dtype=self.dtype, name="attention")
        x_BMD = x_BMD + attention(h_BMD, h_BMD, valid_BM)
        return x_BMD + _feed_forward(self, x_BMD), None


class _ReaderLayer(nn.Module):
    """Attention of the queries y_BQD to the valid ones of text and y, and a GEGLU, added to y."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, y_BQD, text_BMD, valid):
        h_BQD = LayerNorm(dtype=self.dtype, name="norm")(y_BQD)
        seen = jnp.concatenate([text_BMD, h_BQD], axis=1)
        attention = _Attention(self.heads, dtype=self.dtype, name="attention")
        y_BQD = y_BQD + attention(h_BQD, seen, valid)
        return y_BQD + _feed_forward(self, y_BQD), None


def _feed_forward(layer, x):
    """A GEGLU with about the parameters of an MLP whose hidden width is four times that of x."""
    return FeedForward(max(8 * x.shape[-1] // 3, 1), layer.dtype, name="mlp")(x)


class _Attention(nn.Module):
    """Attention of x_BLD to the valid ones of m_BMD -> y_BLD. rotary: x and m have places."""

    heads: int
    rotary: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, m_BMD, valid_BM):
        D = x_BLD.shape[-1]
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=_xavier)

        def project(name, x):
            return Linear(D, name=name, **dense)(x).reshape(*x.shape[:2], self.heads, -1)

        q_BLAK, k_BMAK, v_BMAK = project("q", x_BLD), project("k", m_BMD), project("v", m_BMD)
        if self.rotary:
            q_BLAK, k_BMAK = (_rotate(x_BMAK) for x_BMAK in (q_BLAK, k_BMAK))
        bias_BALM = jnp.where(valid_BM, 0.0, MASKED)[:, None, None]
        y_BLAK = attend(q_BLAK, k_BMAK, v_BMAK, bias_BALM)
        return Linear(D, name="out", **dense)(y_BLAK.reshape(x_BLD.shape))


def _rotate(x_BMAK):
    """Rotary positions of a sequence, which is a video of one token per frame."""
    angle_TNK = rotary_angles(np.arange(x_BMAK.shape[1]), (1, 1), x_BMAK.shape[-1])
    return rotate(x_BMAK[:, :, None], angle_TNK)[:, :, 0]

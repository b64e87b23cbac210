"""The masked transformer: all tokens of a clip at once, from those that are known and a text.

MaskGIT (Chang et al. 2022) over the space-time grid of a causal tokenizer, as in Phenaki (Villegas
et al. 2023) and MAGVIT (Yu et al. 2023).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import at_least, require
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.embed import grid_sincos
from jaxvid.layers.linear import Linear
from jaxvid.masking.decoding import digits
from jaxvid.mixers import check_depth
from jaxvid.mixers.attention import Attention
from jaxvid.models.blocks import FeedForward, LayerNorm, check_layers
from jaxvid.parallel.sharding import shard

MAX_CODES = 2**31 - 2  # the id after the last code is the mask
MAX_PARTS = 8
_xavier = nn.initializers.xavier_uniform()


class CrossAttention(nn.Module):
    """Attention of the tokens of a clip to the context: x_BTND, context_BMD -> y_BTND."""

    heads: int
    qk_norm: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTND, context_BMD):
        B, T, N, D = x_BTND.shape
        M, A = context_BMD.shape[1], self.heads
        dense = dict(dtype=self.dtype, kernel_init=_xavier)
        q = Linear(D, name="q", **dense)(x_BTND).reshape(B, T * N, A, -1)
        k, v = (Linear(D, name=n, **dense)(context_BMD).reshape(B, M, A, -1) for n in ("k", "v"))
        if self.qk_norm:
            q = nn.RMSNorm(dtype=self.dtype, name="q_norm")(q)
            k = nn.RMSNorm(dtype=self.dtype, name="k_norm")(k)
        place_L, place_M = np.zeros(T * N, np.int32), np.zeros(M, np.int32)
        y = attention(q, k, v, q_position_L=place_L, k_position_M=place_M, allow=masks.full)
        return Linear(D, name="out", **dense)(y.reshape(B, T, N, D))


class Block(nn.Module):
    """Attention among all tokens of a clip, attention to the context, feed-forward; x_BTND."""

    heads: int
    grid: tuple[int, int]
    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTND, context_BMD):
        norm = dict(dtype=self.dtype)
        options = dict(width=x_BTND.shape[-1], heads=self.heads, grid=self.grid, mask="full")
        own = Attention(**options, **norm, name="self")
        x_BTND = x_BTND + own(LayerNorm(**norm, name="self_norm")(x_BTND))[0]
        if context_BMD is not None:
            cross = CrossAttention(self.heads, **norm, name="cross")
            h_BTND = LayerNorm(**norm, name="cross_norm")(x_BTND)
            x_BTND = x_BTND + cross(h_BTND, context_BMD)
        x_BTND = x_BTND + FeedForward(self.hidden, **norm, name="mlp")(x_BTND)
        return shard(x_BTND, "BTND"), None


class MaskedTransformer(nn.Module):
    """Tokens of a window of a stream, some of them masked -> logits of all of them.

    ids_BTN int32 in [0, codes], where `codes` is the mask; is_first, whether the window begins the
    stream, bool [] or [B], as the first latent of a causal tokenizer is an image and later ones are
    groups of frames; context_BME, embeddings or None; is_condition_BTN, bool, tokens that are those
    of a padded clip (COMMIT) -> (logits_BTNPV float32, scores_BTN float32), None unless asked for.

    codes: of the tokenizer. parts: an id is P digits in base codes^(1/P), each with an embedding
    and logits of its own (as MAGVIT-v2 and Open-MAGVIT2 split large vocabularies; their digits are
    predicted in parallel here). width D, depth, heads A. grid: (H, W) of the tokens of a frame.
    mlp_ratio: hidden units of the GEGLU, in widths. predicts: give logits. critic: give a score per
    token of whether it is real; with logits too, this is the self-critic of phenaki-pytorch. remat:
    recompute layers in the backward pass. scan: one compiled layer for all, with stacked
    parameters. Raises UserError for values that cannot work.
    """

    codes: int
    width: int
    depth: int
    heads: int
    grid: tuple[int, int]
    parts: int = 1
    mlp_ratio: float = 8 / 3
    predicts: bool = True
    critic: bool = False
    dtype: Any = jnp.float32
    remat: bool = False
    scan: bool = True

    def __post_init__(self):
        check_depth("depth", self.depth)
        check_layers(self.width, self.heads, self.mlp_ratio)
        at_least("codes", self.codes, 2, at_most=MAX_CODES)
        at_least("parts", self.parts, 1, at_most=MAX_PARTS)
        remedy = f"the tokenizer has {self.codes} codes, which is no such power of a whole number"
        require(self.values**self.parts == self.codes, "parts", self.parts, f"{remedy}; use 1")
        super().__post_init__()

    @property
    def values(self) -> int:
        """V: values of a digit of an id."""
        return round(self.codes ** (1 / self.parts))

    @nn.compact
    def __call__(self, ids_BTN, is_first, context_BME=None, is_condition_BTN=None):
        is_masked_BTN = ids_BTN == self.codes
        x_BTND = self._embed(ids_BTN, is_masked_BTN, is_first, is_condition_BTN)
        context_BMD = None
        if context_BME is not None:
            dense = dict(dtype=self.dtype, kernel_init=_xavier)
            context_BMD = Linear(self.width, name="context", **dense)(context_BME)
            # Without a constraint its gradient is wrong on a mesh of data, fsdp and tensor
            # (XLA of jax 0.10.2): the tests compare it with that of one device.
            context_BMD = shard(context_BMD, "BMD")
        layer = nn.remat(Block, prevent_cse=False) if self.remat else Block
        options = (self.heads, self.grid, int(self.mlp_ratio * self.width), self.dtype)
        if self.scan:
            axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
            layers = nn.scan(layer, length=self.depth, in_axes=nn.broadcast, **axes)
            x_BTND, _ = layers(*options, name="layers")(x_BTND, context_BMD)
        else:
            for i in range(self.depth):
                x_BTND, _ = layer(*options, name=f"layer_{i}")(x_BTND, context_BMD)
        x_BTND = LayerNorm(dtype=self.dtype, name="norm")(x_BTND)
        zeros = dict(kernel_init=nn.initializers.zeros, dtype=jnp.float32)
        logits_BTNPV, scores_BTN = None, None
        if self.predicts:
            logits = Linear(self.parts * self.values, name="head", **zeros)(x_BTND)
            logits_BTNPV = logits.reshape(*ids_BTN.shape, self.parts, self.values)
        if self.critic:
            scores_BTN = Linear(1, name="critic", **zeros)(x_BTND)[..., 0]
        return logits_BTNPV, scores_BTN

    def _embed(self, ids_BTN, is_masked_BTN, is_first, is_condition_BTN):
        """x_BTND: the sum of the embeddings of an id's digits, or that of the mask, and places."""
        D, normal = self.width, nn.initializers.normal(1.0)
        digits_BTNP = digits(ids_BTN, self.parts, self.values)
        tables_PVD = self.param("embed", normal, (self.parts, self.values, D))
        x_BTND = sum(tables_PVD[p][digits_BTNP[..., p]] for p in range(self.parts))
        masked_D, first_D, condition_D = (
            self.param(name, normal, (D,)) for name in ("masked", "first", "condition")
        )
        x_BTND = jnp.where(is_masked_BTN[..., None], masked_D, x_BTND / self.parts**0.5)
        if is_condition_BTN is not None:
            x_BTND = x_BTND + is_condition_BTN[..., None] * condition_D
        T = ids_BTN.shape[1]
        starts = jnp.reshape(is_first, (-1, 1)) & (jnp.arange(T) == 0)
        x_BTND = x_BTND + starts[:, :, None, None] * first_D
        x_BTND = x_BTND + grid_sincos(self.grid, D)
        return shard(x_BTND.astype(self.dtype), "BTND")

"""The published tokenizers as they were released, for the use of their weights.

One network covers the C-ViViT of phenaki-pytorch, its variant by obvious-research (phenaki-cvivit)
and OmniTokenizer (Wang et al. 2024). It cannot stream. In all three, the convolution before
temporal attention reads tokens that were reshaped instead of transposed, which mixes the future
into the past. The temporal attention of the variant has no mask either. `jaxvid.tools.weights`
loads the weights.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.checks import choose
from jaxvid.errors import UserError
from jaxvid.layers.bias import (
    COSINE_SCALE,
    MASKED,
    ContinuousBias,
    CosineNorm,
    TableBias,
    alibi_slopes,
    attend,
)
from jaxvid.layers.linear import Linear
from jaxvid.models import blocks, stem

PEG_LAYOUTS = ("causal", "peer_scrambled")
POSITIONS = ("shared", "rel", "rope")


class PeerAttention(nn.Module):
    """Attention with cosine similarities times 8, x_BLD -> y_BLD.

    LayerNorm applies to the queries only; keys and values read x itself. grid: (H, W) of the
    tokens, for rotary positions; None has none.
    """

    heads: int
    head_width: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BLD, bias_ALM=None, grid=None):
        B, L, D = x_BLD.shape
        inner = self.heads * self.head_width
        dense = functools.partial(Linear, use_bias=False, dtype=self.dtype)
        q = dense(inner, name="q")(blocks.LayerNorm(use_bias=False, name="norm")(x_BLD))
        k, v = dense(inner, name="k")(x_BLD), dense(inner, name="v")(x_BLD)
        q, k, v = (x.reshape(B, L, self.heads, self.head_width) for x in (q, k, v))
        if grid:
            q, k = _rotate_pairs(q, grid), _rotate_pairs(k, grid)
        q, k = (CosineNorm(self.dtype, name=f"{n}_norm")(x) for n, x in (("q", q), ("k", k)))
        y = attend(q, k, v, bias_ALM, COSINE_SCALE)
        return dense(D, name="out")(y.reshape(B, L, inner))


class PeerWindow(nn.Module):
    """LayerNorm and attention within windows, x_BHWD -> y_BHWD; UserError unless these divide the
    grid."""

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD):
        B, H, W, D = x_BHWD.shape
        side = self.window
        if H % side or W % side:
            raise UserError(
                f"window={side}: does not divide {H} x {W} tokens; use frames whose sides are "
                f"multiples of {side} patches"
            )
        h = blocks.LayerNorm(use_bias=False, name="norm")(x_BHWD)
        h = h.reshape(B, H // side, side, W // side, side, D).swapaxes(2, 3)
        h = h.reshape(B, -1, side * side, D)
        dense = functools.partial(Linear, D, use_bias=False, dtype=self.dtype)
        q, k, v = (
            dense(name=name)(h).reshape(*h.shape[:3], self.heads, -1) for name in ("q", "k", "v")
        )
        bias_ALM = TableBias(self.heads, side, name="bias")((side, side))
        y = attend(q, k, v, bias_ALM).reshape(B, H // side, W // side, side, side, D)
        y = y.swapaxes(2, 3).reshape(x_BHWD.shape)
        return Linear(D, dtype=self.dtype, name="out")(y)


class PeerConv(nn.Module):
    """Depth-wise 3 x 3 x 3 convolution that reads a frame and the two before, x_BTHWD -> y_BTHWD.

    `blocks.PEG` without a state, equal to rounding: this one is a convolution of XLA.
    """

    @nn.compact
    def __call__(self, x_BTHWD):
        D = x_BTHWD.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 3, 1, D))
        bias_D = self.param("bias", nn.initializers.zeros, (D,))
        return bias_D + jax.lax.conv_general_dilated(
            x_BTHWD,
            kernel,
            (1, 1, 1),
            ((2, 0), (1, 1), (1, 1)),
            dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
            feature_group_count=D,
        )


class PeerTokenizer(nn.Module):
    """Video in [-1, 1] <-> latents, whole clips only.

    encode: video_BTHWC -> (z_BTHWZ with Z = features, ())
    decode: z_BTHWZ with Z = channels -> (video_BTHWC, ())

    The returned state is (), and any state but None is refused (UserError). So the next piece of a
    stream cannot pass for a clip of its own.

    Fields of `cvivit.CViViT` mean the same here. The others are: head_width. hidden: units of the
    MLP. encode_depth, decode_depth: temporal layers. position: "shared", one continuous bias for
    all spatial layers; "rel", one for each layer; or "rope". biased: add the biases of space and
    time, which OmniTokenizer computes but drops under PyTorch 2.1 and later. causal: attention over
    time has a mask and the bias of ALiBi; False has neither. peg_layout: "peer_scrambled", with
    which the weights were trained, or "causal". space_peg, time_peg: put convolutions before
    attention in space, in time. unit: scale features to unit length. offset: the network reads
    pixels / 2 + offset.
    """

    features: int
    channels: int
    patch: int
    t_patch: int
    width: int
    heads: int
    head_width: int
    hidden: int
    encode_blocks: str
    decode_blocks: str
    encode_depth: int
    decode_depth: int
    window: int = 8
    position: str = "shared"
    biased: bool = True
    causal: bool = True
    peg_layout: str = "peer_scrambled"
    space_peg: bool = False
    time_peg: bool = True
    patch_norm: bool = True
    unit: bool = False
    offset: float = 0.5
    dtype: Any = jnp.float32

    def __post_init__(self):
        choose("position", self.position, POSITIONS)
        choose("peg_layout", self.peg_layout, PEG_LAYOUTS)
        super().__post_init__()

    def __call__(self, video_BTHWC):
        """Make all parameters, from a clip of 1 + t_patch frames or more."""
        z_BTHWZ, _ = self.encode(video_BTHWC)
        return self.decode(z_BTHWZ[..., : self.channels])

    def setup(self):
        ends = dict(patch=self.patch, t_patch=self.t_patch)
        if self.position == "shared":
            self.bias = ContinuousBias(self.heads, self.width)
        self.embed = stem.Stem(self.width, patch_norm=self.patch_norm, dtype=self.dtype, **ends)
        sides = {
            "encode": (self.encode_blocks, self.encode_depth),
            "decode": (self.decode_blocks, self.decode_depth),
        }
        stacks = {}
        for side, (letters, depth) in sides.items():
            stacks[f"{side}_space"] = [self._layer(letter, False) for letter in letters]
            stacks[f"{side}_time"] = [self._layer("t", True) for _ in range(depth)]
        self.stacks = stacks
        self.norms = {name: blocks.LayerNorm(use_bias=False) for name in stacks}
        self.to_latent, self.from_latent = Linear(self.features), Linear(self.width)
        self.pixels = stem.Head(**ends)

    def _layer(self, letter, over_time):
        """The modules of one layer, by name."""
        layer = {"mlp": blocks.FeedForward(self.hidden, self.dtype)}
        if letter == "w":
            return {"window": PeerWindow(self.heads, self.window, self.dtype), **layer}
        layer["attention"] = PeerAttention(self.heads, self.head_width, dtype=self.dtype)
        if self.position == "rel" and not over_time:
            layer["bias"] = ContinuousBias(self.heads, self.width)
        if self.time_peg if over_time else self.space_peg:
            layer["peg"] = PeerConv()
        return layer

    def encode(self, video_BTHWC, state=None):
        """See the class."""
        _refuse_state(state)
        x_BTHWD = self.embed(video_BTHWC / 2 + self.offset, is_first=True)
        x_BTHWD = self._time("encode_time", self._space("encode_space", x_BTHWD))
        z_BTHWZ = self.to_latent(x_BTHWD)
        if self.unit:
            length = jnp.linalg.norm(z_BTHWZ, axis=-1, keepdims=True)
            z_BTHWZ = z_BTHWZ / jnp.maximum(length, 1e-12)
        return z_BTHWZ, ()

    def decode(self, z_BTHWZ, state=None):
        """See the class."""
        _refuse_state(state)
        x_BTHWD = self._time("decode_time", self.from_latent(z_BTHWZ))
        x_BTHWD = self._space("decode_space", x_BTHWD)
        return (self.pixels(x_BTHWD, is_first=True) - self.offset) * 2, ()

    def _space(self, name, x_BTHWD):
        B, T, H, W, D = x_BTHWD.shape
        shared_ANN = self.bias((H, W)) if self.position == "shared" and self.biased else None
        for layer in self.stacks[name]:
            if "peg" in layer:
                x_BTHWD = x_BTHWD + layer["peg"](x_BTHWD)
            if "window" in layer:
                y = layer["window"](x_BTHWD.reshape(B * T, H, W, D))
            else:
                bias_ANN, grid = shared_ANN, (H, W) if self.position == "rope" else None
                if "bias" in layer and self.biased:
                    bias_ANN = layer["bias"]((H, W))
                y = layer["attention"](x_BTHWD.reshape(B * T, H * W, D), bias_ANN, grid)
            x_BTHWD = x_BTHWD + y.reshape(x_BTHWD.shape)
            x_BTHWD = x_BTHWD + layer["mlp"](x_BTHWD)
        return self.norms[name](x_BTHWD)

    def _time(self, name, x_BTHWD):
        B, T, H, W, D = x_BTHWD.shape
        bias_ATT = self._time_bias(T) if self.causal else None
        lanes_BTD = x_BTHWD.transpose(0, 2, 3, 1, 4).reshape(B * H * W, T, D)
        for layer in self.stacks[name]:
            if "peg" in layer:
                lanes_BTD = lanes_BTD + self._peg(layer["peg"], lanes_BTD, (B, T, H, W))
            lanes_BTD = lanes_BTD + layer["attention"](lanes_BTD, bias_ATT)
            lanes_BTD = lanes_BTD + layer["mlp"](lanes_BTD)
        lanes_BTD = self.norms[name](lanes_BTD)
        return lanes_BTD.reshape(B, H, W, T, D).transpose(0, 3, 1, 2, 4)

    def _time_bias(self, T):
        distance_TT = np.arange(T)[:, None] - np.arange(T)
        bias_ATT = -alibi_slopes(self.heads)[:, None, None] * distance_TT * self.biased
        return np.where(distance_TT >= 0, bias_ATT, MASKED).astype(np.float32)

    def _peg(self, peg, lanes_BTD, shape):
        """Convolution of the tokens at each location over time, laid out as `peg_layout` says."""
        B, T, H, W = shape
        if self.peg_layout == "peer_scrambled":
            return peg(lanes_BTD.reshape(*shape, -1)).reshape(lanes_BTD.shape)
        x_BTHWD = lanes_BTD.reshape(B, H, W, T, -1).transpose(0, 3, 1, 2, 4)
        return peg(x_BTHWD).transpose(0, 2, 3, 1, 4).reshape(lanes_BTD.shape)

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError unless patches fit."""
        return stem.grid_of(size, self.patch)

    def latents_for_frames(self, frames: int) -> int:
        """Latent frames of a clip; UserError unless the last group is whole."""
        return stem.latents_for_frames(frames, self.t_patch)

    def frames_for_latents(self, latents: int) -> int:
        """Frames of a clip of this many latent frames."""
        return stem.frames_for_latents(latents, self.t_patch)


def _rotate_pairs(x_BLAK, grid):
    """OmniTokenizer's rotary embedding: rotate channels 2i, 2i + 1 by place * 10000^(-4 i' / K).

    The place is the column for even pairs i and the row for odd ones, i' = i // 2.
    """
    H, W = grid
    K = x_BLAK.shape[-1]
    frequency = 10_000.0 ** (-4 * np.arange(K // 4) / K)
    row_L, column_L = (axis.reshape(-1) for axis in np.mgrid[:H, :W])
    angle = np.stack([place[:, None] * frequency for place in (column_L, row_L)], axis=-1)
    angle = angle.reshape(H * W, 1, K // 2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x_BLAK[..., ::2], x_BLAK[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_BLAK.shape)


def _refuse_state(state):
    """Raise UserError unless a clip starts here."""
    if state is not None:
        raise UserError(
            "tokenizer: the published networks read whole clips and cannot stream; "
            "give all frames at once, without a state"
        )

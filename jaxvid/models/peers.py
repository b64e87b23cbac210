"""The tokenizers that others have released, as they are, so that their weights can be used.

The C-ViViT of phenaki-pytorch, its variant by obvious-research (phenaki-cvivit) and OmniTokenizer
(Wang et al. 2024) are this one network. It is not a stream: in all of them, the convolution before
temporal attention reads tokens that were laid out anew instead of transposed, which mixes the
future into the past; the variant's attention over time has no mask either.
`jaxvid.tools.weights` fills it.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

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
from jaxvid.models import blocks

PEG_LAYOUTS = ("causal", "peer_scrambled")
POSITIONS = ("shared", "rel", "rope")


class PeerAttention(nn.Module):
    """Cosine attention times 8 whose keys and values read x itself, x_BLD -> y_BLD.

    Only queries see the LayerNorm. grid: (H, W) of the tokens, to turn them by column in even pairs
    of neighbouring channels and by row in odd ones.
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
            q, k = _turn(q, grid), _turn(k, grid)
        q, k = (CosineNorm(self.dtype, name=f"{n}_norm")(x) for n, x in (("q", q), ("k", k)))
        y = attend(q, k, v, bias_ALM, COSINE_SCALE)
        return dense(D, name="out")(y.reshape(B, L, inner))


class PeerWindow(nn.Module):
    """LayerNorm and attention within windows that divide the grid, x_BHWD -> y_BHWD."""

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD):
        B, H, W, D = x_BHWD.shape
        side = self.window
        if H % side or W % side:
            raise UserError(f"size: {H} x {W} tokens are no windows of {side}; use a multiple")
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
    """Depth-wise 3 x 3 x 3 convolution that reads the two frames before, x_BTHWD -> y_BTHWD."""

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

    A clip leaves the state (), and every state but None is refused (UserError): the next piece of a
    stream is not taken for a clip of its own.

    Options are as of `cvivit.CViViT`, and beside them: head_width. hidden: units of the MLP.
    position: "shared", one continuous bias for all, "rel", one for each layer, or "rope". biased:
    add the biases of space and time, which OmniTokenizer computes and drops under PyTorch from 2.1
    on. causal: attention over time is masked and has the bias of ALiBi; False has neither.
    peg_layout: "peer_scrambled", as the weights were trained, or "causal". space_peg, time_peg:
    where there are convolutions. unit: features are brought to unit length. offset: what their
    black is at, pixels / 2 + offset being what the network sees.
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

    def __call__(self, video_BTHWC):
        """Makes all parameters, from a clip of 1 + t_patch frames or more."""
        z_BTHWZ, _ = self.encode(video_BTHWC)
        return self.decode(z_BTHWZ[..., : self.channels])

    def setup(self):
        cut = dict(patch=self.patch, t_patch=self.t_patch)
        if self.position == "shared":
            self.bias = ContinuousBias(self.heads, self.width)
        self.embed = blocks.Stem(self.width, patch_norm=self.patch_norm, dtype=self.dtype, **cut)
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
        self.pixels = blocks.Head(**cut)

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
        _no_stream(state)
        x_BTHWD = self.embed(video_BTHWC / 2 + self.offset, is_first=True)
        x_BTHWD = self._time("encode_time", self._space("encode_space", x_BTHWD))
        z_BTHWZ = self.to_latent(x_BTHWD)
        if self.unit:
            length = jnp.linalg.norm(z_BTHWZ, axis=-1, keepdims=True)
            z_BTHWZ = z_BTHWZ / jnp.maximum(length, 1e-12)
        return z_BTHWZ, ()

    def decode(self, z_BTHWZ, state=None):
        """See the class."""
        _no_stream(state)
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
        B, T, H, W = shape
        if self.peg_layout == "peer_scrambled":
            return peg(lanes_BTD.reshape(*shape, -1)).reshape(lanes_BTD.shape)
        x_BHWTD = lanes_BTD.reshape(B, H, W, T, -1)
        return (
            peg(x_BHWTD.transpose(0, 3, 1, 2, 4)).transpose(0, 2, 3, 1, 4).reshape(lanes_BTD.shape)
        )

    def grid(self, size):
        """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError if none fit."""
        return blocks.grid_of(size, self.patch)

    def latents_for_frames(self, frames):
        """Latent frames of a clip; UserError where the last group is not whole."""
        return blocks.latents_for_frames(frames, self.t_patch)

    def frames_for_latents(self, latents):
        """Frames of a clip of so many latent frames."""
        return blocks.frames_for_latents(latents, self.t_patch)


def _turn(x_BLAK, grid):
    """OmniTokenizer's rotary embedding: pairs 2 i, 2 i + 1 turn by place * 10000^(-4 i / K)."""
    H, W = grid
    K = x_BLAK.shape[-1]
    frequency = 10_000.0 ** (-4 * np.arange(K // 4) / K)
    row_L, column_L = (axis.reshape(-1) for axis in np.mgrid[:H, :W])
    angle = np.stack([place[:, None] * frequency for place in (column_L, row_L)], axis=-1)
    angle = angle.reshape(H * W, 1, K // 2)
    cos, sin = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    a, b = x_BLAK[..., ::2], x_BLAK[..., 1::2]
    return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x_BLAK.shape)


def _no_stream(state):
    if state is not None:
        raise UserError(
            "tokenizer: the networks of others read whole clips and cannot stream; "
            "give all frames at once, without a state"
        )

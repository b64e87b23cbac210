"""What the tokenizers are made of: transformers over space and over time.

Tokens of a video are x_BTHWD, [B, latent frames, rows, columns, width]. Spatial layers mix tokens
within a frame and have no state; temporal layers obey `y, state = layer(x, state)`. The layers of a
stack are one scan over stacked parameters. Only models with `remat` run it as a loop: unrolled,
small models are 15 % faster on CPU, without copies into and out of stacks.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.layers.bias import COSINE_SCALE, MASKED, CosineNorm, TableBias, attend
from jaxvid.layers.conv import depthwise_conv3d
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.mixers import MAX_RATIO, check_depth, check_heads, kinds, make_mixer
from jaxvid.parallel.sharding import shard

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5)
_xavier = nn.initializers.xavier_uniform()


def check_layers(width: int, heads: int, mlp_ratio: float) -> None:
    """Raise UserError for sizes that no layer can have."""
    check_heads(width, heads)
    checks.positive("mlp_ratio", mlp_ratio)
    checks.at_least("mlp_ratio", mlp_ratio, 0, at_most=MAX_RATIO)
    checks.require(
        mlp_ratio * width >= 1,
        "mlp_ratio",
        mlp_ratio,
        f"leaves width={width} no hidden unit; use 8 / 3",
    )


def check_blocks(field: str, blocks: str) -> None:
    """Raise UserError unless `blocks` holds a letter for each layer, "t" or "w"."""
    checks.require(
        blocks and set(blocks) <= {"t", "w"},
        field,
        blocks,
        "use a letter for each layer, t for all cells or w for windows",
    )
    check_depth(f"{field}: layers", len(blocks))


class FeedForward(nn.Module):
    """LayerNorm and GEGLU (Shazeer 2020) without biases, x [..., D] -> [..., D]; exact GELU."""

    hidden: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x):
        dense = dict(use_bias=False, dtype=self.dtype, kernel_init=_xavier)
        h = LayerNorm(dtype=self.dtype, name="norm")(x)
        gate = nn.gelu(Linear(self.hidden, name="gate", **dense)(h), approximate=False)
        h = Linear(self.hidden, name="up", **dense)(h) * gate
        return Linear(x.shape[-1], transposed=True, name="down", **dense)(h)


class FrameAttention(nn.Module):
    """LayerNorm and attention among all cells of a frame, x_BHWD -> y_BHWD.

    Scores are cosine similarities times 8, plus bias_ANN. rotary: rotate queries and keys by row
    and column before they are normalised (OmniTokenizer, Wang et al. 2024).
    """

    heads: int
    rotary: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD, bias_ANN=None):
        B, H, W, D = x_BHWD.shape
        q, k, v = _project(self, x_BHWD, (B, H, W), bias=False)
        if self.rotary:
            # Rows take the place of frames, so bands are for rows and columns, none for time.
            angle_HWK = rotary_angles(np.arange(H), (1, W), D // self.heads)
            q, k = rotate(q, angle_HWK), rotate(k, angle_HWK)
        q, k = (CosineNorm(self.dtype, name=f"{n}_norm")(x) for n, x in (("q", q), ("k", k)))
        q, k, v = (x.reshape(B, H * W, self.heads, -1) for x in (q, k, v))
        y_BNAK = attend(q, k, v, bias_ANN, COSINE_SCALE)
        out = Linear(D, use_bias=False, dtype=self.dtype, kernel_init=_xavier, name="out")
        return out(y_BNAK.reshape(x_BHWD.shape))


class WindowAttention(nn.Module):
    """LayerNorm and attention within windows of `window` x `window` cells, x_BHWD -> y_BHWD.

    A learned bias for every offset (Swin, Liu et al. 2021), without shifted windows. Windows at the
    far edges end where the grid ends.
    """

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD):
        B, H, W, D = x_BHWD.shape
        h, w = min(self.window, H), min(self.window, W)
        rows, columns = -(-H // h), -(-W // w)
        padding = ((0, 0), (0, rows * h - H), (0, columns * w - W), (0, 0))

        def windows(x_BHWX):
            """[B, H, W, X] -> [B, R windows, N cells in each, X], zeros beyond the grid."""
            x = jnp.pad(x_BHWX, padding).reshape(-1, rows, h, columns, w, x_BHWX.shape[-1])
            return x.swapaxes(2, 3).reshape(-1, rows * columns, h * w, x_BHWX.shape[-1])

        qkv = _project(self, x_BHWD, (B, H, W), bias=True)
        q, k, v = (
            windows(x.reshape(B, H, W, D)).reshape(B, rows * columns, h * w, self.heads, -1)
            for x in qkv
        )
        bias_RALM = TableBias(self.heads, self.window, name="bias")((h, w))[None]
        if any(max(side) for side in padding):
            beyond_RN = windows(np.ones((1, H, W, 1), np.float32))[0, :, :, 0] == 0
            bias_RALM = jnp.where(beyond_RN[:, None, None], MASKED, bias_RALM)
        y = attend(q, k, v, bias_RALM).reshape(B, rows, columns, h, w, D)
        y_BHWD = y.swapaxes(2, 3).reshape(B, rows * h, columns * w, D)[:, :H, :W]
        return Linear(D, dtype=self.dtype, kernel_init=_xavier, name="out")(y_BHWD)


def _project(module, x, shape, bias):
    """q, k, v [*shape, A, K] of the normalised x."""
    h = LayerNorm(dtype=module.dtype, name="norm")(x)
    dense = dict(use_bias=bias, dtype=module.dtype, kernel_init=_xavier)
    projected = (Linear(x.shape[-1], name=name, **dense)(h) for name in ("q", "k", "v"))
    return [part.reshape(*shape, module.heads, -1) for part in projected]


class SpatialBlock(nn.Module):
    """Attention within a frame and feed-forward, each added to x_BHWD.

    kind: "t" for attention among all cells, "w" for attention within windows.
    """

    kind: str
    heads: int
    hidden: int
    rotary: bool = False
    window: int = 8
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD, bias_ANN=None):
        if self.kind == "w":
            attention = WindowAttention(self.heads, self.window, self.dtype, name="attention")
            x_BHWD = x_BHWD + attention(x_BHWD)
        else:
            attention = FrameAttention(self.heads, self.rotary, self.dtype, name="attention")
            x_BHWD = x_BHWD + attention(x_BHWD, bias_ANN)
        x_BHWD = x_BHWD + FeedForward(self.hidden, self.dtype, name="mlp")(x_BHWD)
        return shard(x_BHWD, "BHWD"), None


class SpatialTransformer(nn.Module):
    """Blocks within each frame and a LayerNorm, x_BTHWD -> x_BTHWD.

    blocks: the kind of each block; "ttww" is two over all cells, then two over windows. Neighbours
    of one kind run as one scan over stacked parameters. bias_ANN: shared by all "t" blocks.
    """

    blocks: str
    heads: int
    hidden: int
    rotary: bool = False
    window: int = 8
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x_BTHWD, bias_ANN=None):
        B, T, H, W, D = x_BTHWD.shape
        x_BHWD = x_BTHWD.reshape(B * T, H, W, D)
        for index, (kind, neighbours) in enumerate(itertools.groupby(self.blocks)):
            length = len(list(neighbours))
            block = nn.remat(SpatialBlock, prevent_cse=False) if self.remat else SpatialBlock
            layers = nn.scan(
                block,
                length=length,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=nn.broadcast,
                unroll=1 if self.remat else length,
            )(
                kind,
                heads=self.heads,
                hidden=self.hidden,
                rotary=self.rotary,
                window=self.window,
                dtype=self.dtype,
                name=f"blocks_{index}",
            )
            x_BHWD, _ = layers(x_BHWD, bias_ANN)
        x_BHWD = LayerNorm(dtype=self.dtype, name="norm")(x_BHWD)
        return x_BHWD.reshape(B, T, H, W, D)


class PEG(nn.Module):
    """Position encoding generator: depth-wise 3 x 3 x 3 convolution (Chu et al. 2021).

    x_BTHWD -> y_BTHWD, with zeros around the frame and before the stream. Causal: an output reads
    its frame and the two before. State: the last two frames, [B, 2, H, W, D]; None is a stream of
    zeros. (The published C-ViViT and OmniTokenizer reshape tokens here instead of transposing them,
    which mixes the future into the past.)
    """

    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWD, state=None):
        B, T, H, W, D = x_BTHWD.shape
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (3, 3, 3, 1, D))
        bias_D = self.param("bias", nn.initializers.zeros, (D,))
        kernel, bias_D = kernel.astype(self.dtype), bias_D.astype(self.dtype)
        if state is None:
            state = jnp.zeros((B, 2, H, W, D), x_BTHWD.dtype)
        seen = jnp.concatenate([state, x_BTHWD], axis=1)
        return bias_D + depthwise_conv3d(seen, kernel), seen[:, T:]


class TemporalBlock(nn.Module):
    """PEG, temporal mixer at every location and feed-forward, each added to x_BTHWD.

    mixer: a name in `mixers.MIXERS` and the options of that mixer.
    """

    heads: int
    hidden: int
    mixer: Mapping[str, Any]
    peg: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWD, state=None):
        B, T, H, W, D = x_BTHWD.shape
        peg_state, mixer_state = (None, None) if state is None else state
        if self.peg:
            y_BTHWD, peg_state = PEG(self.dtype, name="peg")(x_BTHWD, peg_state)
            x_BTHWD = x_BTHWD + y_BTHWD
        mixer = make_mixer(self.mixer, width=D, heads=self.heads, dtype=self.dtype, name="temporal")
        h_BTHWD = LayerNorm(dtype=self.dtype, name="norm")(x_BTHWD)
        lanes_BTND = h_BTHWD.reshape(B, T, H * W, D).swapaxes(1, 2).reshape(B * H * W, T, 1, D)
        lanes_BTND, mixer_state = mixer(lanes_BTND, mixer_state)
        y_BTHWD = lanes_BTND.reshape(B, H * W, T, D).swapaxes(1, 2).reshape(x_BTHWD.shape)
        x_BTHWD = x_BTHWD + y_BTHWD
        x_BTHWD = x_BTHWD + FeedForward(self.hidden, self.dtype, name="mlp")(x_BTHWD)
        return shard(x_BTHWD, "BTHWD"), (peg_state, mixer_state)


class TemporalGroup(nn.Module):
    """Temporal blocks with different mixers, which a scan repeats as one.

    mixers: the mixer of each. shared: the other options of `TemporalBlock`. The state is a tuple
    with that of each block.
    """

    mixers: tuple[Mapping[str, Any], ...]
    shared: Mapping[str, Any]

    @nn.compact
    def __call__(self, x_BTHWD, states=None):
        after = []
        for i, (mixer, state) in enumerate(zip(self.mixers, states or (None,) * len(self.mixers))):
            block = TemporalBlock(mixer=mixer, **self.shared, name=f"block_{i}")
            x_BTHWD, state = block(x_BTHWD, state)
            after.append(state)
        return x_BTHWD, tuple(after)


class TemporalTransformer(nn.Module):
    """Causal blocks over time and a LayerNorm, x_BTHWD, state -> x_BTHWD, state.

    mixer: the name and the options of a mixer, and with `every` those of some layers that are
    softmax instead (`jaxvid.mixers`); depth is then a multiple of that. State: the states of all
    blocks, stacked along a leading depth axis as the parameters are.
    """

    depth: int
    heads: int
    hidden: int
    mixer: Mapping[str, Any]
    peg: bool = True
    dtype: Any = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x_BTHWD, state=None):
        block, mixers = TemporalBlock, kinds(self.mixer)
        options = dict(heads=self.heads, hidden=self.hidden, peg=self.peg, dtype=self.dtype)
        if len(mixers) > 1:
            block, options = TemporalGroup, dict(mixers=mixers, shared=options)
        else:
            options["mixer"] = mixers[0]
        length = self.depth // len(mixers)
        layers = nn.scan(
            nn.remat(block, prevent_cse=False) if self.remat else block,
            length=length,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            unroll=1 if self.remat else length,
        )(**options, name="blocks")
        x_BTHWD, state = layers(x_BTHWD, state)
        return LayerNorm(dtype=self.dtype, name="norm")(x_BTHWD), state

"""What the tokenizers are made of: stems, spatial and temporal transformers, heads.

Tokens of a video are x_BTHWD, [B, latent frames, rows, columns, width]. Space is mixed within a
frame, so spatial layers know no state; temporal layers obey `y, state = layer(x, state)`. Layers of
a stack are one scan over stacked parameters, which only models with `remat` run as a loop: small
ones are 15 % faster on CPU without its copies into and out of stacks.
"""

import functools
import itertools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.errors import UserError
from jaxvid.layers.bias import COSINE_SCALE, MASKED, CosineNorm, TableBias, attend
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.layers.patch import haar, patchify, unhaar, unpatchify
from jaxvid.mixers import MIXERS
from jaxvid.parallel.sharding import shard

PATCHIFY = {"linear": (patchify, unpatchify), "haar": (haar, unhaar)}
STEMS = ("split", "shared")
INFLATIONS = ("average", "first")
POSITIONS = ("rel", "rope")

LayerNorm = functools.partial(nn.LayerNorm, epsilon=1e-5)
_xavier = nn.initializers.xavier_uniform()


def latents_for_frames(frames, t_patch):
    """Latent frames of a clip: one of the first frame, one of every `t_patch` after it.

    Raises UserError where the last group is not whole.
    """
    _check_groups(frames, frames - 1, t_patch)
    return 1 + (frames - 1) // t_patch


def frames_for_latents(latents, t_patch):
    """Frames that so many latent frames stand for, at the start of a stream."""
    return 1 + (latents - 1) * t_patch


def grid_of(size, patch):
    """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError if patches do not fit."""
    if any(side % patch or side < patch for side in size):
        raise UserError(
            f"patch={patch}: does not divide frames of {size[0]} x {size[1]} pixels; "
            "use a divisor of both sides"
        )
    return size[0] // patch, size[1] // patch


def _check_groups(frames, rest, t_patch):
    """Raise UserError unless `rest`, all `frames` but the first of the stream, is whole groups."""
    if rest % t_patch or rest < 0:
        fewer = frames - rest % t_patch
        choices = [str(choice) for choice in (fewer, fewer + t_patch) if choice > 0]
        raise UserError(
            f"frames={frames}: after the first frame, latents hold {t_patch} frames each; "
            f"use {' or '.join(choices)}"
        )


class Stem(nn.Module):
    """video_BTHWC -> x_BTHWD: square patches of pixels over 1 frame at first, then over t_patch.

    `is_first`: the video begins with the first frame of the stream. stem "split" gives that frame
    a map of its own (C-ViViT); "shared" repeats it to fill a group (Cosmos), so that images and
    video train the same weights. patchify: "linear" or "haar". patch_norm: LayerNorm of the pixels
    of a patch and of its token, as the peers have it, which hides how bright a flat patch is.
    """

    width: int
    patch: int
    t_patch: int
    stem: str = "split"
    patchify: str = "linear"
    patch_norm: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, video_BTHWC, is_first):
        grid_of(video_BTHWC.shape[2:4], self.patch)
        first, rest = video_BTHWC[:, : int(is_first)], video_BTHWC[:, int(is_first) :]
        _check_groups(video_BTHWC.shape[1], rest.shape[1], self.t_patch)
        if self.stem == "shared":
            first = jnp.repeat(first, self.t_patch, axis=1)
            return self._embed("group", jnp.concatenate([first, rest], axis=1), self.t_patch)
        parts = [("image", first, 1), ("group", rest, self.t_patch)]
        return jnp.concatenate([self._embed(*part) for part in parts if part[1].shape[1]], axis=1)

    def _embed(self, name, video_BTHWC, t_patch):
        cut, _ = PATCHIFY[self.patchify]
        x_BTHWD = cut(video_BTHWC.astype(self.dtype), (t_patch, self.patch, self.patch))
        embed = Linear(self.width, dtype=self.dtype, kernel_init=_xavier, name=name)
        if not self.patch_norm:
            return embed(x_BTHWD)
        x_BTHWD = embed(LayerNorm(dtype=self.dtype, name=f"{name}_pixels")(x_BTHWD))
        return LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x_BTHWD)


class Head(nn.Module):
    """x_BTHWD -> video_BTHWC float32, the way back through a `Stem` of the same options.

    A shared stem is answered by the last frame of the first group.
    """

    patch: int
    t_patch: int
    stem: str = "split"
    patchify: str = "linear"
    channels: int = 3

    @nn.compact
    def __call__(self, x_BTHWD, is_first):
        if self.stem == "shared":
            video = self._pixels("group", x_BTHWD, self.t_patch)
            return video[:, self.t_patch - 1 :] if is_first else video
        first, rest = x_BTHWD[:, : int(is_first)], x_BTHWD[:, int(is_first) :]
        parts = [("image", first, 1), ("group", rest, self.t_patch)]
        return jnp.concatenate([self._pixels(*part) for part in parts if part[1].shape[1]], axis=1)

    def _pixels(self, name, x_BTHWD, t_patch):
        _, join = PATCHIFY[self.patchify]
        patch = (t_patch, self.patch, self.patch)
        features = self.channels * t_patch * self.patch**2
        x = Linear(features, dtype=jnp.float32, kernel_init=_xavier, name=name)(x_BTHWD)
        return join(x, patch)


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

    Cosine similarity times 8. bias_ANN is added to the scores; `rotary` turns queries and keys by
    row and column before they are normalised (OmniTokenizer, Wang et al. 2024).
    """

    heads: int
    rotary: bool = False
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD, bias_ANN=None):
        B, H, W, D = x_BHWD.shape
        q, k, v = _heads(self, x_BHWD, (B, H, W), bias=False)
        if self.rotary:
            # Rows stand in for frames: bands for row and column, none for time.
            angle_HWK = rotary_angles(np.arange(H), (1, W), D // self.heads)
            q, k = rotate(q, angle_HWK), rotate(k, angle_HWK)
        q, k = (CosineNorm(self.dtype, name=f"{n}_norm")(x) for n, x in (("q", q), ("k", k)))
        q, k, v = (x.reshape(B, H * W, self.heads, -1) for x in (q, k, v))
        y_BNAK = attend(q, k, v, bias_ANN, COSINE_SCALE)
        out = Linear(D, use_bias=False, dtype=self.dtype, kernel_init=_xavier, name="out")
        return out(y_BNAK.reshape(x_BHWD.shape))


class WindowAttention(nn.Module):
    """LayerNorm and attention within windows of `window` x `window` cells, x_BHWD -> y_BHWD.

    A learned bias for every offset (Swin, Liu et al. 2021), no shifts. Windows at the far edges
    are cut where the grid ends.
    """

    heads: int
    window: int
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BHWD):
        B, H, W, D = x_BHWD.shape
        h, w = min(self.window, H), min(self.window, W)
        rows, columns = -(-H // h), -(-W // w)
        whole = ((0, 0), (0, rows * h - H), (0, columns * w - W), (0, 0))

        def windows(x_BHWX):
            """[B, H, W, X] -> [B, R windows, N cells of each, X], zeros beyond the grid."""
            x = jnp.pad(x_BHWX, whole).reshape(-1, rows, h, columns, w, x_BHWX.shape[-1])
            return x.swapaxes(2, 3).reshape(-1, rows * columns, h * w, x_BHWX.shape[-1])

        qkv = _heads(self, x_BHWD, (B, H, W), bias=True)
        q, k, v = (
            windows(x.reshape(B, H, W, D)).reshape(B, rows * columns, h * w, self.heads, -1)
            for x in qkv
        )
        bias_RALM = TableBias(self.heads, self.window, name="bias")((h, w))[None]
        if any(max(side) for side in whole):
            beyond_RN = windows(np.ones((1, H, W, 1), np.float32))[0, :, :, 0] == 0
            bias_RALM = jnp.where(beyond_RN[:, None, None], MASKED, bias_RALM)
        y = attend(q, k, v, bias_RALM).reshape(B, rows, columns, h, w, D)
        y_BHWD = y.swapaxes(2, 3).reshape(B, rows * h, columns * w, D)[:, :H, :W]
        return Linear(D, dtype=self.dtype, kernel_init=_xavier, name="out")(y_BHWD)


def _heads(module, x, shape, bias):
    """LayerNorm, then q, k, v [*shape, A, K]."""
    h = LayerNorm(dtype=module.dtype, name="norm")(x)
    dense = dict(use_bias=bias, dtype=module.dtype, kernel_init=_xavier)
    projected = (Linear(x.shape[-1], name=name, **dense)(h) for name in ("q", "k", "v"))
    return [part.reshape(*shape, module.heads, -1) for part in projected]


class SpatialBlock(nn.Module):
    """Attention within a frame and feed-forward, each added to x_BHWD.

    kind: "t" is attention among all cells, "w" within windows.
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

    blocks: a letter each, "ttww" is two of all cells, then two of windows. Equal neighbours run as
    one scan with stacked parameters. bias_ANN: shared by all "t" blocks.
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
        for index, (kind, run) in enumerate(itertools.groupby(self.blocks)):
            length = len(list(run))
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

    x_BTHWD -> y_BTHWD, zeros around the frame and before the stream. Causal: it reads a frame and
    the two before. State: these two, [B, 2, H, W, D]; None is a stream of zeros. (The C-ViViT and
    OmniTokenizer that others released reshape lanes instead of transposing them here, which mixes
    the future into the past.)
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
        return bias_D + _convolve(seen, kernel), seen[:, T:]


@jax.custom_vjp
def _convolve(x_BTHWD, kernel):
    """Depth-wise 3 x 3 x 3 convolution, zeros around the frames but not around time."""
    return _correlate(_pad(x_BTHWD, time=0), kernel)


def _convolve_forward(x_BTHWD, kernel):
    return _convolve(x_BTHWD, kernel), (x_BTHWD, kernel)


def _convolve_backward(residuals, dy_BTHWD):
    """dx as a convolution, not as the sum of padded arrays that the gradient of slices is."""
    x_BTHWD, kernel = residuals
    # Fused into what reads it 27 times, an array would be computed as often.
    x, dy, padded = jax.lax.optimization_barrier(
        (_pad(x_BTHWD, time=0), dy_BTHWD, _pad(dy_BTHWD, time=2))
    )
    dx_BTHWD = _correlate(padded, kernel[::-1, ::-1, ::-1])
    taps = [(dy * window).sum((0, 1, 2, 3)) for window in _windows(x)]
    return jax.lax.optimization_barrier((dx_BTHWD, jnp.stack(taps).reshape(kernel.shape)))


_convolve.defvjp(_convolve_forward, _convolve_backward)


def _correlate(padded, kernel):
    """Sum over the 27 taps of a (3, 3, 3, 1, D) kernel times what it then covers, BTHWD."""
    return sum(tap_D * window for tap_D, window in zip(kernel.reshape(27, -1), _windows(padded)))


def _windows(padded):
    """The 27 views of [B, T + 2, H + 2, W + 2, D] that a 3 x 3 x 3 kernel has, each BTHWD."""
    T, H, W = (size - 2 for size in padded.shape[1:4])
    for t, h, w in itertools.product(range(3), repeat=3):
        yield padded[:, t : t + T, h : h + H, w : w + W]


def _pad(x_BTHWD, time):
    """Zeros around the frames, one cell wide, and `time` of them before and after."""
    return jnp.pad(x_BTHWD, ((0, 0), (time, time), (1, 1), (1, 1), (0, 0)))


class TemporalBlock(nn.Module):
    """PEG, temporal mixer at every location and feed-forward, each added to x_BTHWD.

    mixer: its name in `mixers.MIXERS` and its own options.
    """

    heads: int
    hidden: int
    mixer: Mapping[str, Any]
    peg: bool = True
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTHWD, state=None):
        B, T, H, W, D = x_BTHWD.shape
        seen, memory = (None, None) if state is None else state
        if self.peg:
            y_BTHWD, seen = PEG(self.dtype, name="peg")(x_BTHWD, seen)
            x_BTHWD = x_BTHWD + y_BTHWD
        options = dict(self.mixer)
        mixer = MIXERS[options.pop("name")](
            width=D, heads=self.heads, dtype=self.dtype, name="temporal", **options
        )
        h_BTHWD = LayerNorm(dtype=self.dtype, name="norm")(x_BTHWD)
        lanes_BTND = h_BTHWD.reshape(B, T, H * W, D).swapaxes(1, 2).reshape(B * H * W, T, 1, D)
        lanes_BTND, memory = mixer(lanes_BTND, memory)
        y_BTHWD = lanes_BTND.reshape(B, H * W, T, D).swapaxes(1, 2).reshape(x_BTHWD.shape)
        x_BTHWD = x_BTHWD + y_BTHWD
        x_BTHWD = x_BTHWD + FeedForward(self.hidden, self.dtype, name="mlp")(x_BTHWD)
        return shard(x_BTHWD, "BTHWD"), (seen, memory)


class TemporalTransformer(nn.Module):
    """Causal blocks over time and a LayerNorm, x_BTHWD, state -> x_BTHWD, state.

    State: that of every block, stacked along a leading depth axis as the parameters are.
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
        layers = nn.scan(
            nn.remat(TemporalBlock, prevent_cse=False) if self.remat else TemporalBlock,
            length=self.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            unroll=1 if self.remat else self.depth,
        )(
            heads=self.heads,
            hidden=self.hidden,
            mixer=self.mixer,
            peg=self.peg,
            dtype=self.dtype,
            name="blocks",
        )
        x_BTHWD, state = layers(x_BTHWD, state)
        return LayerNorm(dtype=self.dtype, name="norm")(x_BTHWD), state


def inflate(name, params, share):
    """Parameters of a `Stem` ("embed") or a `Head` ("pixels") whose groups do as its first frames.

    A stem reads every frame of a group by the image's map, times a share that sums to 1: "average"
    or "first" (Carreira and Zisserman 2017). A head writes every frame by the image's map. So a
    group that stands still is worth its image.
    """
    channels, image, group = 3, params["image"], params["group"]
    axis = 0 if name == "embed" else 1
    t = group["kernel"].shape[axis] // image["kernel"].shape[axis]

    def grow(x, axis, weight_T):
        """One axis of [C P] patches to [C T P]."""
        x = np.moveaxis(np.asarray(x), axis, 0)
        x = x.reshape(channels, 1, -1, *x.shape[1:])
        x = x * np.reshape(weight_T, (-1, *[1] * (x.ndim - 2)))
        return np.moveaxis(x.reshape(-1, *x.shape[3:]), 0, axis).astype(np.float32)

    same_T = np.ones(t)
    if name == "pixels":
        grown = {"kernel": grow(image["kernel"], 1, same_T), "bias": grow(image["bias"], 0, same_T)}
        return {**params, "group": grown}
    share_T = same_T / t if share == "average" else np.eye(t)[0]
    grown = {"group": {**image, "kernel": grow(image["kernel"], 0, share_T)}}
    if "image_norm" in params:
        pixels = {part: grow(x, 0, same_T) for part, x in params["image_pixels"].items()}
        grown |= {"group_pixels": pixels, "group_norm": params["image_norm"]}
    return {**params, **grown}

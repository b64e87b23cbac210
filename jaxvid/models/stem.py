"""The ends of the tokenizers: pixels to tokens and back.

The first frame of a stream is one latent frame; each later latent frame holds `t_patch` frames.
"""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.errors import UserError
from jaxvid.layers.linear import Linear
from jaxvid.layers.patch import haar, patchify, unhaar, unpatchify
from jaxvid.models.blocks import LayerNorm

PATCHIFY = {"linear": (patchify, unpatchify), "haar": (haar, unhaar)}
STEMS = ("split", "shared")
INFLATIONS = ("average", "first")

_xavier = nn.initializers.xavier_uniform()


def latents_for_frames(frames: int, t_patch: int) -> int:
    """Latent frames of a clip: one for the first frame, one for every `t_patch` frames after it.

    Raises UserError unless the last group is whole.
    """
    _check_groups(frames, frames - 1, t_patch)
    return 1 + (frames - 1) // t_patch


def frames_for_latents(latents: int, t_patch: int) -> int:
    """Frames of a clip of this many latent frames."""
    return 1 + (latents - 1) * t_patch


def grid_of(size: tuple[int, int], patch: int) -> tuple[int, int]:
    """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError unless patches fit."""
    if any(side % patch or side < patch for side in size):
        raise UserError(
            f"patch={patch}: does not divide frames of {size[0]} x {size[1]} pixels; "
            "use a divisor of both sides"
        )
    return size[0] // patch, size[1] // patch


def check_stem(stem: str, patchify: str, patch: int, t_patch: int) -> None:
    """Raise UserError for fields of a `Stem` and its `Head` that cannot be."""
    checks.choose("stem", stem, STEMS)
    checks.choose("patchify", patchify, PATCHIFY)
    for field, side in (("patch", patch), ("t_patch", t_patch)):
        checks.at_least(field, side, 1)
        checks.require(
            patchify != "haar" or side & (side - 1) == 0,
            field,
            side,
            "Haar bands need powers of two; use one, or patchify=linear",
        )


def _check_groups(frames, after_first, t_patch):
    """Raise UserError unless the frames after the first of the stream form whole groups."""
    if after_first % t_patch or after_first < 0:
        fewer = frames - after_first % t_patch
        choices = [str(choice) for choice in (fewer, fewer + t_patch) if choice > 0]
        raise UserError(
            f"frames={frames}: after the first frame, each latent holds {t_patch} frames; "
            f"use {' or '.join(choices)}"
        )


class Stem(nn.Module):
    """video_BTHWC -> x_BTHWD: square patches of pixels, over 1 frame first, then over t_patch.

    is_first: the video begins with the first frame of the stream. stem: "split" gives that frame a
    linear map of its own (C-ViViT); "shared" repeats it to fill a group (Cosmos), so that images
    and video train the same weights. patchify: "linear" or "haar". patch_norm: LayerNorm of the
    pixels of a patch and of its token, as in the published networks; it hides the brightness of a
    flat patch. Raises UserError unless the frames form whole patches and groups.
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
        to_patches, _ = PATCHIFY[self.patchify]
        x_BTHWD = to_patches(video_BTHWC.astype(self.dtype), (t_patch, self.patch, self.patch))
        embed = Linear(self.width, dtype=self.dtype, kernel_init=_xavier, name=name)
        if not self.patch_norm:
            return embed(x_BTHWD)
        x_BTHWD = embed(LayerNorm(dtype=self.dtype, name=f"{name}_pixels")(x_BTHWD))
        return LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x_BTHWD)


class Head(nn.Module):
    """x_BTHWD -> video_BTHWC float32, the inverse of a `Stem` with the same options.

    With a shared stem, the first frame is the last one of the first group.
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
        _, from_patches = PATCHIFY[self.patchify]
        patch = (t_patch, self.patch, self.patch)
        features = self.channels * t_patch * self.patch**2
        x = Linear(features, dtype=jnp.float32, kernel_init=_xavier, name=name)(x_BTHWD)
        return from_patches(x, patch)


def inflate(name: str, params: Mapping, share: str) -> dict[str, jax.Array]:
    """Parameters of a split `Stem` or `Head` whose map of groups is made from that of first frames.

    name: "embed" for a stem, "pixels" for a head. The map of a stem applies the image's map to
    every frame of a group, times shares that sum to 1: equal ones for "average", all of it to the
    first frame for "first" (Carreira and Zisserman 2017). The map of a head writes every frame with
    the image's map. A group of equal frames then gives the token of one such frame.
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

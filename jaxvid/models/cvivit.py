"""C-ViViT: the causal video tokenizer of Phenaki (Villegas et al. 2023), causal to the bit."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxvid.layers.bias import ContinuousBias
from jaxvid.layers.linear import Linear
from jaxvid.models import blocks


class CViViT(nn.Module):
    """Video in [-1, 1] <-> latents, of the first frame and of every `t_patch` frames after it.

    encode: video_BTHWC, state -> z_BTHWZ float32 with Z = features, state
    decode: z_BTHWZ with Z = channels, state -> video_BTHWC float32, state

    Encoding is a transformer within each frame, then one over time at each location; decoding the
    reverse. Both obey the streaming contract, in whole latents: state None begins with the first
    frame, and a later piece holds a multiple of `t_patch` frames (UserError). Frames are rectangles
    of any size that `patch` divides (UserError).

    width D, heads A. encode_blocks, decode_blocks: a letter for each layer in space, "t" attention
    among all cells of a frame, "w" in windows of `window` cells a side. position: in "t" layers,
    "rel" is one continuous bias by offset for both sides, "rope" turns by row and column.
    temporal_depth: of each side. mixer: over time, a name in `mixers.MIXERS` and its options. peg:
    a causal convolution before it. mlp_ratio: hidden units of the GEGLU, in widths. stem, patchify,
    patch_norm: see `blocks.Stem`.
    """

    features: int
    channels: int
    patch: int = 8
    t_patch: int = 2
    width: int = 512
    heads: int = 8
    encode_blocks: str = "tttt"
    decode_blocks: str = "tttt"
    window: int = 8
    position: str = "rel"
    temporal_depth: int = 4
    mixer: Mapping[str, Any] = FrozenDict(name="alibi")
    peg: bool = True
    mlp_ratio: float = 8 / 3
    stem: str = "split"
    patchify: str = "linear"
    patch_norm: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    def setup(self):
        shared = dict(
            heads=self.heads,
            hidden=int(self.mlp_ratio * self.width),
            dtype=self.dtype,
            remat=self.remat,
        )
        space = dict(rotary=self.position == "rope", window=self.window, **shared)
        time = dict(depth=self.temporal_depth, mixer=self.mixer, peg=self.peg, **shared)
        cut = dict(patch=self.patch, t_patch=self.t_patch, stem=self.stem, patchify=self.patchify)
        if self.position == "rel":
            self.bias = ContinuousBias(self.heads, self.width)
        self.embed = blocks.Stem(self.width, patch_norm=self.patch_norm, dtype=self.dtype, **cut)
        self.encode_space = blocks.SpatialTransformer(self.encode_blocks, **space)
        self.encode_time = blocks.TemporalTransformer(**time)
        self.to_latent = Linear(self.features, dtype=jnp.float32)
        self.from_latent = Linear(self.width, dtype=self.dtype)
        self.decode_time = blocks.TemporalTransformer(**time)
        self.decode_space = blocks.SpatialTransformer(self.decode_blocks, **space)
        self.pixels = blocks.Head(**cut)

    def encode(self, video_BTHWC, state=None):
        """See the class; no frames change nothing."""
        B, T, *size, _ = video_BTHWC.shape
        if T == 0:
            return jnp.zeros((B, 0, *self.grid(size), self.features)), state
        x_BTHWD = self.embed(video_BTHWC, is_first=state is None)
        x_BTHWD = self.encode_space(x_BTHWD, self._bias(x_BTHWD))
        x_BTHWD, state = self.encode_time(x_BTHWD, state)
        return self.to_latent(x_BTHWD), state

    def decode(self, z_BTHWZ, state=None):
        """See the class; no latents change nothing."""
        B, T, H, W, _ = z_BTHWZ.shape
        if T == 0:
            return jnp.zeros((B, 0, H * self.patch, W * self.patch, 3)), state
        x_BTHWD, after = self.decode_time(self.from_latent(z_BTHWZ), state)
        x_BTHWD = self.decode_space(x_BTHWD, self._bias(x_BTHWD))
        return self.pixels(x_BTHWD, is_first=state is None), after

    def __call__(self, video_BTHWC):
        """Makes all parameters, from a video of 1 + t_patch frames or more."""
        z_BTHWZ, _ = self.encode(video_BTHWC)
        return self.decode(z_BTHWZ[..., : self.channels])

    def _bias(self, x_BTHWD):
        return self.bias(x_BTHWD.shape[2:4]) if self.position == "rel" else None

    def grid(self, size):
        """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError if none fit."""
        return blocks.grid_of(size, self.patch)

    def latents_for_frames(self, frames):
        """Latent frames of a clip; UserError where the last group is not whole."""
        return blocks.latents_for_frames(frames, self.t_patch)

    def frames_for_latents(self, latents):
        """Frames of a clip of so many latent frames."""
        return blocks.frames_for_latents(latents, self.t_patch)

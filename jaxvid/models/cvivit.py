"""C-ViViT: the causal video tokenizer of Phenaki (Villegas et al. 2023), causal to the bit."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.core import FrozenDict

from jaxvid import checks, mixers
from jaxvid.errors import within
from jaxvid.layers import masks
from jaxvid.layers.bias import ContinuousBias
from jaxvid.layers.linear import Linear
from jaxvid.models import blocks, stem

POSITIONS = ("rel", "rope")


class CViViT(nn.Module):
    """Video in [-1, 1] <-> latents, one for the first frame, then one for every `t_patch` frames.

    encode: video_BTHWC, state -> z_BTHWZ float32 with Z = features, state
    decode: z_BTHWZ with Z = channels, state -> video_BTHWC float32, state

    Encoding is a transformer within each frame, then one over time at each location; decoding is
    the reverse. Both obey the streaming contract in whole latents: a stream begins (state None)
    with the first frame, and later pieces hold multiples of `t_patch` frames (UserError). `patch`
    must divide both sides of the frames, which may differ (UserError). Fields that cannot be raise
    UserError at construction.

    width D, heads A. encode_blocks, decode_blocks: a letter for each spatial layer, "t" for
    attention among all cells of a frame, "w" for attention in windows of `window` cells a side.
    position: of the "t" layers; "rel" is one continuous bias by offset for encoder and decoder,
    "rope" rotates by row and column. temporal_depth: temporal layers of the encoder, and of the
    decoder. mixer: over time, a name in `mixers.MIXERS` and its options. peg: put a causal
    convolution before the mixer. mlp_ratio: hidden units of the GEGLU, in widths. stem, patchify,
    patch_norm: see `stem.Stem`.
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

    def __post_init__(self):
        stem.check_stem(self.stem, self.patchify, self.patch, self.t_patch)
        blocks.check_layers(self.width, self.heads, self.mlp_ratio)
        blocks.check_blocks("encode_blocks", self.encode_blocks)
        blocks.check_blocks("decode_blocks", self.decode_blocks)
        masks.check_window(self.window)
        checks.choose("position", self.position, POSITIONS)
        with within("mixer"):
            mixers.check_options(self.mixer, self.heads)
        mixers.check_depth("temporal_depth", self.temporal_depth, self.mixer.get("every", 0))
        super().__post_init__()

    def setup(self):
        shared = dict(
            heads=self.heads,
            hidden=int(self.mlp_ratio * self.width),
            dtype=self.dtype,
            remat=self.remat,
        )
        space = dict(rotary=self.position == "rope", window=self.window, **shared)
        time = dict(depth=self.temporal_depth, mixer=self.mixer, peg=self.peg, **shared)
        ends = dict(patch=self.patch, t_patch=self.t_patch, stem=self.stem, patchify=self.patchify)
        if self.position == "rel":
            self.bias = ContinuousBias(self.heads, self.width)
        self.embed = stem.Stem(self.width, patch_norm=self.patch_norm, dtype=self.dtype, **ends)
        self.encode_space = blocks.SpatialTransformer(self.encode_blocks, **space)
        self.encode_time = blocks.TemporalTransformer(**time)
        self.to_latent = Linear(self.features, dtype=jnp.float32)
        self.from_latent = Linear(self.width, dtype=self.dtype)
        self.decode_time = blocks.TemporalTransformer(**time)
        self.decode_space = blocks.SpatialTransformer(self.decode_blocks, **space)
        self.pixels = stem.Head(**ends)

    def encode(self, video_BTHWC, state=None):
        """See the class. An empty video leaves the state as it is."""
        B, T, *size, _ = video_BTHWC.shape
        if T == 0:
            return jnp.zeros((B, 0, *self.grid(size), self.features)), state
        x_BTHWD = self.embed(video_BTHWC, is_first=state is None)
        x_BTHWD = self.encode_space(x_BTHWD, self._bias(x_BTHWD))
        x_BTHWD, state = self.encode_time(x_BTHWD, state)
        return self.to_latent(x_BTHWD), state

    def decode(self, z_BTHWZ, state=None):
        """See the class. No latents leave the state as it is."""
        B, T, H, W, _ = z_BTHWZ.shape
        if T == 0:
            return jnp.zeros((B, 0, H * self.patch, W * self.patch, 3)), state
        x_BTHWD, after = self.decode_time(self.from_latent(z_BTHWZ), state)
        x_BTHWD = self.decode_space(x_BTHWD, self._bias(x_BTHWD))
        return self.pixels(x_BTHWD, is_first=state is None), after

    def __call__(self, video_BTHWC):
        """Make all parameters, from a video of 1 + t_patch frames or more."""
        z_BTHWZ, _ = self.encode(video_BTHWC)
        return self.decode(z_BTHWZ[..., : self.channels])

    def _bias(self, x_BTHWD):
        return self.bias(x_BTHWD.shape[2:4]) if self.position == "rel" else None

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the tokens of frames of `size` (H, W) pixels; UserError unless patches fit."""
        return stem.grid_of(size, self.patch)

    def latents_for_frames(self, frames: int) -> int:
        """Latent frames of a clip; UserError unless the last group is whole."""
        return stem.latents_for_frames(frames, self.t_patch)

    def frames_for_latents(self, latents: int) -> int:
        """Frames of a clip of this many latent frames."""
        return stem.frames_for_latents(latents, self.t_patch)

"""AR-VAE: a few latent tokens per frame, decoded with the past (Sun et al. 2025, section 3.1)."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.errors import UserError
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.bias import DistanceBias
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.layers.linear import Linear
from jaxvid.layers.patch import patchify, unpatchify
from jaxvid.mixers import cache as kv
from jaxvid.mixers import check_depth
from jaxvid.mixers.attention import Attention
from jaxvid.models import blocks, stem
from jaxvid.parallel.sharding import shard

MAX_TOKENS = 2**16  # of a frame
_normal = nn.initializers.normal(0.02)


class LatentAttention(nn.Module):
    """The tokens of a frame attend to the latents of that frame and of the frames before it.

    x_BTND, latent_BTMD, state -> y_BTND, state. Positions are rotary, by frame. State: a `KVCache`
    of the latents. window: frames that a frame sees, its own included; None = all of the past.
    """

    heads: int
    window: int | None = None
    dtype: Any = jnp.float32

    @nn.compact
    def __call__(self, x_BTND, latent_BTMD, state=None):
        B, T, N, D = x_BTND.shape
        M = latent_BTMD.shape[2]
        dense = dict(dtype=self.dtype, kernel_init=nn.initializers.xavier_uniform())
        q = Linear(D, name="q", **dense)(x_BTND).reshape(B, T, N, self.heads, -1)
        k, v = (
            Linear(D, name=name, **dense)(latent_BTMD).reshape(B, T, M, self.heads, -1)
            for name in ("k", "v")
        )
        q, k = (nn.RMSNorm(dtype=self.dtype, name=f"{n}_norm")(x) for n, x in (("q", q), ("k", k)))
        if state is None:
            nothing = jnp.zeros((B, 0, self.heads, D // self.heads), self.dtype)
            state = kv.start(nothing, nothing, M)
        frame_T = kv.next_frames(state, T)
        angle_T1K = rotary_angles(frame_T, (1, 1), D // self.heads)
        q, k = rotate(q, angle_T1K), rotate(k, angle_T1K)
        k_BMAK, v_BMAK, position_M = kv.extend(state, k, v, frame_T)
        y_BLAK = attention(
            shard(q.reshape(B, T * N, *q.shape[3:]), "BLAK"),
            shard(k_BMAK, "BMAK"),
            shard(v_BMAK, "BMAK"),
            q_position_L=frame_T.repeat(N),
            k_position_M=position_M,
            allow=masks.causal(self.window),
        )
        y_BTND = Linear(D, name="out", **dense)(y_BLAK.reshape(x_BTND.shape))
        return y_BTND, kv.append(state, k, v, window=self.window, sinks=0)


class DecoderBlock(nn.Module):
    """Attention of pixel tokens over time, of all tokens to latents, and within each frame.

    x_BTND, state -> x_BTND, state. The last `latents` of the N tokens are latents, the others stand
    for pixels. bias_ANN is added to the scores within a frame. The gates of both temporal layers
    start at zero, so that the block starts as a block within frames.
    """

    heads: int
    hidden: int
    latents: int
    window: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x_BTND, state=None, bias_ANN=None):
        B, T, N, D = x_BTND.shape
        pixel_state, latent_state = (None, None) if state is None else state

        def gated(name, y):
            return self.param(f"{name}_gate", nn.initializers.zeros, (D,)).astype(y.dtype) * y

        def normalized(name, x):
            return blocks.LayerNorm(dtype=self.dtype, name=f"{name}_norm")(x)

        x_BTPD, latent_BTMD = jnp.split(x_BTND, [N - self.latents], axis=2)
        P = x_BTPD.shape[2]
        lanes = normalized("fine", x_BTPD).swapaxes(1, 2).reshape(B * P, T, 1, D)
        over_time = Attention(
            D, self.heads, window=self.window, dtype=self.dtype, name="fine_temporal"
        )
        lanes, pixel_state = over_time(lanes, pixel_state)
        x_BTPD = x_BTPD + gated("fine", lanes.reshape(B, P, T, D).swapaxes(1, 2))
        x_BTND = jnp.concatenate([x_BTPD, latent_BTMD], axis=2)

        to_latents = LatentAttention(self.heads, self.window, self.dtype, name="coarse_temporal")
        y_BTND, latent_state = to_latents(
            normalized("coarse", x_BTND), normalized("latent", latent_BTMD), latent_state
        )
        x_BTND = x_BTND + gated("coarse", y_BTND)

        in_frame = blocks.SpatialBlock("t", self.heads, self.hidden, dtype=self.dtype, name="frame")
        x_BHWD, _ = in_frame(x_BTND.reshape(B * T, 1, N, D), bias_ANN)
        return x_BHWD.reshape(B, T, N, D), (pixel_state, latent_state)


class ARVAE(nn.Module):
    """Video in [-1, 1] <-> `tokens` latents per frame, without a grid (TiTok, Yu et al. 2024).

    encode: video_BTHWC, state -> z_BTHWZ float32 with H = 1, W = tokens, Z = features, state
    decode: z_BTHWZ with Z = channels, state -> video_BTHWC float32, state

    The encoder is a transformer over the patches of one frame and learned queries; it returns the
    state that it is given. The decoder adds learned pixel tokens to the latents of each frame. They
    attend to the past at their own place and to the past latents; both make up the state. Learned
    positions allow frames of one size (H, W) only (UserError). Fields that cannot be raise
    UserError at construction. unit: scale latents to unit length before decoding, for the Gaussian
    latents of AR-Diffusion. depth: layers of the encoder, and of the decoder. window: frames that
    the decoder of a frame sees, its own included; None = all of the past.

    Two things differ from the released model, whose decoder ends in a frozen MaskGIT-VQGAN and
    whose weights start from those of TiTok, after a long training. This decoder ends in a linear
    map, and the attention of latents starts near a place of the frame (`layers.bias.DistanceBias`).
    Without that bias, what distinguishes pixels has to pass two attentions that both start as a
    mean over the frame, so that for a long time the model learns only the mean.
    """

    features: int
    channels: int
    size: tuple[int, int]
    patch: int = 16
    tokens: int = 32
    width: int = 512
    heads: int = 8
    depth: int = 8
    mlp_ratio: float = 8 / 3
    window: int | None = None
    unit: bool = False
    dtype: Any = jnp.float32
    remat: bool = False

    def __post_init__(self):
        blocks.check_layers(self.width, self.heads, self.mlp_ratio)
        checks.at_least("patch", self.patch, 1)
        checks.at_least("tokens", self.tokens, 1, at_most=MAX_TOKENS)
        check_depth("depth", self.depth)
        if self.window is not None:
            masks.check_window(self.window)
        super().__post_init__()

    def setup(self):
        hidden = int(self.mlp_ratio * self.width)
        shared = dict(heads=self.heads, hidden=hidden, dtype=self.dtype)
        cells = np.prod(stem.grid_of(self.size, self.patch))
        self.bias = DistanceBias(self.heads, self.tokens)
        self.embed = Linear(self.width, dtype=self.dtype)
        self.encode_position = self.param("encode_position", _normal, (cells, self.width))
        self.query = self.param("query", _normal, (self.tokens, self.width))
        self.encoder = blocks.SpatialTransformer("t" * self.depth, remat=self.remat, **shared)
        self.to_latent = Linear(self.features, dtype=jnp.float32)
        self.from_latent = Linear(self.width, dtype=self.dtype)
        self.latent_position = self.param("latent_position", _normal, (self.tokens, self.width))
        self.decode_position = self.param("decode_position", _normal, (cells, self.width))
        self.decoder = nn.scan(
            nn.remat(DecoderBlock, prevent_cse=False) if self.remat else DecoderBlock,
            length=self.depth,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast),
            unroll=1 if self.remat else self.depth,
        )(latents=self.tokens, window=self.window, **shared)
        self.norm = blocks.LayerNorm(dtype=self.dtype)
        self.pixels = Linear(3 * self.patch**2, dtype=jnp.float32)

    def encode(self, video_BTHWC, state=None):
        """See the class. An empty video leaves the state as it is."""
        B, T, *size, _ = video_BTHWC.shape
        self.grid(size)
        if T == 0:
            return jnp.zeros((B, 0, 1, self.tokens, self.features)), state
        x_BTHWP = patchify(video_BTHWC.astype(self.dtype), (1, self.patch, self.patch))
        x_BTND = self.embed(x_BTHWP.reshape(B, T, -1, x_BTHWP.shape[-1]))
        x_BTND = x_BTND + self.encode_position.astype(self.dtype)
        query_BTMD = jnp.broadcast_to(
            self.query.astype(self.dtype), (B, T, self.tokens, self.width)
        )
        x_BTHWD = jnp.concatenate([x_BTND, query_BTMD], axis=2)[:, :, None]
        x_BTHWD = self.encoder(x_BTHWD, self._bias())
        return self.to_latent(x_BTHWD[:, :, :, -self.tokens :]), state

    def decode(self, z_BTHWZ, state=None):
        """See the class. No latents leave the state as it is."""
        B, T = z_BTHWZ.shape[:2]
        if T == 0:
            return jnp.zeros((B, 0, *self.size, 3)), state
        if self.unit:
            length = jnp.linalg.norm(z_BTHWZ, axis=-1, keepdims=True)
            z_BTHWZ = z_BTHWZ / jnp.maximum(length, 1e-12)
        latent_BTMD = self.from_latent(z_BTHWZ)[:, :, 0] + self.latent_position.astype(self.dtype)
        place_ND = self.decode_position.astype(self.dtype)
        place_BTND = jnp.broadcast_to(place_ND, (B, T, *place_ND.shape))
        x_BTND = jnp.concatenate([place_BTND, latent_BTMD], axis=2)
        x_BTND, state = self.decoder(x_BTND, state, self._bias())
        x_BTND = self.pixels(self.norm(x_BTND[:, :, : -self.tokens]))
        rows, columns = stem.grid_of(self.size, self.patch)
        x_BTHWP = x_BTND.reshape(B, T, rows, columns, -1)
        return unpatchify(x_BTHWP, (1, self.patch, self.patch)), state

    def __call__(self, video_BTHWC):
        """Make all parameters."""
        z_BTHWZ, _ = self.encode(video_BTHWC)
        return self.decode(z_BTHWZ[..., : self.channels])

    def _bias(self):
        return self.bias(stem.grid_of(self.size, self.patch))

    def grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """(1, tokens) for frames of `size` (H, W) pixels; UserError unless that is its own size."""
        if tuple(size) != tuple(self.size):
            raise UserError(
                f"size={tuple(size)}: this tokenizer is made for frames of {tuple(self.size)}; "
                "use that size, or train another tokenizer"
            )
        return 1, self.tokens

    def latents_for_frames(self, frames: int) -> int:
        """As many latent frames as frames."""
        return frames

    def frames_for_latents(self, latents: int) -> int:
        """As many frames as latent frames."""
        return latents

"""Tokenizers: their protocol, network and quantizer as one, whole clips, frozen at unit scale."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.core import FrozenDict

PIECE = 32  # frames, about, that pass through the stream of a tokenizer at once


class VideoTokenizer:
    """The protocol of all tokenizers: video <-> latents, as streams.

    encode and decode obey the streaming contract in whole latent frames; state None is the start of
    a stream. Latents are flat within a frame, z_BTNZ; `grid` gives the rows and columns. The
    defaults are those of a tokenizer that has no weights and encodes each frame alone.

    channels: Z of the latents. params: frozen weights, the argument of the methods; empty if
    there are none or if they are trained. digest: a name that changes with the frozen weights,
    "" without any.
    """

    channels: int
    params: Any = FrozenDict()
    digest: str = ""

    def grid(self, size: int | tuple[int, int]) -> tuple[int, int]:
        """(H, W) of the tokens of frames of `size` pixels, one number or (H, W); UserError unless
        such frames can be encoded."""
        raise NotImplementedError

    def latents_for_frames(self, frames: int) -> int:
        """Number of latent frames of a clip; UserError unless the last latent frame is whole."""
        return frames

    def frames_for_latents(self, latents: int) -> int:
        """Number of frames of a clip of this many latent frames."""
        return latents

    def pieces(self, frames: int, about: int = PIECE) -> list[int]:
        """Lengths of the pieces that a stream of `frames` frames is cut into, in whole latents.

        The first piece holds the first frame and about `about` more, the later ones about `about`
        each, and the last one the rest.
        """
        group = self.frames_for_latents(2) - 1
        later = max(about // group, 1) * group
        whole, rest = divmod(frames - 1, later)
        if not whole:
            return [frames]
        return [1 + later, *[later] * (whole - 1), *([rest] if rest else [])]

    def encode(self, params: Any, video_BTHWC: jax.Array, state: Any = None):
        """The next frames of a stream, in [-1, 1] -> (z_BTNZ, state)."""
        raise NotImplementedError

    def decode(self, params: Any, z_BTNZ: jax.Array, grid: tuple[int, int], state: Any = None):
        """The next latents of a stream, with (H, W) tokens -> (video_BTHWC, state)."""
        raise NotImplementedError

    def from_stored(self, params: Any, stored: jax.Array) -> jax.Array:
        """Latents float32 or ids int32 [B, T, N], as stored on disk -> z_BTNZ as from `encode`."""
        del params
        return stored


class Tokenizer(VideoTokenizer):
    """A network and a quantizer, to be trained.

    network: `CViViT`, `OmniTokenizer`, `ARVAE` or `PeerTokenizer`, with the features and channels
    of quantizer, one of `layers.quantize`. Methods that compute take the weights, {"network",
    "codebook"}, as their argument. A latent is the output of the quantizer, and the mean if latents
    are Gaussian.
    """

    def __init__(self, network: nn.Module, quantizer: Any):
        self.network, self.quantizer = network, quantizer
        self.channels = quantizer.channels

    def grid(self, size):
        """See `VideoTokenizer`."""
        return self.network.grid((size, size) if isinstance(size, int) else size)

    def latents_for_frames(self, frames):
        """See `VideoTokenizer`."""
        return self.network.latents_for_frames(frames)

    def frames_for_latents(self, latents):
        """See `VideoTokenizer`."""
        return self.network.frames_for_latents(latents)

    def init(self, rng: jax.Array, size: tuple[int, int]) -> tuple[dict, dict]:
        """(params, carried part of the codebook) for frames of (H, W) pixels."""
        rng_network, rng_codebook = jax.random.split(rng)
        video_BTHWC = jnp.zeros((1, self.frames_for_latents(2), *size, 3))
        network = self.network.init(rng_network, video_BTHWC)["params"]
        codebook, carried = self.quantizer.init(rng_codebook)
        return {"network": network, "codebook": codebook}, carried

    def features(self, params, video_BTHWC, state=None):
        """video in [-1, 1] -> (input of the quantizer, float32 [B, T, N, features], state)."""
        z_BTHWZ, state = self._apply(params, "encode", video_BTHWC, state)
        B, T, H, W, Z = z_BTHWZ.shape
        return z_BTHWZ.reshape(B, T, H * W, Z), state

    def encode(self, params, video_BTHWC, state=None):
        """See `VideoTokenizer`; float32."""
        z_BTNZ, state = self.features(params, video_BTHWC, state)
        return self.quantizer(z_BTNZ, params["codebook"])[0], state

    def tokens(self, params, video_BTHWC, state=None):
        """The next frames of a stream, in [-1, 1] -> (ids_BTN int32, state)."""
        z_BTNZ, state = self.features(params, video_BTHWC, state)
        return self.quantizer(z_BTNZ, params["codebook"])[1], state

    def from_stored(self, params, stored):
        """See `VideoTokenizer`."""
        is_ids = jnp.issubdtype(stored.dtype, jnp.integer)
        return self.quantizer.lookup(stored, params["codebook"]) if is_ids else stored

    def decode(self, params, z_BTNZ, grid, state=None):
        """See `VideoTokenizer`; float32."""
        B, T, _, Z = z_BTNZ.shape
        return self._apply(params, "decode", z_BTNZ.reshape(B, T, *grid, Z), state)

    def _apply(self, params, method, *arguments):
        return self.network.apply({"params": params["network"]}, *arguments, method=method)


class FrozenTokenizer(VideoTokenizer):
    """A trained tokenizer whose latents have unit scale, as diffusion needs them.

    encode gives (z - mean_Z) / std, and decode undoes it first. All channels share one std, so that
    channels of small variance, which say little, stay small. params: the weights of a tokenizer
    run, {"network", "codebook", "latents"}; "latents" holds the `moments` measured during training.
    digest: see `runs.open_tokenizer`. codes: size of the vocabulary, 0 if latents are Gaussian.
    """

    def __init__(self, tokenizer: Tokenizer, params: Any, digest: str):
        self.tokenizer, self.params, self.digest = tokenizer, params, digest
        self.channels, self.codes = tokenizer.channels, tokenizer.quantizer.size

    def tokens(self, params, video_BTHWC, state=None):
        """See `Tokenizer`."""
        return self.tokenizer.tokens(params, video_BTHWC, state)

    def grid(self, size):
        """See `VideoTokenizer`."""
        return self.tokenizer.grid(size)

    def latents_for_frames(self, frames):
        """See `VideoTokenizer`."""
        return self.tokenizer.latents_for_frames(frames)

    def frames_for_latents(self, latents):
        """See `VideoTokenizer`."""
        return self.tokenizer.frames_for_latents(latents)

    def encode(self, params, video_BTHWC, state=None):
        """See `VideoTokenizer`; float32 of unit scale."""
        z_BTNZ, state = self.tokenizer.encode(params, video_BTHWC, state)
        return self._standardize(params, z_BTNZ), state

    def from_stored(self, params, stored):
        """See `VideoTokenizer`; stored latents have the scale of the tokenizer."""
        return self._standardize(params, self.tokenizer.from_stored(params, stored))

    def decode(self, params, z_BTNZ, grid, state=None):
        """See `VideoTokenizer`; latents are of unit scale."""
        mean_Z, std = self._scale(params)
        return self.tokenizer.decode(params, mean_Z + std * z_BTNZ, grid, state)

    def _standardize(self, params, z_BTNZ):
        mean_Z, std = self._scale(params)
        return (z_BTNZ - mean_Z) / std

    def _scale(self, params):
        return params["latents"]["mean_Z"], jnp.sqrt(params["latents"]["var"])


class Encoded(NamedTuple):
    """A clip as encoded by `Codec`: z_BTHWZ float32, quantized, and its ids_BTHW int32.

    Gaussian latents have no ids; ids_BTHW is None.
    """

    z_BTHWZ: Any
    ids_BTHW: Any


class Codec(nn.Module):
    """The network and the quantizer of a `Tokenizer` as one Flax module, for whole clips.

    encode: video_BTHWC in [-1, 1] -> Encoded
    decode: z_BTHWZ, or an Encoded -> video_BTHWC float32

    Its parameters are the weights of a `Tokenizer`, {"network", "codebook"}. To stream, use them
    with `Tokenizer(codec.network, codec.quantizer)`.
    """

    network: nn.Module
    quantizer: Any

    def setup(self):
        self.codebook = self.param("codebook", self._init_codebook)

    def __call__(self, video_BTHWC):
        """Make all parameters, from a clip of two latent frames or more; return it rebuilt."""
        return self.decode(self.encode(video_BTHWC))

    def encode(self, video_BTHWC):
        """See the class."""
        z_BTHWZ, _ = self.network.encode(video_BTHWC)
        z_BTHWZ, ids_BTHW, _ = self.quantizer(z_BTHWZ, self.codebook)
        return Encoded(z_BTHWZ, ids_BTHW)

    def decode(self, z_BTHWZ):
        """See the class."""
        if isinstance(z_BTHWZ, Encoded):
            z_BTHWZ = z_BTHWZ.z_BTHWZ
        return self.network.decode(z_BTHWZ)[0]

    def _init_codebook(self, rng):
        trained, carried = self.quantizer.init(rng)
        return {**trained, **carried}


def moments(channels: int) -> dict[str, jax.Array]:
    """Moments of no latents yet: count [], mean_Z, and var [], the mean variance of a channel."""
    return {"count": jnp.zeros(()), "mean_Z": jnp.zeros(channels), "var": jnp.ones(())}


def update_moments(measured: dict, z_BTNZ: jax.Array, decay: float = 0.99) -> dict:
    """The `moments` after one more batch: plain means at first, then exponential ones."""
    share = jnp.maximum(1 / (1 + measured["count"]), 1 - decay)
    mean_Z = z_BTNZ.mean((0, 1, 2))
    var = jnp.square(z_BTNZ - mean_Z).mean()
    apart = jnp.square(mean_Z - measured["mean_Z"]).mean()
    return {
        "count": measured["count"] + 1,
        "mean_Z": measured["mean_Z"] + share * (mean_Z - measured["mean_Z"]),
        "var": (1 - share) * (measured["var"] + share * apart) + share * var,
    }

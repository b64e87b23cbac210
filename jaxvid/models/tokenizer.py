"""A network and a quantizer as one tokenizer: of streams, of whole clips, frozen at unit scale."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Tokenizer:
    """Video <-> quantized latents and their ids, as streams.

    network: `CViViT`, `OmniTokenizer` or `ARVAE`, made for the features and channels of quantizer,
    one of `layers.quantize`. Every method takes the weights, {"network", "codebook"}, as its
    argument. Latents and ids are flat within a frame, z_BTNZ and ids_BTN; `grid` tells the rows and
    columns. A latent is what the quantizer gives, the mean where that is Gaussian.
    """

    def __init__(self, network, quantizer):
        self.network, self.quantizer = network, quantizer

    @property
    def channels(self):
        """Z of the latents."""
        return self.quantizer.channels

    def grid(self, size):
        """(H, W) of the tokens of frames of `size` pixels, a number or (H, W)."""
        return self.network.grid((size, size) if isinstance(size, int) else size)

    def latents_for_frames(self, frames):
        """Number of latent frames of a clip of `frames` frames."""
        return self.network.latents_for_frames(frames)

    def frames_for_latents(self, latents):
        """Number of frames of a clip of `latents` latent frames."""
        return self.network.frames_for_latents(latents)

    def init(self, rng, size):
        """(params, carried part of the codebook) for frames of (H, W) pixels."""
        rng_network, rng_codebook = jax.random.split(rng)
        video_BTHWC = jnp.zeros((1, self.frames_for_latents(2), *size, 3))
        network = self.network.init(rng_network, video_BTHWC)["params"]
        codebook, carried = self.quantizer.init(rng_codebook)
        return {"network": network, "codebook": codebook}, carried

    def features(self, params, video_BTHWC, state=None):
        """video in [-1, 1] -> (what the quantizer is given, float32 [B, T, N, features], state)."""
        z_BTHWZ, state = self._apply(params, "encode", video_BTHWC, state)
        B, T, H, W, Z = z_BTHWZ.shape
        return z_BTHWZ.reshape(B, T, H * W, Z), state

    def encode(self, params, video_BTHWC, state=None):
        """The next frames of a stream, in [-1, 1] -> (z_BTNZ float32, state)."""
        z_BTNZ, state = self.features(params, video_BTHWC, state)
        return self.quantizer(z_BTNZ, params["codebook"])[0], state

    def tokens(self, params, video_BTHWC, state=None):
        """The next frames of a stream, in [-1, 1] -> (ids_BTN int32, state)."""
        z_BTNZ, state = self.features(params, video_BTHWC, state)
        return self.quantizer(z_BTNZ, params["codebook"])[1], state

    def lookup(self, params, ids_BTN):
        """ids_BTN -> z_BTNZ."""
        return self.quantizer.lookup(ids_BTN, params["codebook"])

    def decode(self, params, z_BTNZ, grid, state=None):
        """The next latents of a stream, with (H, W) tokens -> (video_BTHWC float32, state)."""
        B, T, _, Z = z_BTNZ.shape
        return self._apply(params, "decode", z_BTNZ.reshape(B, T, *grid, Z), state)

    def _apply(self, params, method, *arguments):
        return self.network.apply({"params": params["network"]}, *arguments, method=method)


class Encoded(NamedTuple):
    """A clip as `Codec` encodes it: z_BTHWZ float32, quantized, and its ids_BTHW int32.

    Gaussian latents have no ids: None.
    """

    z_BTHWZ: Any
    ids_BTHW: Any


class Codec(nn.Module):
    """The network and the quantizer of a `Tokenizer` as one Flax module, for whole clips.

    encode: video_BTHWC in [-1, 1] -> Encoded
    decode: z_BTHWZ, or all that encode gave -> video_BTHWC float32

    Its parameters are the weights of a `Tokenizer`, {"network", "codebook"}. Pieces of a stream are
    for `Tokenizer(codec.network, codec.quantizer)`, on the same ones.
    """

    network: nn.Module
    quantizer: Any

    def setup(self):
        self.codebook = self.param("codebook", self._init_codebook)

    def __call__(self, video_BTHWC):
        """Makes all parameters, from a clip of two latents or more; the clip rebuilt."""
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


class FrozenTokenizer:
    """A trained tokenizer whose latents have unit scale, as diffusion wants them.

    Has the members of `patches.Patches`: encode gives (z - mean_Z) / std, and decode undoes it
    first. One std for all channels, so that a channel that says little stays quiet. params: the
    weights of a tokenizer run, {"network", "codebook", "latents"}, of which the last are the
    `moments` that its training measured. digest: names these weights (`inference.open_tokenizer`).
    """

    def __init__(self, tokenizer, params, digest):
        self.tokenizer, self.params, self.digest = tokenizer, params, digest
        self.channels, self.grid = tokenizer.channels, tokenizer.grid
        self.latents_for_frames = tokenizer.latents_for_frames

    def encode(self, params, video_BTHWC, state=None):
        """The next frames of a stream, in [-1, 1] -> (z_BTNZ float32 of unit scale, state)."""
        z_BTNZ, state = self.tokenizer.encode(params, video_BTHWC, state)
        return self._standardize(params, z_BTNZ), state

    def cached(self, params, stored):
        """Stored latents float32 [B, T, N, Z] or tokens int32 [B, T, N] -> z_BTNZ of unit scale."""
        is_tokens = jnp.issubdtype(stored.dtype, jnp.integer)
        return self._standardize(
            params, self.tokenizer.lookup(params, stored) if is_tokens else stored
        )

    def decode(self, params, z_BTNZ, grid, state=None):
        """The next latents of unit scale of a stream -> (video_BTHWC float32, state)."""
        mean_Z, std = self._scale(params)
        return self.tokenizer.decode(params, mean_Z + std * z_BTNZ, grid, state)

    def _standardize(self, params, z_BTNZ):
        mean_Z, std = self._scale(params)
        return (z_BTNZ - mean_Z) / std

    def _scale(self, params):
        return params["latents"]["mean_Z"], jnp.sqrt(params["latents"]["var"])


def moments(channels):
    """Where measuring latents begins: count [], mean_Z and var [], the mean of the variances."""
    return {"count": jnp.zeros(()), "mean_Z": jnp.zeros(channels), "var": jnp.ones(())}


def update_moments(measured, z_BTNZ, memory=0.99):
    """The `moments` after one more batch: the plain mean of the first, then an exponential one."""
    share = jnp.maximum(1 / (1 + measured["count"]), 1 - memory)
    mean_Z = z_BTNZ.mean((0, 1, 2))
    var = jnp.square(z_BTNZ - mean_Z).mean()
    apart = jnp.square(mean_Z - measured["mean_Z"]).mean()
    return {
        "count": measured["count"] + 1,
        "mean_Z": measured["mean_Z"] + share * (mean_Z - measured["mean_Z"]),
        "var": (1 - share) * (measured["var"] + share * apart) + share * var,
    }

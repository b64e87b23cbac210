"""A network and a quantizer as one tokenizer, with the members that every tokenizer offers."""

import jax
import jax.numpy as jnp


class Tokenizer:
    """Video <-> quantized latents and their ids, as streams.

    network: `CViViT`, `OmniTokenizer` or `ARVAE`, made for the features and channels of quantizer,
    one of `layers.quantize`. params: trained weights, {"network", "codebook"}, for whoever uses the
    tokenizer frozen; every method takes them as an argument. Latents and ids are flat within a
    frame, z_BTNZ and ids_BTN; `grid` tells the rows and columns. A latent is what the quantizer
    gives, the mean where that is Gaussian.
    """

    def __init__(self, network, quantizer, params=None):
        self.network, self.quantizer, self.params = network, quantizer, params

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

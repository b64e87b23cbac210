"""The tokenizer that learns nothing: a frame's square patches of pixels are its tokens."""

import dataclasses

from einops import rearrange


@dataclasses.dataclass(frozen=True)
class Patches:
    """Pixels [-1, 1] <-> one token of 3 * patch^2 numbers per patch; exact inverse, no parameters.

    Any tokenizer offers these same members. `params` is its frozen tree ({} here), `state` the
    stream state of a causal tokenizer (None here): encode and decode obey the streaming contract.
    """

    patch: int

    def grid(self, size):
        """(H, W) of the tokens of a square frame of `size` pixels."""
        return (size // self.patch, size // self.patch)

    @property
    def channels(self):
        return 3 * self.patch**2

    def latents_for_frames(self, frames):
        """Number of latent frames of a clip of `frames` frames."""
        return frames

    def encode(self, params, video_BTHWC, state=None):
        """video [B, T, H, W, 3] -> (z_BTNZ, state)."""
        del params
        p = self.patch
        return rearrange(video_BTHWC, "b t (h i) (w j) c -> b t (h w) (i j c)", i=p, j=p), state

    def decode(self, params, z_BTNZ, grid, state=None):
        """z_BTNZ, its (H, W) token grid -> (video [B, T, H, W, 3], state)."""
        del params
        p = self.patch
        h, w = grid
        return (
            rearrange(z_BTNZ, "b t (h w) (i j c) -> b t (h i) (w j) c", h=h, w=w, i=p, j=p),
            state,
        )

"""The tokenizer without weights: the square patches of a frame are its tokens."""

import dataclasses

from einops import rearrange

from jaxvid.models.stem import grid_of
from jaxvid.models.tokenizer import VideoTokenizer


@dataclasses.dataclass(frozen=True)
class PixelTokenizer(VideoTokenizer):
    """Pixels [-1, 1] <-> one token of 3 * patch^2 numbers per patch; an exact inverse.

    Latents have the dtype of the video. The state is returned as given.
    """

    patch: int

    @property
    def channels(self):
        """3 * patch^2."""
        return 3 * self.patch**2

    def grid(self, size):
        """See `VideoTokenizer`."""
        return grid_of((size, size) if isinstance(size, int) else size, self.patch)

    def encode(self, params, video_BTHWC, state=None):
        """See `VideoTokenizer`."""
        del params
        p = self.patch
        return rearrange(video_BTHWC, "b t (h i) (w j) c -> b t (h w) (i j c)", i=p, j=p), state

    def decode(self, params, z_BTNZ, grid, state=None):
        """See `VideoTokenizer`."""
        del params
        p = self.patch
        h, w = grid
        return (
            rearrange(z_BTNZ, "b t (h w) (i j c) -> b t (h i) (w j) c", h=h, w=w, i=p, j=p),
            state,
        )

"""Latents without a tokenizer, for benchmarks and compilation at the size of its output."""

import dataclasses
import re

from jaxvid.errors import UserError
from jaxvid.models.tokenizer import VideoTokenizer


@dataclasses.dataclass(frozen=True)
class Latents(VideoTokenizer):
    """A stand-in for a tokenizer with one row of tokens: latents are pixels from the frame's top.

    `decode` shows latents as grey pictures.
    """

    tokens: int
    channels: int

    def grid(self, size):
        del size
        return (1, self.tokens)

    def latents_for_frames(self, frames):
        return frames

    def frames_for_latents(self, latents):
        return latents

    def encode(self, params, video_BTHWC, state=None):
        del params
        B, T = video_BTHWC.shape[:2]
        z = video_BTHWC.reshape(B, T, -1)[..., : self.tokens * self.channels]
        return z.reshape(B, T, self.tokens, self.channels), state

    def decode(self, params, z_BTNZ, grid, state=None):
        del params, grid
        return z_BTNZ[..., None], state


def stand_in(latents):
    """The Latents of --latents=TOKENSxCHANNELS, None if that is empty. Raises UserError."""
    if not latents:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", latents)
    if not match:
        raise UserError(f"latents={latents}: write TOKENSxCHANNELS, such as 32x4")
    return Latents(*map(int, match.groups()))

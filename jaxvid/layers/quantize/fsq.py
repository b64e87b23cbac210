"""Finite scalar quantization."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.layers.quantize.base import Quantizer, straight_through, usage

DIALECTS = ("paper", "vq_pytorch")


@dataclasses.dataclass(frozen=True)
class FSQ(Quantizer):
    """Every channel is rounded to a few levels (Mentzer et al. 2024), without any loss term.

    levels: of each channel, 3 or more. The default has 1,000 codes; (8, 8, 8, 5, 5, 5) has the
    64,000 of Cosmos. dialect: "paper", or "vq_pytorch" as in vector-quantize-pytorch and Cosmos,
    with a slightly wider bound and a shift by atanh instead of tan.
    """

    levels: tuple[int, ...] = (8, 5, 5, 5)
    dialect: str = "paper"

    def __post_init__(self):
        levels = self.levels
        if isinstance(levels, np.ndarray | jax.Array):
            levels = np.asarray(levels).tolist()  # plain numbers
        object.__setattr__(self, "levels", tuple(levels))
        checks.require(self.levels, "levels", self.levels, "has no channel; use (8, 5, 5, 5)")
        checks.whole_numbers("levels", self.levels, low=3)
        fits = math.prod(self.levels) <= 2**31
        checks.require(fits, "levels", self.levels, "more codes than int32 counts; use fewer")
        checks.choose("dialect", self.dialect, DIALECTS)

    @property
    def features(self) -> int:
        return len(self.levels)

    @property
    def channels(self) -> int:
        return len(self.levels)

    @property
    def size(self) -> int:
        return math.prod(self.levels)

    def __call__(self, z, codebook=None, rng=None):
        """See `Quantizer`; z_q lies in [-1, 1], ids = sum_i level_i prod_(j < i) levels_j."""
        del codebook, rng
        self._check_features(z)
        z = self._bound(z.astype(jnp.float32))
        level = jnp.round(z)
        # In integers, as float32 is exact only up to 2^24.
        ids = ((level + self._half_width).astype(jnp.int32) * self._basis).sum(-1)
        aux = {"loss": jnp.zeros(()), **usage(ids, self.size)}
        return straight_through(z, level) / self._half_width, ids, aux

    def _codes(self, ids, codebook):
        del codebook
        level = ids[..., None] // self._basis % np.array(self.levels, np.int32)
        return (level - self._half_width) / self._half_width

    def _bound(self, z):
        """tanh scaled to the outermost levels, shifted where their number is even."""
        levels = np.array(self.levels, np.float32)
        is_paper = self.dialect == "paper"
        amplitude = (levels - 1) / 2 * (1 - 1e-3 if is_paper else 1 + 1e-3)
        offset = np.where(levels % 2 == 0, 0.5, 0.0).astype(np.float32)
        shift = (np.tan if is_paper else np.arctanh)(offset / amplitude)
        return jnp.tanh(z + shift) * amplitude - offset

    @property
    def _half_width(self):
        return np.array([levels // 2 for levels in self.levels], np.float32)

    @property
    def _basis(self):
        return np.cumprod((1, *self.levels[:-1])).astype(np.int32)

"""Patches and Haar bands: exact inverses in the order that published weights expect."""

import jax
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.layers.patch import haar, patchify, unhaar, unpatchify

VIDEO = np.random.default_rng(0).standard_normal((2, 4, 8, 12, 3)).astype(np.float32)


@pytest.mark.parametrize("forward, inverse", [(patchify, unpatchify), (haar, unhaar)])
def test_inverse(forward, inverse):
    for patch in ((1, 4, 4), (2, 4, 4), (4, 2, 1)):
        t, h, w = patch
        x = jax.jit(forward, static_argnums=1)(VIDEO, patch)
        assert x.shape == (2, 4 // t, 8 // h, 12 // w, 3 * t * h * w)
        np.testing.assert_allclose(jax.jit(inverse, static_argnums=1)(x, patch), VIDEO, atol=1e-6)


def test_order_is_channel_frame_row_column():
    x = patchify(VIDEO, (2, 4, 4))
    block = VIDEO[1, 2:4, 4:8, 8:12]  # t, h, w, c
    np.testing.assert_array_equal(x[1, 1, 1, 2], block.transpose(3, 0, 1, 2).reshape(-1))


def test_order_of_bands_is_time_height_width():
    """A ramp along one axis has that axis' high band alone: LLH is width, HLL time."""
    for position, band in zip(np.indices((2, 2, 2)), (4, 2, 1)):
        ramp = position.astype(np.float32).reshape(1, 2, 2, 2, 1)
        expected = 0.5 * (np.arange(8) == 0) - 0.5 * (np.arange(8) == band)
        np.testing.assert_array_equal(haar(ramp, (2, 2, 2)).reshape(-1), expected)


def test_refusals():
    with pytest.raises(UserError, match=r"^patch=\(2, 4, 6\): .* powers of two"):
        haar(VIDEO, (2, 4, 6))

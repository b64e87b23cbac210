"""PSNR and SSIM against closed forms and against scipy's Gaussian filter."""

import jax
import numpy as np
import pytest
from scipy import ndimage

from jaxvid.errors import UserError
from jaxvid.metrics import quality


def clips(seed, shape=(2, 3, 24, 19, 3)):
    rng = np.random.default_rng(seed)
    smooth = ndimage.gaussian_filter(rng.standard_normal(shape), (0, 0, 2, 2, 0)) * 2
    a = np.clip(smooth, -1, 1)
    return a.astype(np.float32), np.clip(a + rng.normal(0, 0.2, shape), -1, 1).astype(np.float32)


def ssim_by_scipy(a, b):
    """Float64 SSIM of one pair of single-channel pictures in [0, 1], border cut off."""

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5, mode="reflect")[5:-5, 5:-5]

    a, b = a.astype(np.float64), b.astype(np.float64)
    mean_a, mean_b = blur(a), blur(b)
    var_a, var_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    both = blur(a * b) - mean_a * mean_b
    top = (2 * mean_a * mean_b + 1e-4) * (2 * both + 9e-4)
    return (top / ((mean_a**2 + mean_b**2 + 1e-4) * (var_a + var_b + 9e-4))).mean()


def test_psnr_and_ssim_by_definition():
    """PSNR by its formula, SSIM by scipy's Gaussian filter."""
    a, b = clips(0)
    got = jax.jit(quality.ssim)(a, b)
    assert got.shape == (2, 3) and got.dtype == np.float32
    for place in np.ndindex(2, 3):
        pictures = [(a[place][..., c] / 2 + 0.5, b[place][..., c] / 2 + 0.5) for c in range(3)]
        expected = np.mean([ssim_by_scipy(*pair) for pair in pictures])
        assert got[place] == pytest.approx(expected, abs=5e-6)
    got = jax.jit(quality.psnr)(a, b)
    mse = ((a.astype(np.float64) - b) ** 2).mean((2, 3, 4))
    np.testing.assert_allclose(got, 10 * np.log10(2**2 / mse), rtol=1e-5)


def test_closed_forms():
    """Of plain frames, where SSIM is its luminance term, and of equal and inverted ones."""
    for p, q in ((0.2, 0.7), (0.0, 1.0), (0.5, 0.5)):
        a, b = (np.full((1, 1, 16, 16, 3), 2 * grey - 1, np.float32) for grey in (p, q))
        ssim = (2 * p * q + 1e-4) / (p * p + q * q + 1e-4)
        np.testing.assert_allclose(quality.ssim(a, b), [[ssim]], atol=1e-4)
        psnr = 20 * np.log10(1 / abs(p - q)) if p != q else 100
        np.testing.assert_allclose(quality.psnr(a, b), [[psnr]], atol=1e-3)
    a, _ = clips(2)
    np.testing.assert_allclose(quality.ssim(a, a), 1, atol=1e-6)
    np.testing.assert_array_equal(quality.psnr(a, a), np.full((2, 3), 100, np.float32))
    assert np.all(quality.ssim(a, -a) < 0)


def test_frames_do_not_mix():
    a, b = clips(3)
    changed = b.copy()
    changed[0, 1] = -1
    for metric in (quality.psnr, quality.ssim):
        same = np.asarray(metric(a, b)) == np.asarray(metric(a, changed))
        assert np.argwhere(~same).tolist() == [[0, 1]]


def test_refusals():
    frame = np.zeros((1, 1, 10, 32, 3), np.float32)
    with pytest.raises(UserError, match=r"^size=10: SSIM needs 11"):
        quality.ssim(frame, frame)
    whole = np.zeros((1, 1, 12, 12, 3), np.uint8)
    for metric in (quality.psnr, quality.ssim):
        for pair in ((whole, whole), (whole.astype(np.float32), whole), (whole, whole > 0)):
            with pytest.raises(UserError, match=r"^dtype='(uint8|bool)': use float frames"):
                metric(*pair)

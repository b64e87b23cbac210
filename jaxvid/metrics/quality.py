"""Image quality against a reference, frame by frame: PSNR and SSIM. Pure and jit-able."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks

WINDOW, SIGMA = 11, 1.5  # of SSIM's Gaussian window, in pixels
PSNR_CEILING = 100.0  # dB


def psnr(a_BTHWC: jax.Array, b_BTHWC: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio per frame, 10 log10(2^2 / mse) -> dB, float32 [B, T].

    Float frames in [-1, 1], so the peak is 2 (UserError for whole numbers). Equal frames give
    PSNR_CEILING dB instead of infinity, so a mean over frames stays finite.
    """
    error_BT = jnp.square(_float(a_BTHWC) - _float(b_BTHWC)).mean((-3, -2, -1))
    return 10 * jnp.log10(4 / jnp.maximum(error_BT, 4 * 10 ** (-PSNR_CEILING / 10)))


def ssim(a_BTHWC: jax.Array, b_BTHWC: jax.Array) -> jax.Array:
    """Structural similarity per frame (Wang et al. 2004, eq. 13) -> float32 [B, T]; 1 if equal.

    Float frames in [-1, 1], at least 11 pixels a side (UserError for others). The window is
    Gaussian, 11 x 11 with sigma 1.5, at every position inside the frame; the mean is over positions
    and colours.
    """
    size = min(a_BTHWC.shape[-3:-1])
    checks.require(size >= WINDOW, "size", size, f"SSIM needs {WINDOW} pixels or more")
    a, b = _float(a_BTHWC) / 2 + 0.5, _float(b_BTHWC) / 2 + 0.5
    mean_a, mean_b = _blur(a), _blur(b)
    var_a, var_b = _blur(a * a) - mean_a**2, _blur(b * b) - mean_b**2
    covariance = _blur(a * b) - mean_a * mean_b
    c1, c2 = 0.01**2, 0.03**2
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    structure = (2 * covariance + c2) / (var_a + var_b + c2)
    return (luminance * structure).mean((-3, -2, -1))


def _float(x):
    is_float = jnp.issubdtype(x.dtype, jnp.floating)
    remedy = "use float frames in [-1, 1]; `data.transforms.normalize` makes them of bytes"
    checks.require(is_float, "dtype", str(x.dtype), remedy)
    return x.astype(jnp.float32)


def _blur(x):
    """Gaussian-weighted mean at every position: [..., H, W, C] -> [..., H-10, W-10, C]."""
    down, across = _window(x.shape[-3]), _window(x.shape[-2])
    # Full precision: the variances are small differences, and TF32 or bfloat16 would lose them.
    return jnp.einsum("ih,jw,...hwc->...ijc", down, across, x, precision="highest")


def _window(size):
    """The window at each of its positions, one per row: float32 [size - 10, size]."""
    offset = np.arange(size) - np.arange(size - WINDOW + 1)[:, None]
    weight = np.exp(-((offset - WINDOW // 2) ** 2) / (2 * SIGMA**2))
    weight = np.where((offset >= 0) & (offset < WINDOW), weight, 0)
    return jnp.asarray(weight / weight.sum(1, keepdims=True), jnp.float32)

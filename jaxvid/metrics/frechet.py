"""Distances between two sets of features: Frechet distance and polynomial MMD, in float64.

numpy, on any features [N, D]: I3D features give FVD (Unterthiner et al. 2018), features of an
Inception network FID (Heusel et al. 2017). The Frechet distance of few samples is mostly bias, so
compare a score with its `floor`, and only with scores of equal N.
"""

from collections.abc import Callable

import numpy as np

from jaxvid import checks

MIN_SAMPLES = 4  # of a floor: a covariance or an unbiased MMD needs two in each half


class Moments:
    """Mean and covariance of features that arrive in batches, in float64 (Chan et al. 1983)."""

    def __init__(self):
        self.count, self.mean_D, self._scatter_DD = 0, 0.0, 0.0

    def add(self, features_ND: np.ndarray):
        """Add features [n, D]."""
        x_ND = _checked(features_ND)
        count, mean_D = len(x_ND), x_ND.mean(0)
        centred_ND, shift_D = x_ND - mean_D, mean_D - self.mean_D
        total = self.count + count
        between = self.count * count / total * np.outer(shift_D, shift_D)
        self._scatter_DD = self._scatter_DD + centred_ND.T @ centred_ND + between
        self.mean_D = self.mean_D + count / total * shift_D
        self.count = total

    def covariance(self, ddof: int = 1) -> np.ndarray:
        """[D, D]; ddof=1 divides by N - 1, as StyleGAN-V does, ddof=0 by N, as cd-fvd does."""
        checks.at_least("samples", self.count, 1 + ddof)
        return self._scatter_DD / (self.count - ddof)


def moments(features_ND: np.ndarray) -> Moments:
    """The `Moments` of one array of features."""
    result = Moments()
    result.add(features_ND)
    return result


def frechet(a: np.ndarray | Moments, b: np.ndarray | Moments, ddof: int = 1) -> float:
    """Squared Frechet distance of the Gaussians with the moments of two sets (Dowson and Landau).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). a, b: features [N, D] or `Moments`. The
    trace of the root is computed as the sum of the singular values of C_a^1/2 C_b^1/2, which are
    real; a matrix root may have imaginary parts. UserError for one sample (`ddof` or fewer), and
    for features of two widths.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    widths = np.size(a.mean_D), np.size(b.mean_D)
    remedy = "the two sets differ in width; use features of one network"
    checks.require(widths[0] == widths[1], "features", widths, remedy)
    c_a, c_b = a.covariance(ddof), b.covariance(ddof)
    root = np.linalg.svd(_root(c_a) @ _root(c_b), compute_uv=False).sum()
    squared = np.square(a.mean_D - b.mean_D).sum()
    return float(max(squared + np.trace(c_a) + np.trace(c_b) - 2 * root, 0.0))


def mmd(
    a_ND: np.ndarray,
    b_MD: np.ndarray,
    *,
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    unbiased: bool = True,
) -> float:
    """Squared maximum mean discrepancy under (gamma x y + coef0)^degree (Gretton et al. 2012).

    gamma: 1 / D by default. The defaults give KID (Binkowski et al. 2018). unbiased: the
    U-statistic, which may be negative and needs two samples of each (UserError); False gives the
    V-statistic.
    """
    a, b = _checked(a_ND), _checked(b_MD)
    N, M = len(a), len(b)
    if unbiased:
        checks.at_least("samples", min(N, M), 2)
    gamma = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x, y):
        return (gamma * (x @ y.T) + coef0) ** degree

    same_set = []
    for x in (a, b):
        k = kernel(x, x)
        n = len(x)
        same_set.append((k.sum() - np.trace(k)) / (n * (n - 1)) if unbiased else k.mean())
    return float(sum(same_set) - 2 * kernel(a, b).mean())


def jedi(a_ND: np.ndarray, b_MD: np.ndarray) -> float:
    """JEDi's MMD (Luo et al. 2025): 100 times the V-statistic of degree 2 without an offset."""
    return 100 * mmd(a_ND, b_MD, degree=2, coef0=0.0, unbiased=False)


def floor(
    real_ND: np.ndarray, distance: Callable, rng: np.random.Generator, repeats: int = 4
) -> tuple[float, float]:
    """(mean, std) of the distance between random halves of one set, the best possible score.

    The halves have N / 2 samples, so this floor has the bias of N / 2 samples. UserError for fewer
    than MIN_SAMPLES.
    """
    real_ND = _checked(real_ND)
    checks.at_least("samples", len(real_ND), MIN_SAMPLES)
    half = len(real_ND) // 2
    distances = []
    for _ in range(repeats):
        order = rng.permutation(len(real_ND))
        distances.append(distance(real_ND[order[:half]], real_ND[order[half : 2 * half]]))
    return float(np.mean(distances)), float(np.std(distances))


def _checked(features_ND):
    x_ND = np.asarray(features_ND, np.float64)
    is_table = x_ND.ndim == 2 and len(x_ND)
    checks.require(is_table, "features", x_ND.shape, "give one row for each sample")
    is_finite = np.isfinite(x_ND).all()
    remedy = "some are not finite; look for NaN in the videos"
    checks.require(is_finite, "features", x_ND.shape, remedy)
    return x_ND


def _root(c_DD):
    """The symmetric root of a covariance; rounding may make its eigenvalues negative."""
    value_D, vector_DD = np.linalg.eigh(c_DD)
    return (vector_DD * np.sqrt(np.maximum(value_D, 0))) @ vector_DD.T

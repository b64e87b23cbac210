"""Distances between two sets of features: Frechet distance and polynomial MMD, in float64.

numpy, on any features [N, D]: of an I3D they give FVD (Unterthiner et al. 2018), of an Inception
network FID (Heusel et al. 2017). The Frechet distance of few samples is mostly bias, so a score
comes with its `floor`, and only scores of equal N compare.
"""

import numpy as np

from jaxvid.errors import UserError

FEWEST = 4  # samples that a floor needs: a covariance or an unbiased MMD wants two in each half


class Moments:
    """Mean and covariance of features that arrive in batches, in float64 (Chan et al. 1983)."""

    def __init__(self):
        self.count, self.mean_D, self._scatter_DD = 0, 0.0, 0.0

    def add(self, features_ND):
        """Take in more features [n, D]."""
        x_ND = _checked(features_ND)
        count, mean_D = len(x_ND), x_ND.mean(0)
        centred_ND, apart_D = x_ND - mean_D, mean_D - self.mean_D
        total = self.count + count
        between = self.count * count / total * np.outer(apart_D, apart_D)
        self._scatter_DD = self._scatter_DD + centred_ND.T @ centred_ND + between
        self.mean_D = self.mean_D + count / total * apart_D
        self.count = total

    def covariance(self, ddof=1):
        """[D, D]; ddof=1 divides by N - 1, as StyleGAN-V does, ddof=0 by N, as cd-fvd does."""
        if self.count <= ddof:
            raise UserError(f"features: {self.count} samples have no covariance; give more")
        return self._scatter_DD / (self.count - ddof)


def moments(features_ND):
    """The `Moments` of one array of features."""
    found = Moments()
    found.add(features_ND)
    return found


def frechet(a, b, ddof=1):
    """Squared Frechet distance of the Gaussians with the moments of two sets (Dowson and Landau).

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^1/2). a, b: features [N, D] or `Moments`. The
    trace of the root is the sum of the singular values of C_a^1/2 C_b^1/2, which has none of the
    imaginary parts of a matrix root.
    """
    a, b = (x if isinstance(x, Moments) else moments(x) for x in (a, b))
    if np.shape(a.mean_D) != np.shape(b.mean_D):
        raise UserError(
            f"features: {np.size(a.mean_D)} and {np.size(b.mean_D)} wide; use those of one network"
        )
    c_a, c_b = a.covariance(ddof), b.covariance(ddof)
    root = np.linalg.svd(_root(c_a) @ _root(c_b), compute_uv=False).sum()
    apart = np.square(a.mean_D - b.mean_D).sum()
    return float(max(apart + np.trace(c_a) + np.trace(c_b) - 2 * root, 0.0))


def mmd(a_ND, b_MD, *, degree=3, gamma=None, coef0=1.0, unbiased=True):
    """Squared maximum mean discrepancy under (gamma x y + coef0)^degree (Gretton et al. 2012).

    gamma: 1 / D unless given. The defaults are those of KID (Binkowski et al. 2018); `jedi` is the
    other in use. unbiased: the U-statistic, which may be negative; else the V-statistic.
    """
    a, b = _checked(a_ND), _checked(b_MD)
    N, M = len(a), len(b)
    if unbiased and min(N, M) < 2:
        raise UserError("features: an unbiased estimate needs two samples of each; give more")
    gamma = 1 / a.shape[1] if gamma is None else gamma

    def kernel(x, y):
        return (gamma * (x @ y.T) + coef0) ** degree

    within = []
    for x in (a, b):
        k = kernel(x, x)
        n = len(x)
        within.append((k.sum() - np.trace(k)) / (n * (n - 1)) if unbiased else k.mean())
    return float(sum(within) - 2 * kernel(a, b).mean())


def jedi(a_ND, b_MD):
    """The MMD that JEDi reports (Luo et al. 2025): 100 times, degree 2, no offset, V-statistic."""
    return 100 * mmd(a_ND, b_MD, degree=2, coef0=0.0, unbiased=False)


def floor(real_ND, distance, rng, repeats=4):
    """(mean, std) of the distance between random halves of one set: what equality looks like.

    The halves have N / 2 samples, so the bias of this floor is that of N / 2. UserError for fewer
    than FEWEST.
    """
    real_ND = _checked(real_ND)
    if len(real_ND) < FEWEST:
        raise UserError(f"features: {len(real_ND)} samples; a floor needs at least {FEWEST}")
    half = len(real_ND) // 2
    found = []
    for _ in range(repeats):
        order = rng.permutation(len(real_ND))
        found.append(distance(real_ND[order[:half]], real_ND[order[half : 2 * half]]))
    return float(np.mean(found)), float(np.std(found))


def _checked(features_ND):
    x_ND = np.asarray(features_ND, np.float64)
    if x_ND.ndim != 2 or not len(x_ND):
        raise UserError(f"features: shape {x_ND.shape}; give one row for each sample")
    if not np.isfinite(x_ND).all():
        raise UserError("features: some are not finite; look for NaN in the videos")
    return x_ND


def _root(c_DD):
    """The symmetric root of a covariance, whose eigenvalues are not below zero but for rounding."""
    value_D, vector_DD = np.linalg.eigh(c_DD)
    return (vector_DD * np.sqrt(np.maximum(value_D, 0))) @ vector_DD.T

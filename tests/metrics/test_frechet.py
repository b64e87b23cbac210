"""Distances of feature sets against closed forms, scipy and plain double loops."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from jaxvid.errors import UserError
from jaxvid.metrics import frechet

rng = np.random.default_rng(0)
MIX = rng.standard_normal((12, 12))
A = rng.standard_normal((200, 12)) @ MIX + 1
B = rng.standard_normal((150, 12)) @ (MIX + 0.3 * rng.standard_normal((12, 12)))


def test_distance_is_that_of_the_matrix_root():
    for ddof in (0, 1):
        c_a, c_b = (np.cov(x.T, ddof=ddof) for x in (A, B))
        root = scipy.linalg.sqrtm(c_a @ c_b).real
        expected = np.square(A.mean(0) - B.mean(0)).sum() + np.trace(c_a + c_b - 2 * root)
        np.testing.assert_allclose(frechet.frechet(A, B, ddof), expected, rtol=1e-9)


def test_distance_has_closed_forms():
    shift = np.linspace(-1, 2, 12)
    np.testing.assert_allclose(frechet.frechet(A, A + shift), np.square(shift).sum(), rtol=1e-9)
    spread = np.trace(np.cov(A.T))
    centred = A - A.mean(0)
    np.testing.assert_allclose(frechet.frechet(centred, 3 * centred), 4 * spread, rtol=1e-9)
    assert frechet.frechet(A, A) < 1e-9 * spread


def test_distance_with_fewer_samples_than_features():
    few, many = A[:5], B[:40]
    c_a, c_b = np.cov(few.T), np.cov(many.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(c_a @ c_b).real, 0)).sum()
    expected = np.square(few.mean(0) - many.mean(0)).sum() + np.trace(c_a + c_b) - 2 * root
    np.testing.assert_allclose(frechet.frechet(few, many), expected, rtol=1e-6)


def test_moments_of_batches_far_from_zero():
    far = A + 1e6
    found = frechet.Moments()
    for part in np.split(far, [1, 50, 51, 120]):
        found.add(part)
    np.testing.assert_allclose(found.mean_D, far.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(far.T), rtol=1e-7, atol=1e-7)


def test_mmd_is_a_double_loop():
    a, b = A[:9], B[:7]

    def mean(x, y, kernel, skip_equal=False):
        pairs = itertools.product(enumerate(x), enumerate(y))
        return np.mean([kernel(p @ q) for (i, p), (j, q) in pairs if not (skip_equal and i == j)])

    for unbiased in (True, False):
        for degree, gamma, coef0 in ((3, None, 1.0), (2, 0.5, 0.0)):

            def kernel(dot, degree=degree, gamma=gamma or 1 / 12, coef0=coef0):
                return (gamma * dot + coef0) ** degree

            expected = mean(a, a, kernel, unbiased) + mean(b, b, kernel, unbiased)
            expected -= 2 * mean(a, b, kernel)
            options = dict(degree=degree, gamma=gamma, coef0=coef0, unbiased=unbiased)
            np.testing.assert_allclose(frechet.mmd(a, b, **options), expected, rtol=1e-9)


def test_jedi_is_the_mean_difference_of_second_moments():
    """A kernel (x y / D)^2 compares E[x x^T] in Frobenius norm."""
    difference = A.T @ A / len(A) - B.T @ B / len(B)
    expected = 100 * np.square(difference).sum() / 144
    np.testing.assert_allclose(frechet.jedi(A, B), expected, rtol=1e-9)


def test_the_floor_is_the_bias_of_few_samples():
    """Samples of one distribution: the distance falls with N, and the unbiased MMD is 0."""
    x = np.random.default_rng(1).standard_normal((512, 40))
    draws = np.random.default_rng(2)
    few, _ = frechet.floor(x[:128], frechet.frechet, draws)
    many, spread = frechet.floor(x, frechet.frechet, draws)
    assert few > 3 * many > 0 and spread < many
    assert abs(frechet.floor(x, frechet.mmd, draws, repeats=8)[0]) < 0.02


def test_refusals():
    for call, message in (
        (lambda: frechet.frechet(A, B[:, :5]), r"^features=\(12, 5\): .* differ in width"),
        (lambda: frechet.frechet(A[:1], B), "^samples=1: must be at least 2"),
        (lambda: frechet.frechet(A[0], B), r"^features=\(12,\): give one row"),
        (lambda: frechet.mmd(A[:1], B), "^samples=1: must be at least 2"),
        (lambda: frechet.floor(A[:3], frechet.mmd, rng), "^samples=3: must be at least 4"),
        (lambda: frechet.frechet(np.full((3, 2), np.nan), B), "not finite"),
    ):
        with pytest.raises(UserError, match=message):
            call()

"""Distances of feature sets, against closed forms, scipy and plain double loops."""

import numpy as np
import pytest
import scipy.linalg

from jaxvid.errors import UserError
from jaxvid.metrics import frechet

rng = np.random.default_rng(0)
MIX = rng.standard_normal((12, 12))
A = rng.standard_normal((200, 12)) @ MIX + 1
B = rng.standard_normal((150, 12)) @ (MIX + 0.3 * rng.standard_normal((12, 12)))


@pytest.mark.parametrize("ddof", [0, 1])
def test_distance_is_that_of_the_matrix_root(ddof):
    c_a, c_b = (np.cov(x.T, ddof=ddof) for x in (A, B))
    root = scipy.linalg.sqrtm(c_a @ c_b).real
    wanted = np.square(A.mean(0) - B.mean(0)).sum() + np.trace(c_a + c_b - 2 * root)
    np.testing.assert_allclose(frechet.frechet(A, B, ddof), wanted, rtol=1e-9)


def test_closed_forms():
    shift = np.linspace(-1, 2, 12)
    np.testing.assert_allclose(frechet.frechet(A, A + shift), np.square(shift).sum(), rtol=1e-9)
    spread = np.trace(np.cov(A.T))
    centred = A - A.mean(0)
    np.testing.assert_allclose(frechet.frechet(centred, 3 * centred), 4 * spread, rtol=1e-9)
    assert frechet.frechet(A, A) < 1e-9 * spread


def test_fewer_samples_than_features_are_no_trouble():
    few, many = A[:5], B[:40]
    c_a, c_b = np.cov(few.T), np.cov(many.T)
    root = np.sqrt(np.maximum(np.linalg.eigvals(c_a @ c_b).real, 0)).sum()
    wanted = np.square(few.mean(0) - many.mean(0)).sum() + np.trace(c_a + c_b) - 2 * root
    np.testing.assert_allclose(frechet.frechet(few, many), wanted, rtol=1e-6)


def test_batches_add_up_far_from_zero():
    far = A + 1e6
    found = frechet.Moments()
    for part in np.split(far, [1, 50, 51, 120]):
        found.add(part)
    np.testing.assert_allclose(found.mean_D, far.mean(0), rtol=1e-12)
    np.testing.assert_allclose(found.covariance(), np.cov(far.T), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("unbiased", [True, False])
@pytest.mark.parametrize("degree, gamma, coef0", [(3, None, 1.0), (2, 0.5, 0.0)])
def test_discrepancy_is_that_of_a_double_loop(unbiased, degree, gamma, coef0):
    a, b = A[:9], B[:7]

    def mean(x, y, same):
        values = [
            ((gamma or 1 / 12) * (p @ q) + coef0) ** degree
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and unbiased and i == j)
        ]
        return np.mean(values)

    wanted = mean(a, a, True) + mean(b, b, True) - 2 * mean(a, b, False)
    options = dict(degree=degree, gamma=gamma, coef0=coef0, unbiased=unbiased)
    np.testing.assert_allclose(frechet.mmd(a, b, **options), wanted, rtol=1e-9)


def test_jedi_is_the_mean_difference_of_second_moments():
    """A kernel (x y / D)^2 compares E[x x^T] in Frobenius norm."""
    apart = A.T @ A / len(A) - B.T @ B / len(B)
    np.testing.assert_allclose(frechet.jedi(A, B), 100 * np.square(apart).sum() / 144, rtol=1e-9)


def test_the_floor_is_the_bias_of_few_samples():
    """400 features of one distribution: the distance falls with N and the unbiased MMD is none."""
    x = np.random.default_rng(1).standard_normal((512, 40))
    draws = np.random.default_rng(2)
    few, _ = frechet.floor(x[:128], frechet.frechet, draws)
    many, spread = frechet.floor(x, frechet.frechet, draws)
    assert few > 3 * many > 0 and spread < many
    assert abs(frechet.floor(x, frechet.mmd, draws, repeats=8)[0]) < 0.02


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: frechet.frechet(A, B[:, :5]), "12 and 5 wide"),
        (lambda: frechet.frechet(A[:1], B), "1 samples have no covariance"),
        (lambda: frechet.frechet(A[0], B), r"shape \(12,\)"),
        (lambda: frechet.mmd(A[:1], B), "two samples"),
        (lambda: frechet.floor(A[:3], frechet.mmd, rng), "3 samples; a floor needs at least 4"),
        (lambda: frechet.frechet(np.full((3, 2), np.nan), B), "not finite"),
    ],
)
def test_what_cannot_be_compared_is_refused(call, words):
    with pytest.raises(UserError, match=words):
        call()

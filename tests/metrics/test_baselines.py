"""Guesses without a network, and the blend that is best over all clips."""

import numpy as np
import pytest

from jaxvid.metrics import baselines


def test_guesses_and_blends_are_those_of_numpy():
    given = np.random.default_rng(0).normal(size=(2, 3, 4, 5, 3)).astype(np.float32)
    found = baselines.guesses(given)
    assert set(found) == set(baselines.NAMES)
    ground = [[np.median(given[b, ..., c]) for c in range(3)] for b in range(2)]
    expected = {
        "copy_last": given[:, 2:],
        "mean_given": given.mean(1, keepdims=True),
        "median_given": np.sort(given, axis=1)[:, 1:2],
        "ground": np.broadcast_to(np.array(ground)[:, None, None, None], given[:, :1].shape),
    }
    for name, guess in expected.items():
        np.testing.assert_allclose(found[name], guess, atol=1e-6)
    blended = baselines.blends(found)
    shares = {tuple(row): k for k, row in enumerate(baselines.BLENDS_K3.tolist())}
    assert len(shares) == 15 and all(sum(row) == 1 and min(row) >= 0 for row in shares)
    half = (expected["copy_last"] + expected["ground"]) / 2
    np.testing.assert_allclose(blended[shares[0.5, 0.0, 0.5]], half, atol=1e-6)
    quarters = (2 * expected["mean_given"] + expected["copy_last"] + expected["ground"]) / 4
    np.testing.assert_allclose(blended[shares[0.25, 0.5, 0.25]], quarters, atol=1e-6)


def test_one_blend_is_chosen_for_all_clips():
    """Each clip alone would choose another one, of which the other clip gets little."""
    scores_BKF = np.zeros((2, 15, 4), np.float32)
    scores_BKF[0, 3], scores_BKF[1, 5], scores_BKF[:, 9] = 10, 10, 6
    scores_BKF[:, :, 0] = np.nan
    assert int(baselines.best_blend(scores_BKF)) == 9


@pytest.mark.parametrize("given", [1, 4])
def test_guesses_have_the_shape_of_one_frame(given):
    found = baselines.guesses(np.zeros((2, given, 4, 4, 3), np.float32))
    assert {guess.shape for guess in found.values()} == {(2, 1, 4, 4, 3)}

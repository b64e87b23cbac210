"""Word vectors are frozen, tell words and places apart, and are zero past the caption."""

import numpy as np

from jaxvid.data import text


def test_rows_are_unit_then_zero():
    rows = text.embed("A red square, moves", 8, 64)
    assert rows.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), [1, 1, 1, 1, 1, 0, 0, 0], atol=1e-6)


def test_words_and_places_both_count():
    red_blue, blue_red = text.embed("red blue", 4, 64), text.embed("blue red", 4, 64)
    assert np.abs(red_blue - blue_red).max() > 0.1
    same = text.embed("red red", 2, 256)
    cosine = same[0] @ same[1]
    assert 0.3 < cosine < 0.7  # one word in two places: half of the vector agrees


def test_same_everywhere_and_case_blind():
    np.testing.assert_array_equal(text.embed("Red", 2, 4), text.embed("red", 2, 4))
    golden = [-0.308193, -0.023334, 0.913538, 0.264424]
    np.testing.assert_allclose(text.embed("red", 1, 4)[0], golden, atol=1e-5)


def test_long_captions_are_cut_and_empty_ones_are_zero():
    assert text.embed("a b c d", 2, 8).shape == (2, 8)
    assert not text.embed("", 3, 8).any()

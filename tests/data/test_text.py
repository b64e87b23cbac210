"""Word vectors are frozen, tell words and places apart, and are zero past the caption."""

import unicodedata

import numpy as np
import pytest
from absl import logging

from jaxvid.data import text
from jaxvid.errors import UserError
from tests.videos import data_config


@pytest.fixture
def first_warnings(monkeypatch):
    """Warnings that a process gives only a few times are given, whatever other tests did."""
    monkeypatch.setattr(
        logging, "log_first_n", lambda level, msg, n, *rest: logging.log(level, msg, *rest)
    )


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


def test_long_captions_are_cut_with_a_warning_and_empty_ones_are_zero(caplog, first_warnings):
    with caplog.at_level("WARNING", "absl"):
        assert not text.embed("", 3, 8).any()
        whole = text.embed("a b", 2, 8)
        assert not caplog.records
        np.testing.assert_array_equal(text.embed("a b c d", 2, 8), whole)
    (record,) = caplog.records
    assert "has 4 words and text_tokens=2: it is cut before 'c'" in record.getMessage()


def test_words_of_ascii_captions():
    assert text.words("A red-blue square,x_1 MOVES 2 px.") == [
        *("a", "red", "blue", "square", ",", "x", "1", "moves", "2", "px")
    ]


@pytest.mark.parametrize(
    "caption, wanted",
    [
        ("Un CAFÉ noir, là", "un|café|noir|,|là"),
        ("लाल वर्ग, दाएँ चलता है", "लाल|वर्ग|,|दाएँ|चलता|है"),
        ("சிவப்பு சதுரம்", "சிவப்பு|சதுரம்"),
        ("ক্\u200dষ", "ক্\u200dষ"),
        ("红色方块移动", "红|色|方|块|移|动"),
        ("3只 dogs跑", "3|只|dogs|跑"),
        ("赤いボール", "赤|い|ボール"),
        ("빨간 공", "빨간|공"),
        ("ดำ ๑๒", "ด|ำ|๑๒"),
        ("\u0301 \u200d☎\ufe0f", ""),
    ],
)
def test_words_of_other_scripts(caption, wanted):
    """Boundaries of Unicode, in composed and decomposed spelling."""
    wanted = [unicodedata.normalize("NFC", word) for word in wanted.split("|") if word]
    for form in ("NFC", "NFD"):
        assert text.words(unicodedata.normalize(form, caption)) == wanted


def test_bytes_are_utf_8_in_lower_case():
    np.testing.assert_array_equal(text.spell("A Ä", 6), [97, 32, 0xC3, 0xA4, 0, 0])
    assert text.spell("A Ä", 6).dtype == np.uint8
    np.testing.assert_array_equal(text.spell("A\u0308", 3), text.spell("ä", 3))  # NFD and NFC
    for empty in ("", "  ", "\0", "\udcff"):
        assert not text.spell(empty, 4).any()
    np.testing.assert_array_equal(text.spell("a\0b\udcffc\0", 8), [97, 32, 98, 32, 99, 0, 0, 0])


def test_long_bytes_are_cut_between_letters_with_a_warning(caplog, first_warnings):
    with caplog.at_level("WARNING", "absl"):
        np.testing.assert_array_equal(text.spell("aé", 3), [97, 0xC3, 0xA9])
        assert not caplog.records
        np.testing.assert_array_equal(text.spell("aéo", 2), [97, 0])
    (record,) = caplog.records
    assert "has 4 bytes and text_tokens=2: it is cut before 'éo'" in record.getMessage()


def test_readers_give_the_shape_that_they_promise():
    for fields in (dict(text="bytes", text_tokens=9), dict(text_tokens=5, text_width=8)):
        config = data_config("sprites", **fields)
        row = text.reader(config)("a red square")
        assert (row.shape, row.dtype) == text.shape(config)
    with pytest.raises(UserError, match=r"^text='letters': unknown; use one of"):
        text.check(data_config("sprites", text="letters"))

"""Streams of symbols: pairs first, then each key once more, and nothing else."""

import numpy as np
import pytest
from ml_collections import ConfigDict

from jaxvid.data import mqar
from jaxvid.errors import UserError


def config(**changes):
    fields = dict(frames=32, size=2, vocabulary=600, pairs=(2, 5), num_clips=100)
    return ConfigDict({**fields, **changes})


def symbols(source, index):
    video = source[index]["video"]
    assert video.shape == (32, 2, 2, 3) and video.dtype == np.uint8
    assert (video == video[:, :1, :1]).all()
    return video[:, 0, 0, 0] + 256 * video[:, 0, 0, 1].astype(int)


def test_streams_are_pairs_and_then_their_keys():
    source, seen = mqar.Source(config(), "train"), []
    for index in range(40):
        ids = symbols(source, index)
        pairs = int((ids >= 300).sum())
        keys, values = ids[: 2 * pairs].reshape(-1, 2).T
        assert ((keys > 0) & (keys < 300)).all() and (values >= 300).all()
        assert len(set(keys)) == len(set(values)) == pairs
        later = ids[2 * pairs :]
        assert sorted(later[later > 0]) == sorted(keys)
        seen.append(pairs)
    assert set(seen) == {2, 5} and len(source) == 100


def test_gaps_before_queries_are_mostly_short_and_sometimes_long():
    source = mqar.Source(config(pairs=(1,)), "train")
    gaps = [int(np.flatnonzero(symbols(source, index)[2:])[0]) for index in range(300)]
    chance = np.arange(1.0, 31) ** -0.99
    chance /= chance.sum()
    assert np.mean(np.equal(gaps, 0)) == pytest.approx(chance[0], abs=0.08)
    assert np.mean(gaps) == pytest.approx(chance @ np.arange(30), abs=1.5)


def test_a_stream_is_a_function_of_split_and_index():
    train, again, held_out = (
        mqar.Source(config(), split) for split in ("train", "train", "validation")
    )
    np.testing.assert_array_equal(symbols(train, 3), symbols(again, 3))
    assert (symbols(train, 3) != symbols(held_out, 3)).any()
    assert (symbols(train, 3) != symbols(train, 4)).any()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"vocabulary": 7}, "vocabulary=7: must be even"),
        ({"vocabulary": 2}, "vocabulary=2: must lie between 4 and 65536"),
        ({"pairs": (2, 11)}, r"pairs=\(2, 11\): frames=32 and vocabulary=600 allow 1 to 10 pairs"),
        ({"pairs": (9,), "vocabulary": 16}, r"pairs=\(9,\): .*allow 1 to 7 pairs"),
        ({"pairs": ()}, "pairs="),
        ({"pairs": (2, "x")}, r"pairs=\(2, 'x'\): 'x' is not a whole number"),
        ({"frames": 1}, "frames=1: must be at least 3"),
    ],
)
def test_wrong_fields_are_refused(changes, message):
    with pytest.raises(UserError, match=f"^{message}"):
        mqar.Source(config(**changes), "train")

"""Mask schedules and the counts of parallel decoding."""

import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.masking import schedules

# Masked tokens as the released implementations have them, for a cosine schedule.
PHENAKI = [1536, 1530, 1513, 1484, 1443, 1392, 1330, 1258, 1177, 1086, 987, 881, 768, 649, 525, 398]
PHENAKI += [267, 134, 0]
MASKGIT = [1024, 1015, 989, 946, 886, 812, 724, 623, 512, 391, 265, 133, 0]


def counts(rounding, steps, tokens, schedule="cosine"):
    """All tokens, then those masked after each step."""
    table = schedules.decoding_counts(schedule, steps, tokens, rounding)
    return [tokens, *table[:, tokens]]


def test_counts_are_those_of_phenaki():
    assert counts("nearest", 18, 1536) == PHENAKI


def test_counts_are_those_of_maskgit():
    assert counts("floor", 12, 1024) == MASKGIT


@pytest.mark.parametrize("schedule", schedules.SCHEDULES)
@pytest.mark.parametrize("rounding", schedules.ROUNDINGS)
@pytest.mark.parametrize("tokens, steps", [(1, 4), (7, 3), (5, 12), (64, 8)])
def test_counts_fall_to_zero(schedule, rounding, tokens, steps):
    table = schedules.decoding_counts(schedule, steps, tokens, rounding)
    assert table.shape == (steps, tokens + 1)
    whole = np.concatenate([np.arange(tokens + 1)[None], table])
    assert (np.diff(whole, axis=0) <= 0).all() and (table >= 0).all()
    assert (table[-1] == 0).all() and (table[:-1, 1:] >= 1).all()
    if rounding == "floor":  # every step but the last keeps a token, while there are several
        assert (np.diff(whole[:-1], axis=0)[whole[:-2] > 1] < 0).all()


@pytest.mark.parametrize(
    "schedule, expected",
    [
        ("cosine", [0.9238795, 0.7071068, 0.3826834]),
        ("uniform", [0.75, 0.5, 0.25]),
        ("square", [0.9375, 0.75, 0.4375]),
        ("cubic", [0.984375, 0.875, 0.578125]),
        ("sqrt", [0.5, 0.2928932, 0.1339746]),
        ("log", [2 / 6, 1 / 6, 0.0691729]),  # -log2(r) / log2(64)
        ("exp", [1 - 64**-0.75, 1 - 64**-0.5, 1 - 64**-0.25]),
    ],
)
def test_shares_of_64_tokens(schedule, expected):
    found = schedules.share(schedule, [0.25, 0.5, 0.75], 64)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    ends = schedules.share(schedule, [0.0, 1.0], 64)
    assert ends[0] >= 0.98 and ends[1] == schedules.LEAST


def test_unknown_names_are_refused():
    with pytest.raises(UserError, match=r"^schedule='sine': unknown; use one of cosine"):
        schedules.share("sine", 0.5, 4)
    with pytest.raises(UserError, match=r"^rounding='up': unknown"):
        schedules.decoding_counts("cosine", 2, 4, "up")

"""Multi-query associative recall: streams of symbols that ask how much a state can hold.

A stream begins with pairs of a key and its value. Later each key occurs once more, and the answer
is its value (Arora et al. 2023, Zoology). A stream is a video here too: a frame shows one symbol as
a uniform colour.
"""

import numpy as np

from jaxvid import checks
from jaxvid.data import source
from jaxvid.errors import UserError

BLANK = 0
MAX_VOCABULARY = 2**16  # symbols: two bytes of a colour
_POWER = 0.01  # a gap before a query has probability gap^(_POWER - 1): mostly short, some long


def paint(ids_T: np.ndarray, size: int) -> np.ndarray:
    """Symbols int [T] -> video uint8 [T, size, size, 3]: low byte in red, high byte in green."""
    colour_T3 = np.stack([ids_T % 256, ids_T // 256, np.zeros_like(ids_T)], axis=-1)
    frame_THWC = colour_T3[:, None, None].astype(np.uint8)
    return np.broadcast_to(frame_THWC, (len(ids_T), size, size, 3)).copy()


class Source(source.Source):
    """Streams of one split.

    config: frames T, size, vocabulary V, pairs (the possible numbers of pairs, equally likely),
    num_clips. Symbols 1 .. V/2 - 1 are keys and V/2 .. V - 1 values; frames between queries are
    blank. All keys of a stream differ, and so do all values.
    """

    num_classes = 1

    def __init__(self, config, split):
        if "vocabulary" not in config:
            raise UserError("name='mqar': symbols, not video; use --config=configs/mqar.py")
        self._split, self._frames, self._size = split, config.frames, config.size
        self._vocabulary, self._pairs = config.vocabulary, tuple(config.pairs)
        self._count = config.num_clips if split == "train" else source.VALIDATION_CLIPS
        checks.between("vocabulary", self._vocabulary, 4, MAX_VOCABULARY)
        checks.require(self._vocabulary % 2 == 0, "vocabulary", self._vocabulary, "must be even")
        checks.at_least("frames", self._frames, 3)  # a pair and its query
        checks.whole_numbers("pairs", self._pairs)
        most = min(self._frames // 3, self._vocabulary // 2 - 1)
        room = f"frames={self._frames} and vocabulary={self._vocabulary} allow 1 to {most} pairs"
        is_possible = bool(self._pairs) and max(self._pairs) <= most
        checks.require(is_possible, "pairs", self._pairs, room)

    def __len__(self):
        return self._count

    def name(self, index):
        return f"mqar-{self._split}-{index}"

    def read(self, index, rng=None):
        """Stream `index`, always the same: the rng is not used."""
        del rng
        rng = np.random.default_rng((source.SPLITS.index(self._split), index))
        pairs, half = self._pairs[rng.integers(len(self._pairs))], self._vocabulary // 2
        key_P = 1 + rng.choice(half - 1, pairs, replace=False)
        value_P = half + rng.choice(half, pairs, replace=False)
        gap = np.arange(1, self._frames - 2 * pairs + 1) ** (_POWER - 1)
        gap_P = rng.choice(gap.size, pairs, replace=False, p=gap / gap.sum())
        ids_T = np.full(self._frames, BLANK)
        ids_T[: 2 * pairs] = np.stack([key_P, value_P], axis=1).reshape(-1)
        ids_T[2 * pairs + gap_P] = key_P
        return {"video": paint(ids_T, self._size), "label": 0, "caption": ""}

"""Multi-query associative recall: streams of symbols that ask how much a state can hold.

A stream begins with pairs of a key and its value; later each key comes once more, and the answer is
its value (Arora et al. 2023, Zoology). As everywhere a stream is a video: a frame is one symbol,
shown as a plain colour.
"""

import numpy as np

from jaxvid.errors import UserError

BLANK = 0
SPLITS = ("train", "validation")
VALIDATION_CLIPS = 1024
_POWER = 0.01  # gaps before queries have probability gap^(_POWER - 1): mostly short, some long


def paint(ids_T, size):
    """Symbols int [T] -> video uint8 [T, size, size, 3]: red has the low byte, green the high."""
    colour_T3 = np.stack([ids_T % 256, ids_T // 256, np.zeros_like(ids_T)], axis=-1)
    frame_THWC = colour_T3[:, None, None].astype(np.uint8)
    return np.broadcast_to(frame_THWC, (len(ids_T), size, size, 3)).copy()


class Source:
    """Streams of one split; see `jaxvid.data.make_source`.

    config: frames T, size, vocabulary V, pairs (the numbers of pairs that occur, equally often),
    num_clips. Symbols 1 .. V/2 - 1 are keys and V/2 .. V - 1 values; between queries frames are
    blank. Keys of a stream differ, and so do values.
    """

    num_classes = 1
    captions = False

    def __init__(self, config, split):
        if "vocabulary" not in config:
            raise UserError("data.name='mqar': symbols, no video; use --config=configs/mqar.py")
        self._split, self._frames, self._size = split, config.frames, config.size
        self._vocabulary, self._pairs = config.vocabulary, tuple(config.pairs)
        self._count = config.num_clips if split == "train" else VALIDATION_CLIPS
        if self._vocabulary % 2 or not 4 <= self._vocabulary <= 2**16:
            raise UserError(f"data.vocabulary={self._vocabulary}: must be even, from 4 to {2**16}")
        most = min(self._frames // 3, self._vocabulary // 2 - 1)
        if most < 1:
            raise UserError(
                f"data.frames={self._frames}: too few for a pair and its question; use 3 or more"
            )
        if not self._pairs or min(self._pairs) < 1 or max(self._pairs) > most:
            raise UserError(
                f"data.pairs={self._pairs}: data.frames={self._frames} and "
                f"data.vocabulary={self._vocabulary} leave room for 1 to {most} pairs"
            )

    def __len__(self):
        return self._count

    def name(self, index):
        return f"mqar-{self._split}-{index}"

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, rng=None):
        """Stream `index`, always the same: `rng` has nothing to choose here."""
        del rng
        rng = np.random.default_rng((SPLITS.index(self._split), index))
        pairs, half = self._pairs[rng.integers(len(self._pairs))], self._vocabulary // 2
        key_P = 1 + rng.choice(half - 1, pairs, replace=False)
        value_P = half + rng.choice(half, pairs, replace=False)
        gap = np.arange(1, self._frames - 2 * pairs + 1) ** (_POWER - 1)
        place_P = rng.choice(gap.size, pairs, replace=False, p=gap / gap.sum())
        ids_T = np.full(self._frames, BLANK)
        ids_T[: 2 * pairs] = np.stack([key_P, value_P], axis=1).reshape(-1)
        ids_T[2 * pairs + place_P] = key_P
        return {"video": paint(ids_T, self._size), "label": 0, "caption": ""}

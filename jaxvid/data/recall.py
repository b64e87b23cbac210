"""Clips that test memory: they show something, hide it for a gap, and show it again.

Of one clip the frames [0, lead) show it, [lead, lead + gap) do not, and all later ones show it
again. The hidden frames do not depend on it, and they say when it will be back. So a network can
know when from the picture, and what from its memory alone.
"""

import abc
from collections.abc import Mapping

import numpy as np
from ml_collections import ConfigDict

from jaxvid import checks
from jaxvid.data import source, transforms
from jaxvid.errors import UserError

MAX_GAP = 2**20


class Recall(source.Source):
    """Clips of one split, a pure function of (split, index) and the range of the gap.

    config: frames, size, num_clips and gap, the least and the most hidden frames, all equally
    likely. What a clip shows does not depend on lead and gap, and a longer clip continues a
    shorter one.
    """

    num_classes = 1  # a label or caption would tell what must be remembered

    leads: tuple[int, int]
    """The least and the most frames before the gap."""

    answer: int
    """Frames after the gap that `scores` reads."""

    smallest: int
    """Pixels along a side that the oracle needs."""

    chance: Mapping[str, float]
    """{score: its mean for answers that are drawn without memory}."""

    def __init__(self, config, split):
        if "gap" not in config:
            raise UserError(f"name={config.name!r}: has a gap; use --config=configs/recall.py")
        self._config, self._split = config, split
        self._window = transforms.Window.of(config)
        checks.at_least("size", config.size, self.smallest)
        self._count = config.num_clips if split == "train" else source.VALIDATION_CLIPS
        self.gap = gap = tuple(config.gap)
        checks.require(len(gap) == 2, "gap", gap, "write its least and its most frames, as 8,16")
        checks.whole_numbers("gap", gap)
        remedy = f"must rise and end at {MAX_GAP} or less"
        checks.require(gap[0] <= gap[1] <= MAX_GAP, "gap", gap, remedy)
        checks.require(config.stride == 1, "stride", config.stride, "a gap counts frames; use 1")
        remedy = "the oracle knows the clips as they are; use flip=False"
        checks.require(not config.flip, "flip", config.flip, remedy)
        needed = self.frames_for(gap[1])
        remedy = f"clips with gap={gap} end before the answer; use {needed} or more"
        checks.require(config.frames >= needed, "frames", config.frames, remedy)

    def __len__(self):
        return self._count

    @classmethod
    def frames_for(cls, gap: int) -> int:
        """Frames of a clip that surely show the answer after a gap."""
        return cls.leads[1] + gap + cls.answer

    def with_gap(self, gap: int) -> "Recall":
        """These clips, all with the longest lead and this gap, and as long as that needs."""
        fields = ConfigDict(self._config.to_dict())
        fields.update(gap=(gap, gap), frames=self.frames_for(gap))
        clips = type(self)(fields, self._split)
        clips.leads = (self.leads[1], self.leads[1])
        return clips

    def draw(self, rng: np.random.Generator) -> tuple[int, int]:
        """The lead and the gap of a clip. Drawn last, so that nothing else depends on them."""
        ranges = (self.leads, self.gap)
        return tuple(int(rng.integers(low, high + 1)) for low, high in ranges)

    @abc.abstractmethod
    def back(self, index: int) -> int:
        """The first frame after the gap of a clip, lead + gap."""

    @abc.abstractmethod
    def scores(self, index: int, video_THWC: np.ndarray) -> dict[str, float]:
        """What an oracle reads from frames back .. back + answer - 1, uint8 [answer, H, W, 3].

        {score: 1 if that part of the answer is right, else 0, or a share in between}.
        """

    @abc.abstractmethod
    def render(self, index: int) -> np.ndarray:
        """The video of a clip, uint8 [T, H, W, 3]."""

    def read(self, index, rng=None):
        """Clip `index`, always the same: the rng is not used."""
        del rng
        return {"video": self.render(index), "label": 0, "caption": ""}

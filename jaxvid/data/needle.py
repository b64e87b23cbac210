"""A needle among cards: one marked card of a long clip is asked for at its end.

Every frame shows a card of CELLS x CELLS coloured cells. One early card has a white border. Cards
without a border follow, which are drawn independently of it and of each other. Then comes an empty
card with a white border, the question, and all later frames are the answer: the marked card again.
The gap is what lies between, the question included. A state must keep the marked card alone while
others pass that look the same.
"""

from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from jaxvid.data import recall, source, sprites

CELLS = 2  # along each side of a card
BORDER = 1 / 8  # width of the border in units of the picture's side
GREY, WHITE = 0.5, 1.0  # an empty card and the border of cards; the border of the marked one
COLOURS = np.array(list(sprites.COLOURS.values()))
NEAR = 0.3  # distance of a cell from its colour in RGB; two colours are 0.7 apart or more
EARLIER = (0, 2)  # cards before the marked one


class Cards(NamedTuple):
    """What a clip shows: colours int [CELLS, CELLS] of the marked card, lead, and gap."""

    marked: np.ndarray
    lead: int  # frames up to the marked card, itself included
    gap: int


def draw_frame(colours, border: float, size: int) -> np.ndarray:
    """A card of colours, int [CELLS, CELLS], or an empty one, None -> uint8 [H, W, 3]."""
    edges = BORDER + (1 - 2 * BORDER) * np.arange(CELLS + 1) / CELLS
    pixel = np.arange(size)
    # Shares of each row or column of pixels in each row or column of cells.
    first, last = (np.clip(size * edge[:, None] - pixel, 0, 1) for edge in (edges[:-1], edges[1:]))
    share_CW = last - first
    inside_HW1 = (share_CW.sum(0)[:, None] * share_CW.sum(0))[..., None]
    card_CC3 = np.full((CELLS, CELLS, 3), GREY) if colours is None else COLOURS[colours]
    cells_HW3 = np.einsum("ah,bw,abc->hwc", share_CW, share_CW, card_CC3)
    return np.rint(255 * (cells_HW3 + (1 - inside_HW1) * border)).astype(np.uint8)


def read_cells(frame_HWC: np.ndarray) -> np.ndarray:
    """The colours of the cells of uint8 [H, W, 3], int [CELLS, CELLS]; -1 near none of them.

    A cell counts by the mean of its middle half.
    """
    side = (1 - 2 * BORDER) / CELLS
    middles = BORDER + side * (np.arange(CELLS) + 0.5)
    pixel = (np.arange(len(frame_HWC)) + 0.5) / len(frame_HWC)
    is_inside_CW = np.abs(pixel - middles[:, None]) <= side / 4
    weight_CW = is_inside_CW / is_inside_CW.sum(1, keepdims=True)
    mean_CC3 = np.einsum("ah,bw,hwc->abc", weight_CW, weight_CW, frame_HWC / 255)
    distance = np.linalg.norm(mean_CC3[:, :, None] - COLOURS, axis=-1)
    return np.where(distance.min(-1) < NEAR, distance.argmin(-1), -1)


class Source(recall.Recall):
    """Clips of cards, one of which is asked for."""

    leads = (EARLIER[0] + 1, EARLIER[1] + 1)
    answer = 1
    smallest = 8
    chance = MappingProxyType({"cells": 1 / len(COLOURS), "card": 1 / len(COLOURS) ** CELLS**2})

    def name(self, index):
        return f"needle-{self._split}-{index}"

    def cards(self, index) -> Cards:
        """What clip `index` shows."""
        rng = np.random.default_rng((source.SPLITS.index(self._split), index))
        marked = rng.integers(len(COLOURS), size=(CELLS, CELLS))
        return Cards(marked, *self.draw(rng))

    def back(self, index):
        cards = self.cards(index)
        return cards.lead + cards.gap

    def scores(self, index, video_THWC):
        """{"cells": share of the cells with the right colour, "card": 1.0 if all have it}."""
        is_right = read_cells(video_THWC[0]) == self.cards(index).marked
        return {"cells": float(is_right.mean()), "card": float(is_right.all())}

    def render(self, index):
        """The frames of clip `index`, uint8 [T, H, W, 3]."""
        cards, back, size = self.cards(index), self.back(index), self._window.size
        rng = np.random.default_rng((source.SPLITS.index(self._split), index, 1))
        marked = draw_frame(cards.marked, WHITE, size)
        question = draw_frame(None, WHITE, size)
        frames = []
        for t in range(self._window.frames):
            if t == cards.lead - 1 or t >= back:
                frames.append(marked)
            elif t == back - 1:
                frames.append(question)
            else:
                colours = rng.integers(len(COLOURS), size=(CELLS, CELLS))
                frames.append(draw_frame(colours, GREY, size))
        return np.stack(frames)

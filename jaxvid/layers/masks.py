"""Attention masks as functions of positions: allow(q_position, k_position) -> bool.

A position is a frame index, so causality is by frame: all tokens of a frame see that whole frame
and everything before it. Two values are special. `CONTEXT` marks prefix tokens, which precede every
frame. `EMPTY` marks unused cache slots, which follow every frame. `NOISY` plus a frame is the
position of its noisy copy in teacher forcing.
"""

import functools
from collections.abc import Callable

import numpy as np

from jaxvid import checks

CONTEXT = -1
EMPTY = np.iinfo(np.int32).max
NOISY = 2**30
MAX_WINDOW = 2**20  # frames


@functools.cache  # equal masks are one function, so that what is made for a mask is made once
def causal(window: int | None = None, sinks: int = 0) -> Callable:
    """Frame-block causal mask: frame q sees frame k iff k <= q and k is recent or a sink.

    window: frames that a query sees, its own included; None = the whole past. sinks: the first
    `sinks` frames always stay visible (attention sinks, Xiao et al. 2023), and so does the context.
    Raises UserError for a window below 1.
    """
    check_window(window)

    def allow(q, k):
        past = k <= q
        return past if window is None else past & ((k > q - window) | (k < sinks))

    return allow


@functools.cache
def teacher_forced(window: int | None = None, sinks: int = 0) -> Callable:
    """`causal` for clean frames and their noisy copies; a copy sees earlier frames and itself.

    Nothing else sees a copy, and a copy does not see the clean frame that it stands for. window,
    sinks, errors: as in `causal`.
    """
    clean = causal(window, sinks)

    def allow(q, k):
        past = clean(q % NOISY, k) & (k < NOISY) & ((q < NOISY) | (k < q - NOISY))
        return past | (k == q)

    return allow


def check_window(window: int | None):
    """Raise UserError for a window below 1, or that no memory holds.

    In a window of 0 a query would see not even itself. Softmax over equally masked scores is
    uniform, so the query would see the future.
    """
    if window is not None:
        checks.at_least("window", window, 1, at_most=MAX_WINDOW)


def full(q, k):
    """Everything sees everything, except empty slots: the non-causal baseline."""
    return (q != EMPTY) & (k != EMPTY)

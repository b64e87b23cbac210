"""Attention masks as functions of positions: allow(q_position, k_position) -> bool.

A position is a frame index, so causality is by frame: all tokens of a frame see that whole frame
and everything before it. Two values are special: `CONTEXT` marks prefix tokens, which lie before
every frame, and `EMPTY` marks cache slots that hold nothing, which lie after every frame.
"""

import numpy as np

from jaxvid.errors import UserError

CONTEXT = -1
EMPTY = np.iinfo(np.int32).max


def causal(window=None, sinks=0):
    """Frame-block causal mask: frame q sees frame k iff k <= q and k is recent or a sink.

    window: frames that a query sees including its own, None = all of the past. sinks: the first
    `sinks` frames stay visible for ever (attention sinks, Xiao et al. 2023). Context is always
    seen. Raises UserError for a window below 1.
    """
    check_window(window)

    def allow(q, k):
        past = k <= q
        return past if window is None else past & ((k > q - window) | (k < sinks))

    return allow


def check_window(window, field="window"):
    """Raise UserError, naming the field, for a window in which nothing would see even itself.

    Scores that are masked all alike are none to softmax, which would then see the future.
    """
    if window is not None and not window >= 1:
        raise UserError(f"{field}={window}: a window of nothing; use 1 or more")


def full(q, k):
    """Everything sees everything, except empty slots: the non-causal baseline."""
    return (q != EMPTY) & (k != EMPTY)

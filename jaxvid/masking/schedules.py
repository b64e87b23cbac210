"""How many tokens are masked: mask schedules and the counts of parallel decoding.

A mask schedule is a falling function from [0, 1] to [0, 1]: the share of masked tokens at progress
r (MaskGIT, Chang et al. 2022, section 3.3).
"""

import numpy as np

from jaxvid.checks import choose

LEAST = 1e-6  # a share of 0 would leave nothing to predict


def _log(r, tokens):
    return -np.log2(np.maximum(r, 1 / tokens)) / np.log2(max(tokens, 2))


def _exp(r, tokens):
    return 1 - np.exp2(-np.log2(max(tokens, 2)) * (1 - r))


SCHEDULES = {
    "cosine": lambda r, tokens: np.cos(np.pi / 2 * r),
    "uniform": lambda r, tokens: 1 - r,
    "square": lambda r, tokens: 1 - r**2,
    "cubic": lambda r, tokens: 1 - r**3,
    "sqrt": lambda r, tokens: 1 - r**0.5,
    "log": _log,
    "exp": _exp,
}
ROUNDINGS = ("floor", "nearest")


def share(schedule: str, r, tokens: int) -> np.ndarray:
    """The share of masked tokens at progress r, float64 like r, in [LEAST, 1].

    tokens: of a whole clip, on which "log" and "exp" depend. Raises UserError for an unknown
    schedule.
    """
    choose("schedule", schedule, SCHEDULES)
    r = np.asarray(r, np.float64)
    return np.clip(SCHEDULES[schedule](r, tokens), LEAST, 1)


def training_shares(schedule: str, levels: int, tokens: int) -> np.ndarray:
    """The shares that training draws from, at the middles of `levels` parts of [0, 1]; float32."""
    return share(schedule, (np.arange(levels) + 0.5) / levels, tokens).astype(np.float32)


def decoding_counts(schedule: str, steps: int, tokens: int, rounding: str) -> np.ndarray:
    """Tokens still masked after each decoding step, int32 [steps, tokens + 1].

    Column n is for a clip with n tokens to generate. rounding: "floor" (MaskGIT and MAGVIT: every
    step keeps one token or more, and one stays masked until the last step) or "nearest" (Phenaki in
    phenaki-pytorch: one or more stay masked until the last step). After the last step nothing is.
    Raises UserError for an unknown rounding.
    """
    choose("rounding", rounding, ROUNDINGS)
    n = np.arange(tokens + 1)
    rows, before = [], n
    for step in range(1, steps):
        left = share(schedule, step / steps, tokens) * n
        if rounding == "floor":
            before = np.maximum(np.minimum(np.floor(left), before - 1), 1)
        else:
            before = np.maximum(np.round(left), 1)
        rows.append(np.minimum(before, n))
    rows.append(np.zeros_like(n))
    return np.stack(rows).astype(np.int32)

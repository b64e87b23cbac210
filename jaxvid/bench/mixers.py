"""Temporal mixers by length of the stream, and the length from which they beat softmax."""

import functools
import sys

import jax
import numpy as np

from jaxvid.bench.timing import take_turns
from jaxvid.mixers import MIXERS

STREAM_LENGTHS = (512, 1024, 2048, 4096)  # tokens of a stream through a mixer


def measure():
    """Every mixer over frames of 16 tokens, width 64, 4 heads, forward, by length of the stream.

    Named <mixer>_<tokens>_forward_ms, the best time, and _mib, the memory of the program beside
    arguments and results. <mixer>_efficiency_length_ms and _mib: from how many tokens on the mixer
    costs less than softmax, by `efficiency_length`. alibi, which is quadratic too, is left out.
    """
    figures = {}
    names = [name for name in MIXERS if name != "alibi"]
    for L in STREAM_LENGTHS:
        print(f"timing {L} tokens", file=sys.stderr)
        x_BTND = jax.random.normal(jax.random.key(0), (1, L // 16, 16, 64))
        runs = []
        for name in names:
            mixer = MIXERS[name](width=64, heads=4, grid=(4, 4))
            params = jax.jit(mixer.init)(jax.random.key(1), x_BTND[:, :1])
            program = jax.jit(lambda params, x, mixer=mixer: mixer.apply(params, x)[0])
            program = program.lower(params, x_BTND).compile()
            memory = program.memory_analysis().temp_size_in_bytes
            figures[f"{name}_{L}_forward_mib"] = memory / 2**20
            runs.append(functools.partial(program, params, x_BTND))
        for name, seconds in zip(names, take_turns(*runs)):
            figures[f"{name}_{L}_forward_ms"] = 1e3 * min(seconds)
    for unit in ("ms", "mib"):
        costs = {
            name: [figures[f"{name}_{L}_forward_{unit}"] for L in STREAM_LENGTHS] for name in names
        }
        for name in names[1:]:
            length = efficiency_length(STREAM_LENGTHS, costs[name], costs["softmax"])
            figures[f"{name}_efficiency_length_{unit}"] = length
    return figures


def efficiency_length(lengths, costs, quadratic):
    """The length from which a linear cost stays below a quadratic one (CAB, Zhang et al. 2023).

    Least squares of d n + e and of a n^2 + b n + c; the last crossing of the two, 0 if the
    linear one is always lower. NaN if `quadratic` does not bend upwards.
    """
    a, b, c = np.polyfit(lengths, quadratic, 2)
    d, e = np.polyfit(lengths, costs, 1)
    if a <= 0:
        return float("nan")
    roots = np.roots([a, b - d, c - e])
    return max([0.0, *roots[np.isreal(roots)].real.tolist()])

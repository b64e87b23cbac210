"""Every implementation of softmax attention under masks of frames, beside attention unmasked."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.bench.timing import calls, compile_all, take_turns
from jaxvid.kernels import attention
from jaxvid.layers import masks

# Name: rows, heads, frames, tokens of a frame, width of a head, window or None. On a CPU a frame
# has a sixteenth of the tokens.
SHAPES = {
    "b": (8, 12, 16, 256, 64, None),
    "xl": (4, 16, 16, 256, 72, None),
    "wide": (4, 9, 16, 256, 128, None),
    "xl_long": (1, 16, 64, 256, 72, None),
    "xl_window": (1, 16, 64, 256, 72, 16),
}
SCORES = ("xla", "reference")  # which have a matrix of scores in memory
LARGEST_SCORES = 2**33  # bytes of that matrix, of which a gradient holds several
DIRECTIONS = ("forward", "both")
LARGEST_MASK = 2**26  # entries of the mask that cuDNN reads, and whose gradient XLA computes


def measure(shapes=tuple(SHAPES)):
    """by_shape: a row for every shape and implementation that applies to it.

    Milliseconds are the best, of the forward pass and with all gradients. TFLOP/s count visible
    pairs: two products forward, five more backward. of_unmasked: the time of a visible pair with
    this implementation, in the time of a pair of attention without a mask by the fastest
    implementation, which is the last row of the shape.
    """
    rows = {}
    for shape in shapes:
        rows |= _measure(shape, *SHAPES[shape])
    return {"by_shape": rows}


def _measure(name, B, A, T, N, K, window):
    print(f"timing attention {name}", file=sys.stderr)
    cpu = jax.default_backend() == "cpu"
    N = N // 16 if cpu else N
    L, dtype = T * N, jnp.float32 if cpu else jnp.bfloat16
    position_L = np.arange(T).repeat(N)
    inputs = jax.random.normal(jax.random.key(0), (4, B, L, A, K), dtype)

    def run(implementation, allow, q, k, v):
        options = dict(q_position_L=position_L, k_position_M=position_L, allow=allow)
        return attention.attention(q, k, v, **options, implementation=implementation)

    def both(attend, q, k, v, dy):
        return jax.vjp(attend, q, k, v)[1](dy)

    masked, programs = masks.causal(window), {}
    for implementation in attention.IMPLEMENTATIONS:
        for mask, allow in (("", masked), ("unmasked", masks.full)):
            large = 4 * B * A * L * L > LARGEST_SCORES if implementation in SCORES else False
            if large or (implementation == "cudnn" and not mask and L * L > LARGEST_MASK):
                continue
            attend = functools.partial(run, implementation, allow)
            with contextlib.suppress(NotImplementedError):
                programs[implementation, mask] = [
                    jax.jit(attend).lower(*inputs[:3]),
                    jax.jit(functools.partial(both, attend)).lower(*inputs),
                ]
    compiled = compile_all([lowered for pair in programs.values() for lowered in pair])
    pairs = zip(programs, zip(compiled[::2], compiled[1::2]))
    runs = {
        (*name, direction): functools.partial(program, *arrays)
        for name, pair in pairs
        if None not in pair
        for direction, program, arrays in zip(DIRECTIONS, pair, (inputs[:3], inputs))
    }
    times = map(min, take_turns(*runs.values(), calls=calls()))
    best = dict(zip(runs, times))
    found = {
        name: [best[*name, direction] for direction in DIRECTIONS]
        for name in programs
        if (*name, DIRECTIONS[0]) in best
    }

    seen = int(masked(np.arange(T)[:, None], np.arange(T)[None]).sum()) * N * N
    pairs = {"": seen, "unmasked": L * L}
    fastest = min((both, key) for key, (_, both) in found.items() if key[1] == "unmasked")[1]
    per_pair = [seconds / (L * L) for seconds in found[fastest]]
    rows = {}
    for (implementation, mask), seconds in found.items():
        if mask and (implementation, mask) != fastest:
            continue
        count = pairs[mask]
        work = [n * 2 * B * A * K * count for n in (2, 7)]
        label = f"{name}_{implementation}" + (f"_{mask}" if mask else "")
        rows[label] = {
            "forward_ms": 1e3 * seconds[0],
            "both_ms": 1e3 * seconds[1],
            "forward_tflop_per_s": work[0] / seconds[0] / 1e12,
            "both_tflop_per_s": work[1] / seconds[1] / 1e12,
            "forward_of_unmasked": seconds[0] / count / per_pair[0],
            "both_of_unmasked": seconds[1] / count / per_pair[1],
        }
    return dict(sorted(rows.items(), key=lambda row: "unmasked" in row[0]))

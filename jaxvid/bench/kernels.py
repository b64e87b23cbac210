"""Every implementation of an operation beside causal softmax attention, over lengths."""

import functools
import sys

import jax
import jax.numpy as jnp

from jaxvid.bench.timing import calls, compile_all, products, take_turns
from jaxvid.kernels import gated_delta, linear_attention
from jaxvid.parallel.devices import cuda_capability
from jaxvid.training import flops

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # tokens of a kernel
LARGEST_SCORES = 2**29  # bytes of the score matrix of softmax; its gradient holds several
# Rows, heads, tokens and head width with published times; on a CPU all are smaller.
PUBLISHED = (
    (4, 32, 32768, 128),
    (1, 96, 8192, 128),
    (2, 16, 16384, 128),
    (4, 64, 4096, 128),
    (4, 8, 16384, 256),
)
SHORT = PUBLISHED[-2:]  # those of the fewest tokens
ROOFLINE_CHUNK = 128  # tokens between two states in the count of necessary work
DIRECTIONS = ("forward", "backward", "both")
# The kinds of contenders, each with its operation.
OPS = {
    "linear_attention": {"plain": linear_attention, "decay": linear_attention},
    "gated_delta": {"delta": gated_delta, "decay": linear_attention},
}


def measure(op, lengths=None, shapes=None):
    """Every implementation of an operation beside causal softmax attention, over lengths.

    lengths: in tokens, LENGTHS unless given. shapes: PUBLISHED unless given. The delta rule stands
    beside linear attention with a decay too. Figures are named <contender>_<tokens or
    shape>_<forward, backward or both>: the best milliseconds, TFLOP/s and GB/s of the chunk
    algorithm, the share of the rate of a plain product, and the share of the limit of this device,
    given the rates of a plain product and a plain copy measured in turn with it; at PUBLISHED
    shapes also the share of the limit by the data sheet, if that is known. Backward is the
    difference of both and forward. Softmax does other work and has its time alone;
    <contender>_<direction>_ahead_of_softmax_from is the number of tokens from which a contender is
    faster.
    """
    cpu = jax.default_backend() == "cpu"
    B, A, K, dtype = (2, 4, 64, jnp.float32) if cpu else (4, 16, 128, jnp.bfloat16)
    figures = {}
    lengths = LENGTHS if lengths is None else lengths
    for L in lengths:
        figures |= _measure(op, B, A, L, K, dtype, f"{L}")
    if lengths:
        figures |= ahead_of_softmax(figures)
    for shape in PUBLISHED if shapes is None else shapes:
        B, A, L, K = (max(1, n // 8) for n in shape) if cpu else shape
        label = f"b{B}a{A}l{L}k{K}"
        figures |= _measure(op, B, A, L, K, dtype, label, ROOFLINE_CHUNK)
    return figures


def _measure(op, B, A, L, K, dtype, label, chunk=None):
    """The figures of all contenders at one shape. chunk: of the counted work; None is their own."""
    print(f"timing {label}", file=sys.stderr)
    square, _ = products(K, dtype)
    large = jnp.ones(2**24 if jax.default_backend() == "cpu" else 2**28, dtype)
    copy = functools.partial(jax.jit(lambda x: x + 1), large)
    runs = _runs(op, B, L, A, K, dtype)
    square_s, copy_s, *times = take_turns(square.run, copy, *runs.values(), calls=calls())
    rate, moving = square.flops / min(square_s), 2 * large.nbytes / min(copy_s)
    limits = {"limit": (rate, moving)}
    if chunk:
        device = jax.devices()[0]
        limits["roofline"] = (flops.peak(device, dtype), flops.bandwidth(device))
    best = {run: min(seconds) for run, seconds in zip(runs, times)}
    figures = {}
    for name in dict(best):
        contender, direction = name
        if direction == "both" and (contender, "forward") in best:
            best[contender, "backward"] = best[name] - best[contender, "forward"]
    for (contender, direction), seconds in best.items():
        run = f"{contender}_{label}_{direction}"
        figures[f"{run}_ms"] = 1e3 * seconds
        if contender == "softmax":
            continue
        implementation, kind = contender.split("_")
        own = getattr(OPS[op][kind], implementation).CHUNK
        operations, moved = (B * L * A * n for n in work(direction, K, chunk or own, kind))
        moved *= jnp.dtype(dtype).itemsize
        figures[f"{run}_tflop_per_s"] = operations / seconds / 1e12
        figures[f"{run}_gb_per_s"] = moved / seconds / 1e9
        figures[f"{run}_share_of_matmul"] = operations / seconds / rate
        for limit, (fastest, widest) in limits.items():
            if fastest and widest:
                least = max(operations / fastest, moved / widest)
                figures[f"{run}_share_of_{limit}"] = least / seconds
    return figures


def ahead_of_softmax(figures):
    """{<contender>_<direction>_ahead_of_softmax_from: the first such length of LENGTHS}.

    A contender is ahead at every longer length at which softmax is timed; NaN if it is not ahead at
    the longest of them.
    """
    found = {}
    for name in figures:
        contender, _, rest = name.partition(f"_{LENGTHS[0]}_")
        direction = rest.removesuffix("_ms")
        if direction not in DIRECTIONS or contender == "softmax":
            continue
        first = float("nan")
        for L in reversed(LENGTHS):
            softmax = figures.get(f"softmax_{L}_{direction}_ms")
            if softmax is None:
                continue
            if figures[f"{contender}_{L}_{direction}_ms"] >= softmax:
                break
            first = L
        found[f"{contender}_{direction}_ahead_of_softmax_from"] = first
    return found


def work(direction, K, chunk, kind="decay"):
    """(FLOPs, numbers moved) per token and head of the chunk algorithm, as `measure` runs it.

    Whole tiles of scores count, and the states between chunks that forward saves for backward. The
    delta rule, kind "delta", multiplies by two more tiles and once more by the state; its
    triangular inverse does not count, and backward counts as twice forward.
    """
    forward = 4 * K * (chunk + K), 4 * K
    both = K * (14 * chunk + 12 * K), 11 * K + 2 * K * K / chunk
    if kind == "delta":
        forward = 2 * K * (4 * chunk + 3 * K), forward[1]
        both = 3 * forward[0], both[1]
    backward = tuple(b - f for b, f in zip(both, forward))
    return dict(zip(DIRECTIONS, (forward, backward, both)))[direction]


def _runs(op, B, L, A, K, dtype):
    """{(contender, forward or both): a function that runs it} on random tokens."""
    q, k, v, dy = jax.random.normal(jax.random.key(0), (4, B, L, A, K), dtype)
    if op == "gated_delta":
        k /= jnp.linalg.norm(k, axis=-1, keepdims=True)
    g, beta = jax.random.uniform(jax.random.key(1), (2, B, L, A))
    inputs = (q, k, v, -g, beta)

    def both(attend, dy, *inputs):
        return jax.vjp(attend, *inputs)[1](dy)

    programs = {}
    for name, attend in contenders(op, B, L, A, K, dtype).items():
        programs[name, "forward"] = jax.jit(attend), inputs
        programs[name, "both"] = jax.jit(functools.partial(both, attend)), (dy, *inputs)
    compiled = compile_all([run.lower(*arrays) for run, arrays in programs.values()])
    return {
        name: functools.partial(program, *arrays)
        for (name, (_, arrays)), program in zip(programs.items(), compiled)
        if program
    }


def contenders(op, B, L, A, K, dtype):
    """{name: function of (q, k, v, g, beta) -> y} of contenders that fit in memory."""

    def linear(implementation, kind):
        def run(q, k, v, g, beta):
            if kind == "delta":
                return gated_delta.gated_delta(q, k, v, beta, g, implementation=implementation)
            g = g if kind == "decay" else None
            return linear_attention.linear_attention(q, k, v, g, implementation=implementation)

        return run

    platform, found = jax.default_backend(), {}
    for kind, package in OPS[op].items():
        for name in ("chunked", *({platform} & set(package.IMPLEMENTATIONS))):
            found[f"{name}_{kind}"] = linear(name, kind)
    if flash(K, dtype):
        found["softmax"] = _softmax("cudnn")
    elif 4 * B * A * L**2 <= LARGEST_SCORES:
        found["softmax"] = _softmax("xla")
    return found


def flash(K, dtype):
    """Whether cuDNN has a softmax kernel without a score matrix for heads of width K."""
    capability = cuda_capability() or 0
    widest = 256 if capability >= 9 else 128
    return jnp.dtype(dtype).itemsize == 2 and capability >= 8 and K % 8 == 0 and widest >= K


def _softmax(implementation):
    def run(q, k, v, g, beta):
        del g, beta
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation=implementation)

    return run

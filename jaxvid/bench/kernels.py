"""Every implementation of an operation beside causal softmax attention, over lengths."""

import functools

import jax
import jax.numpy as jnp

from jaxvid.bench.timing import products, take_turns
from jaxvid.kernels import linear_attention
from jaxvid.training import flops

LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)  # tokens of a kernel
LARGEST_SCORES = 2**29  # bytes of softmax's matrix, of which its gradient holds several
# Rows, heads, tokens and head width that others publish times for (on a CPU of less of all).
PUBLISHED = (
    (4, 32, 32768, 128),
    (1, 96, 8192, 128),
    (2, 16, 16384, 128),
    (4, 64, 4096, 128),
    (4, 8, 16384, 256),
)
ROOFLINE_CHUNK = 128  # tokens between two states in the count of what a run must do
KINDS = ("plain", "decay")
OPS = {"linear_attention": linear_attention.linear_attention}


def measure(op):
    """Every implementation of linear attention beside causal softmax attention, over lengths.

    Named <contender>_<tokens>_<forward or both>: the best milliseconds, the FLOP/s and bytes/s of
    the chunk algorithm in it, and the share of what this device could do at the rates of a plain
    product and a plain copy, measured in turn with it. Softmax stands alone: it does other work.
    """
    cpu = jax.default_backend() == "cpu"
    B, A, K, dtype = (2, 4, 64, jnp.float32) if cpu else (4, 16, 128, jnp.bfloat16)
    square, _ = products(K, dtype)
    large = jnp.ones(2**24 if cpu else 2**28, dtype)
    copy = jax.jit(lambda x: x + 1)
    figures = {}
    for L in LENGTHS:
        runs = _runs(op, B, L, A, K, dtype)
        square_s, copy_s, *times = take_turns(
            square.run, functools.partial(copy, large), *runs.values()
        )
        rate, moving = square.flops / min(square_s), 2 * large.nbytes / min(copy_s)
        for (name, direction), seconds in zip(runs, times):
            label = f"{name}_{L}_{direction}"
            figures[f"{label}_ms"] = 1e3 * min(seconds)
            if name != "softmax":
                chunk = getattr(linear_attention, name.split("_")[0]).CHUNK
                operations, moved = (B * L * A * each for each in work(direction, K, chunk))
                moved *= jnp.dtype(dtype).itemsize
                figures[f"{label}_gflop_per_s"] = operations / min(seconds) / 1e9
                figures[f"{label}_gb_per_s"] = moved / min(seconds) / 1e9
                limit = max(operations / rate, moved / moving)
                figures[f"{label}_share_of_limit"] = limit / min(seconds)
    for shape in PUBLISHED:
        figures |= published(op, *((max(1, n // 8) for n in shape) if cpu else shape), dtype)
    return figures


def published(op, B, A, L, K, dtype):
    """Best milliseconds at one of PUBLISHED, and the share of what the device's maker promises.

    That is left out where the maker's figures are unknown.
    """
    device, figures = jax.devices()[0], {}
    rate, moving = flops.peak(device, dtype), flops.bandwidth(device)
    runs = _runs(op, B, L, A, K, dtype)
    for (name, direction), seconds in zip(runs, take_turns(*runs.values())):
        label = f"{name}_b{B}a{A}l{L}k{K}_{direction}"
        figures[f"{label}_ms"] = 1e3 * min(seconds)
        if rate and moving and name != "softmax":
            operations, moved = (B * L * A * each for each in work(direction, K, ROOFLINE_CHUNK))
            limit = max(operations / rate, moved * jnp.dtype(dtype).itemsize / moving)
            figures[f"{label}_share_of_roofline"] = limit / min(seconds)
    return figures


def work(direction, K, chunk):
    """(FLOPs, numbers moved) per token and head of a run of `measure`, by the chunk algorithm.

    Whole tiles of scores count, and states between chunks that forward saves for backward.
    """
    if direction == "forward":
        return 4 * K * (chunk + K), 4 * K
    return K * (14 * chunk + 12 * K), 11 * K + 2 * K * K / chunk


def _runs(op, B, L, A, K, dtype):
    """{(contender, forward or both): a function that runs it} on random tokens."""
    x = jax.random.normal(jax.random.key(0), (4, B, L, A, K), dtype)
    inputs = (*x, -jax.random.uniform(jax.random.key(1), (B, L, A)))
    runs = {}
    for name, attend in contenders(op, B, L, A).items():
        gradients = jax.grad(attend, argnums=(0, 1, 2, 4))
        runs[name, "forward"] = functools.partial(jax.jit(attend), *inputs)
        runs[name, "both"] = functools.partial(jax.jit(gradients), *inputs)
    return runs


def contenders(op, B, L, A):
    """{name: function of (q, k, v, dy, g) -> a scalar} of what applies here and fits in memory."""
    attend = OPS[op]

    def linear(implementation, decayed):
        def run(q, k, v, dy, g):
            g = g if decayed else None
            return jnp.vdot(attend(q, k, v, g, implementation=implementation), dy)

        return run

    def softmax(q, k, v, dy, g):
        return jnp.vdot(jax.nn.dot_product_attention(q, k, v, is_causal=True), dy)

    platform = jax.default_backend()
    names = ["chunked", *({platform} & set(linear_attention.IMPLEMENTATIONS))]
    found = {f"{name}_{kind}": linear(name, kind == "decay") for name in names for kind in KINDS}
    if 4 * B * A * L**2 <= LARGEST_SCORES:
        found["softmax"] = softmax
    return found

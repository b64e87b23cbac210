"""Tiles of the GPU kernels, timed beside each other: what their TILES are chosen by."""

import contextlib
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.bench import timing
from jaxvid.errors import UserError
from jaxvid.kernels.attention import gpu as attention_gpu
from jaxvid.kernels.attention.gpu import Tile as Block
from jaxvid.kernels.linear_attention import gpu as linear_gpu
from jaxvid.kernels.linear_attention.gpu import Tile
from jaxvid.layers import masks

# Rows, heads, tokens and width, and the tiles of the state to time. Others spill registers.
LINEAR = {
    (8, 12, 4096, 64): [(64, 4, 2), (64, 4, 3), (32, 4, 3)],
    (4, 32, 8192, 128): [(64, 4, 1), (64, 4, 2), (64, 4, 3), (128, 8, 2)],
    (4, 8, 16384, 256): [(64, 8, 2), (64, 8, 3), (32, 4, 2), (32, 4, 3)],
}
SEGMENTS = (1, 2, 4, 8)
SECONDS = 0.3  # of measuring one tile
# Rows, heads, frames, tokens of a frame and width, and for each of the three kernels, its tiles.
ATTENTION = {
    (8, 12, 16, 256, 64): (
        [(64, 64, 4, 3), (64, 64, 4, 2), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3)],
        [(64, 64, 4, 2), (64, 64, 4, 3), (64, 128, 4, 2), (128, 64, 4, 2)],
        [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2), (128, 128, 8, 2)],
    ),
    (4, 16, 16, 256, 72): (
        [(128, 64, 4, 2), (128, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2)],
        [(64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 2), (128, 128, 8, 2)],
        [(64, 64, 4, 2), (64, 64, 4, 3), (32, 64, 4, 2), (64, 128, 8, 2)],
    ),
    (4, 9, 16, 256, 128): (
        [(128, 64, 4, 3), (128, 64, 4, 2), (128, 128, 8, 2), (64, 64, 4, 3)],
        [(64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 2)],
        [(64, 64, 4, 2), (32, 64, 4, 2), (64, 128, 8, 2)],
    ),
}


def measure(op):
    """by_tile: the best milliseconds of every candidate for TILES, forward and with gradients.

    Raises UserError without a GPU, and for an operation without tiles.
    """
    kinds = {"attention": _attention, "linear_attention": _linear}
    if op not in kinds:
        raise UserError(f"op={op}: has no tiles; --tune takes {' or '.join(kinds)}")
    if jax.default_backend() != "gpu":
        raise UserError("tune=true: tiles are for GPUs, and JAX finds none; leave --tune out")
    return {"by_tile": kinds[op]()}


def _linear():
    rows = {}
    for (B, A, L, K), tiles in LINEAR.items():
        q, k, v, dy = jax.random.normal(jax.random.key(0), (4, B, L, A, K), jnp.bfloat16)
        g = -jax.random.uniform(jax.random.key(1), (B, L, A))
        state = jnp.zeros((B, A, K, K))
        auto, programs_of = linear_gpu.segments_of(B * A, L, K, K), linear_gpu.TILES[K].programs
        choices = [(Tile(*tile, programs_of), auto) for tile in tiles]
        choices += [(linear_gpu.TILES[K], n) for n in SEGMENTS if n != auto]
        programs = {}
        for tile, segments in choices:
            attend = functools.partial(linear_gpu.attend, segments)
            with _replaced(linear_gpu.TILES, K, tile):
                lowered = _lower(attend, (q, k, v, g, state), (dy, state))
            programs[f"{K} {tile[:3]} segments {segments}"] = lowered
        rows |= _time(programs, (q, k, v, g, state))
    return rows


def _attention():
    rows = {}
    for (B, A, T, N, K), tiles in ATTENTION.items():
        q, k, v, dy = jax.random.normal(jax.random.key(0), (4, B, T * N, A, K), jnp.bfloat16)
        position_L = np.arange(T).repeat(N)
        options = dict(q_position_L=position_L, k_position_M=position_L, allow=masks.causal())
        attend = functools.partial(attention_gpu.attention, **options, scale=K**-0.5)
        widest = min(widest for widest in attention_gpu.TILES if widest >= K)
        programs = {}
        for place, kernel in enumerate(attention_gpu.Tiles._fields):
            for tile in tiles[place]:
                chosen = attention_gpu.TILES[widest]._replace(**{kernel: Block(*tile)})
                with _replaced(attention_gpu.TILES, widest, chosen):
                    programs[f"{K} {kernel} {tile}"] = _lower(attend, (q, k, v), dy)
        rows |= _time(programs, (q, k, v))
    return rows


@contextlib.contextmanager
def _replaced(table, key, value):
    """An entry of a table, replaced for the time of a `with`."""
    before, table[key] = table[key], value
    try:
        yield
    finally:
        table[key] = before


def _lower(attend, arrays, cotangents):
    """The forward pass and the one with gradients, lowered with the tiles of now."""

    def forward(*arrays):
        return attend(*arrays)

    def both(*arrays):
        return jax.vjp(attend, *arrays)[1](cotangents)

    return [jax.jit(function).lower(*arrays) for function in (forward, both)]


def _time(programs, arrays):
    """{name: {forward_ms, both_ms}}; NaN for what does not compile."""

    flat = timing.compile_all([lowered for pair in programs.values() for lowered in pair])
    ready = {name: flat[2 * n : 2 * n + 2] for n, name in enumerate(programs)}
    rows = {}
    for name, pair in ready.items():
        seconds = [float("nan")] * 2
        if None not in pair:
            runs = [functools.partial(program, *arrays) for program in pair]
            with timing.lasting(SECONDS):
                seconds = map(min, timing.take_turns(*runs, calls=timing.calls()))
        rows[name] = {f"{n}_ms": 1e3 * s for n, s in zip(("forward", "both"), seconds)}
        print(name, *(f"{value:.3f}" for value in rows[name].values()), file=sys.stderr)
    return rows

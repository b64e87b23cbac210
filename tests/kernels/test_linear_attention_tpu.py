"""Linear attention on TPU: Pallas kernels interpreted, costed, and compiled ahead of time."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    NamedSharding,
    PartitionSpec,
    SingleDeviceSharding,
)

from jaxvid.kernels.linear_attention import linear_attention, tpu
from jaxvid.training import flops
from tests.kernels.harness import TOPOLOGIES, assert_close, inputs, interpreter, value_and_grads


@pytest.mark.parametrize("same", [False, True])
def test_the_interpreter_finds_races(same, capfd):
    """Programs side by side that write one block: the alarm that other tests listen for."""

    def kernel(x_ref, y_ref):
        y_ref[...] = x_ref[...]

    block = pl.BlockSpec((8, 128), lambda n: (n, 0))
    run = pl.pallas_call(
        kernel,
        jax.ShapeDtypeStruct((32, 128), jnp.float32),
        grid=(4,),
        in_specs=[block],
        out_specs=pl.BlockSpec((8, 128), lambda n: (0, 0)) if same else block,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",)),
        interpret=interpreter(cores=2),
    )
    jax.block_until_ready(run(jnp.ones((32, 128))))
    assert ("RACE" in capfd.readouterr().out) == same


@pytest.mark.parametrize(
    "case, strength, chunk, batch, cores",
    [
        ("no decay, packed", None, 128, 2, 2),
        ("decay of a token, long", "mixed", 256, 2, 1),
        ("decay of a token, long", "weak", 256, 1, 1),
        ("decay of a channel, packed", "mixed", 128, 1, 1),
        ("decay of a channel, long", "weak", 128, 1, 1),
    ],
)
def test_tpu_kernels_interpreted(case, strength, chunk, batch, cores, capfd):
    """Chunks in order, heads and rows in any; memory starts as NaN and races are looked for."""
    arrays, segment_ids = inputs(case, strength, batch)
    with pltpu.force_tpu_interpret_mode(interpreter(cores)):
        got = value_and_grads(arrays, segment_ids, implementation="tpu", chunk=chunk)
        jax.block_until_ready(got)
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


def products(chunk, width, per_channel):
    """Multiply-adds per token, whole tiles: forward, and backward with saved states."""
    levels = chunk.bit_length() - 1 if per_channel else 1
    scores = chunk * width
    return scores * (levels + 1) + 2 * width**2, scores * (3 * levels + 2) + 4 * width**2


def kernels(chunk, width, per_channel, sharding=None, length=1024):
    """(forward and backward kernel, its arguments, the multiply-adds and the bytes they take)."""
    B, L, A, K = 2, length, 4, width
    decay = (B, A, L, K) if per_channel else (B, A, 1, L)
    x, g, state = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in [
            ((B, A, L, K), jnp.bfloat16),
            (decay, jnp.float32),
            ((B, A, K, K), jnp.float32),
        ]
    )

    @jax.jit
    def run(inputs, cotangents):
        values, pull = jax.vjp(functools.partial(tpu.attend, chunk), *inputs)
        return values, pull(cotangents)

    # Read q, k, v and write y; read q, k, v, dy and write dq, dk, dv; read the decay twice, write
    # its gradient; states and cotangents at both ends, and between chunks states out and in.
    size = 11 * 2 * B * A * L * K + 3 * 4 * math.prod(decay)
    size += B * A * K * K * (4 * 4 + 2 * 2 * L // chunk)
    return (
        run,
        ((x, x, x, g, state), (x, state)),
        B * A * L * sum(products(chunk, K, per_channel)),
        size,
    )


@pytest.mark.parametrize("per_channel", [False, True])
def test_tpu_kernels_estimate_their_cost(per_channel):
    run, arguments, multiply_adds, size = kernels(128, 64, per_channel)
    closed = [run.trace(*arguments).jaxpr]
    estimates = []
    while closed:
        for equation in closed.pop().eqns:
            if equation.primitive.name == "pallas_call":
                estimates.append(equation.params["cost_estimate"])
            else:
                closed += jax.core.jaxprs_in_params(equation.params)
    assert len(estimates) == 2
    assert flops.count(run, *arguments) == 2 * multiply_adds
    assert sum(cost.bytes_accessed for cost in estimates) == size


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tpu_kernels_compile(topology, tpu_devices):
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    tiles = [(128, 64), (128, 128), (256, 128), (128, 256)]
    for tile in [*((*tile, False) for tile in tiles), (128, 128, True), (128, 96, True)]:
        # Tokens so many that the compiler copies no array into the memory of the chip beforehand.
        run, arguments, multiply_adds, size = kernels(*tile, sharding, length=2**16)
        compiled = run.lower(*arguments).compile()
        program, cost = compiled.as_text(), compiled.cost_analysis()
        assert program.count("tpu_custom_call") == 2
        assert cost["flops"] == pytest.approx(2 * multiply_adds, rel=0.05)
        if tile[1] % tpu.LANES == 0:  # then these are the bytes that the kernels read and write
            assert cost["bytes accessed"] == pytest.approx(size, rel=0.05)
        else:  # arguments are laid out anew for the kernels, which counts three times what they do
            stated = re.findall(r'"bytes_accessed":"?(\d+)', program)
            assert sum(map(int, stated)) == size


@pytest.mark.tpu_aot
def test_tpu_kernels_compile_for_a_pod(tpu_pod):
    """Split by hand over rows, heads and the sequence; devices exchange states and decays alone."""
    B, L, A, K = 8, 1024, 4, 128
    split = NamedSharding(tpu_pod, PartitionSpec(("data", "fsdp"), "seq", "tensor"))
    x = jax.ShapeDtypeStruct((B, L, A, K), jnp.bfloat16, sharding=split)
    g = jax.ShapeDtypeStruct((B, L, A), jnp.float32, sharding=split)

    def loss(q, k, v, g):
        return jnp.sum(linear_attention(q, k, v, g).astype(jnp.float32))

    with jax.set_mesh(tpu_pod):
        run = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))
        program = run.lower(x, x, x, g).compile().as_text()
    assert program.count('custom_call_target="tpu_custom_call"') == 2
    exchanged = re.findall(r"(\w+)\[([\d,]*)\]\S* all-(?:gather|reduce|to-all)", program)
    sizes = [math.prod(map(int, shape.split(","))) if shape else 1 for _, shape in exchanged]
    assert sizes and max(sizes) <= 2 * (B // 4) * (A // 2) * K * K

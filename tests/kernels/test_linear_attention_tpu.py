"""Linear attention on TPU: kernels interpreted, costed, and compiled ahead of time."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvid.kernels.linear_attention import linear_attention, tpu
from jaxvid.training import flops
from tests.kernels.harness import (
    TOPOLOGIES,
    assert_equals_reference,
    cost_estimates,
    interpreter,
    make,
)

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("same", [False, True])
def test_races_are_detected(same, capfd):
    """Parallel programs that write the same block, or not."""

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


def check_interpreted(capfd, L, decay, packed, chunk, *, batch=1, cores=1, seed=0):
    """Heads and rows in random order, memory that starts as NaN, and a check for races."""
    arrays, segment_ids = make(L, 16, 24, decay, packed=packed, batch=batch)
    with pltpu.force_tpu_interpret_mode(interpreter(cores, seed)):
        assert_equals_reference(arrays, segment_ids, implementation="tpu", chunk=chunk)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "L, decay, packed, chunk, cores, seed",
    [
        (130, None, True, 128, 2, 0),
        (600, "token", True, 256, 1, 4),
        (150, "channel", False, 128, 2, 4),
    ],
)
def test_tpu_kernels_interpreted(L, decay, packed, chunk, cores, seed, capfd):
    check_interpreted(capfd, L, decay, packed, chunk, batch=2, cores=cores, seed=seed)


def test_seeds_change_the_order():
    """For the seeds above, rows and heads do not always run in order."""
    x, g = jnp.ones((2, 2, 128, 16)), jnp.zeros((2, 2, 1, 128))

    def order(seed):
        points = []

        def record(token, point, core):
            points.append(point)
            return token

        parameters = dataclasses.replace(interpreter(1, seed), grid_point_recorder=record)
        with pltpu.force_tpu_interpret_mode(parameters):
            jax.block_until_ready(tpu.attend(128, x, x, x, g, x[:, :, :16]))
        return [tuple(map(int, point[:2])) for point in points]

    rows, heads = zip(*(zip(*order(seed)) for seed in (0, 4)))
    assert {len(row) for row in rows} == {4}
    assert set(rows) != {(0, 0, 1, 1)} and set(heads) != {(0, 1, 0, 1)}


def test_wrong_decay_gradient_fails(monkeypatch, capfd):
    kernel = tpu._backward_kernel

    def broken(by_channel, *refs):
        kernel(by_channel, *refs)
        dg_ref = refs[-3]
        dg_ref[...] *= 1.01

    monkeypatch.setattr(tpu, "_backward_kernel", broken)
    with pytest.raises(AssertionError, match=r"dlog_decay is off by 0\.0(1|09)"):
        check_interpreted(capfd, 63, "token", False, 128)


def test_chunks_in_any_order_fail(monkeypatch, capfd):
    anyhow = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    monkeypatch.setattr(tpu, "IN_ORDER", anyhow)
    with pytest.raises(AssertionError, match=r"is off by|RACE"):
        check_interpreted(capfd, 130, None, True, 128)


def products(chunk, width, per_channel):
    """Multiply-adds per token, whole tiles: forward, and backward with saved states."""
    levels = chunk.bit_length() - 1 if per_channel else 1
    scores = chunk * width
    decays = scores * per_channel  # a product sums the gradients of the decays
    return scores * (levels + 1) + 2 * width**2, scores * (3 * levels + 2) + 4 * width**2 + decays


def kernels(chunk, width, per_channel, sharding=None, length=1024):
    """(a function of both kernels, its arguments, the multiply-adds, the bytes)."""
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


def check_estimates(per_channel):
    run, arguments, multiply_adds, size = kernels(128, 64, per_channel)
    estimates = cost_estimates(run, *arguments)
    assert len(estimates) == 2
    assert flops.count(run, *arguments) == 2 * multiply_adds, "flops"
    assert sum(cost.bytes_accessed for cost in estimates) == size, "bytes"


@pytest.mark.parametrize("per_channel", [False, True])
def test_cost_estimates(per_channel):
    check_estimates(per_channel)


@pytest.mark.parametrize("field, name", [("flops", "flops"), ("bytes_accessed", "bytes")])
def test_wrong_cost_estimate_fails(field, name, monkeypatch):
    cost = tpu.cost

    def broken(*args, **options):
        right = cost(*args, **options)
        return dataclasses.replace(right, **{field: int(1.1 * getattr(right, field))})

    monkeypatch.setattr(tpu, "cost", broken)
    with pytest.raises(AssertionError, match=name):
        check_estimates(False)


def check_compiles(tile, sharding):
    # With this many tokens the compiler copies no array into VMEM beforehand.
    run, arguments, multiply_adds, size = kernels(*tile, sharding, length=2**16)
    compiled = run.lower(*arguments).compile()
    program, cost = compiled.as_text(), compiled.cost_analysis()
    assert program.count("tpu_custom_call") == 2
    assert cost["flops"] == pytest.approx(2 * multiply_adds, rel=0.05)
    if tile[1] % tpu.LANES == 0:
        assert cost["bytes accessed"] == pytest.approx(size, rel=0.05)
    else:  # the compiler also counts copies of arguments into another layout
        stated = re.findall(r'"bytes_accessed":"?(\d+)', program)
        assert sum(map(int, stated)) == size


@pytest.mark.tpu_aot
@pytest.mark.parametrize("topology", TOPOLOGIES)
def test_tpu_kernels_compile(topology, tpu_devices):
    sharding = SingleDeviceSharding(tpu_devices(topology)[0])
    tiles = [(128, 64), (128, 128), (256, 128), (128, 256)]
    for tile in [*((*tile, False) for tile in tiles), (128, 128, True), (128, 96, True)]:
        check_compiles(tile, sharding)


@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "tile, what, message",
    [
        ((64, 128, False), "block", "divisible by 8 and 128"),
        ((128, 128, False), "memory", "(?i)resource.?exhausted|vmem"),
        ((128, 128, False), "flops", "approx|=="),
    ],
)
def test_invalid_kernels_do_not_compile(tile, what, message, tpu_devices, monkeypatch):
    """Blocks of half a tile, too much scratch memory, or a wrong estimate."""
    call, cost = pl.pallas_call, tpu.cost

    def hungry(kernel, *args, scratch_shapes, **options):
        more = [*scratch_shapes, pltpu.VMEM((2**13, 2**13), jnp.float32)]
        return call(lambda *refs: kernel(*refs[:-1]), *args, scratch_shapes=more, **options)

    def dearer(*args, **options):
        right = cost(*args, **options)
        return dataclasses.replace(right, flops=int(1.1 * right.flops))

    if what == "memory":
        monkeypatch.setattr(pl, "pallas_call", hungry)
    if what == "flops":
        monkeypatch.setattr(tpu, "cost", dearer)
    with pytest.raises(Exception, match=message):
        check_compiles(tile, SingleDeviceSharding(tpu_devices("v5e:2x2")[0]))


@pytest.mark.tpu_aot
def test_tpu_kernels_compile_for_a_pod(tpu_pod):
    """Rows, heads and the sequence are split. Devices exchange only states and decays."""
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

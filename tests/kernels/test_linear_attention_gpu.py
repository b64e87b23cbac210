"""Linear attention on GPU: kernels interpreted, and lowered without a GPU."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AbstractDevice, AbstractMesh

from jaxvid.kernels import dispatch
from jaxvid.kernels.linear_attention import gpu, linear_attention
from tests.kernels.harness import assert_equals_reference, cost_estimates, interpreter, make


@pytest.mark.parametrize("segments", [1, 2, 4])
def test_segments(segments, launch, monkeypatch):
    """With a number of tokens that no number of segments divides."""
    monkeypatch.setattr(gpu, "segments_of", lambda *_: segments)
    arrays, segment_ids = make(300, 16, 24, "token", packed=True)
    assert_equals_reference(arrays, segment_ids, implementation="gpu")


@pytest.mark.parametrize(
    "heads, L, width, segments",
    [
        (96, 4096, 64, 8),
        (32, 16384, 128, 4),
        (128, 32768, 128, 1),
        (96, 300, 64, 1),
        (3, 1024, 64, 2),
    ],
)
def test_few_heads_are_cut_into_segments(heads, L, width, segments):
    assert gpu.segments_of(heads, L, width, width) == segments


@pytest.mark.parametrize("row", [gpu.NEAR, gpu.FAR])
def test_wrong_decay_gradient_fails(row, launch, monkeypatch):
    walk = gpu._walk

    def broken(*args, **options):
        y, last, *sums = walk(*args, **options)
        return y, last, *(x.at[:, :, row].multiply(1.01) for x in sums)

    monkeypatch.setattr(gpu, "_walk", broken)
    arrays, segment_ids = make(130, 16, 16, "token", packed=True)
    with pytest.raises(AssertionError, match=r"dlog_decay is off by 0\.0"):
        assert_equals_reference(arrays, segment_ids, implementation="gpu")


def test_gradients_of_strong_decays_are_exact(launch):
    """All decays erase, so their gradients are zero, in bfloat16 too, and not rounded sums."""
    q, k, v, g, state = make(130, 16, 24, "token", "strong")[0]
    q, k, v = (x.astype(jnp.bfloat16) for x in (q, k, v))

    def loss(g):
        y, last = linear_attention(
            q, k, v, g, initial_state=state, return_state=True, implementation="gpu"
        )
        return jnp.sum(y.astype(jnp.float32)) + jnp.sum(last)

    assert jnp.abs(jax.grad(loss)(g)).max() < 1e-15


@pytest.mark.parametrize(
    "K, V, forward, backward", [(128, 128, 2, 2), (256, 256, 8, 8), (256, 32, 1, 4), (64, 64, 1, 1)]
)
def test_cost_estimates(K, V, forward, backward):
    """One kernel forward and three backward, which move each array once.

    The tiles of columns of a state each compute the scores; `backward` is the tiles of dq and dk.
    """
    B, L, A, block = 2, 1024, 4, gpu.BLOCK
    shapes = [((B, L, A, width), jnp.bfloat16) for width in (K, K, V)]
    shapes += [((B, L, A), jnp.float32), ((B, A, K, V), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    y, state = arrays[2], arrays[4]

    def run(*arrays):
        return gpu.attend(1, *arrays)

    def both(arrays, cotangents):
        values, pull = jax.vjp(run, *arrays)
        return values, pull(cotangents)

    tokens, ends, decays = B * L * A, 2 * 4 * B * A * K * V, 4 * 4

    def of(K, V, tiles):  # FLOPs and bytes per token and head of one kernel
        return 2 * (block * (tiles * K + V) + 2 * K * V), 2 * (2 * K + 2 * V) + decays

    own, of_keys = of(K, V, forward), of(V, K, backward)
    # dq and dk have transposed states, read one more array and write two sums for every tile.
    of_keys = of_keys[0], of_keys[1] + 2 * K + 4 * 2 * backward
    all_kernels = [2 * (x + y) for x, y in zip(own, of_keys)]
    for program, given, (flops, size), kernels in [
        (run, arrays, own, 1),
        (both, (arrays, (y, state)), all_kernels, 4),
    ]:
        estimates = cost_estimates(program, *given)
        assert len(estimates) == kernels
        assert sum(estimate.flops for estimate in estimates) == tokens * flops
        moved = sum(estimate.bytes_accessed for estimate in estimates)
        assert moved == tokens * size + kernels * ends


def test_any_order_of_programs(launch, capfd):
    """Programs in parallel and random order, memory that starts as NaN, and a check for races."""
    launch["interpret"] = interpreter(cores=2)
    launch["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",))
    arrays, segment_ids = make(130, 16, 16, packed=True, batch=1)
    assert_equals_reference(arrays, segment_ids, implementation="gpu", chunk=128)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "K, V, dtype, calls",
    [(64, 128, "bfloat16", (1, 4)), (256, 24, "bfloat16", (1, 4)), (16, 16, "float32", (0, 0))],
)
def test_lowering_without_a_gpu(K, V, dtype, calls):
    """To Triton code, forward and backward, and by "auto" where they are the fastest."""
    B, L, A = 2, 300, 2
    arrays = [jax.ShapeDtypeStruct((B, L, A, *width), dtype) for width in ((K,), (K,), (V,), ())]

    def loss(q, k, v, log_decay):
        y = linear_attention(q, k, v, log_decay)
        return jnp.sum(y.astype(jnp.float32))

    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)
    with jax.sharding.use_abstract_mesh(AbstractMesh((1,), ("data",), abstract_device=device)):
        for function, launches in zip((loss, jax.value_and_grad(loss, (0, 1, 2, 3))), calls):
            traced = jax.jit(function).trace(*arrays)
            program = traced.lower(lowering_platforms=("cuda",)).as_text()
            assert program.count("__gpu$xla.gpu.triton") == launches


@pytest.mark.parametrize(
    "K, dtype, kind, capability, message",
    [
        (8, "float32", "channel", "9.0", "a decay per channel"),
        (8, "float32", "head", "9.0", "q, k, v of float32"),
        (264, "bfloat16", "head", "9.0", "width 264: at most 256"),
        (8, "bfloat16", "head", "7.5", "compute capability 7.5"),
        (8, "bfloat16", "head", "gfx942", "compute capability 0.0"),
    ],
)
def test_fallback(K, dtype, kind, capability, message, monkeypatch):
    x = jnp.ones((1, 4, 2, K), dtype)
    g = -jnp.ones(x.shape if kind == "channel" else (2,))
    wanted = linear_attention(x, x, x, g, implementation="chunked")
    monkeypatch.setattr(
        gpu.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)]
    )
    with pytest.raises(NotImplementedError, match=message):
        linear_attention(x, x, x, g, implementation="gpu")
    monkeypatch.setattr(dispatch, "fastest", lambda *_: ("gpu", "chunked"))
    np.testing.assert_array_equal(linear_attention(x, x, x, g), wanted)

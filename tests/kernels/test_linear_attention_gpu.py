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


def test_several_blocks_in_a_chunk(launch):
    arrays, segment_ids = make(300, 16, 24, "token", packed=True)
    assert_equals_reference(arrays, segment_ids, implementation="gpu")


def test_wrong_decay_gradient_fails(launch, monkeypatch):
    gradients = gpu._gradients

    def broken(*args):
        *right, sums_BARL = gradients(*args)
        return *right, 1.01 * sums_BARL

    monkeypatch.setattr(gpu, "_gradients", broken)
    arrays, segment_ids = make(63, 16, 16, "token", packed=True)
    with pytest.raises(AssertionError, match=r"dlog_decay is off by 0\.0"):
        assert_equals_reference(arrays, segment_ids, implementation="gpu")


@pytest.mark.parametrize("K, V, tiles", [(128, 128, (1, 1)), (256, 256, (4, 4)), (256, 32, (1, 2))])
def test_cost_estimates(K, V, tiles):
    """Two kernels forward and two backward, with the states between chunks saved.

    One fused kernel takes 2 C K + 2 C V + 4 K V FLOPs per token forward. Here a token meets only
    C' = (C + 64) / 2 of the C tokens of its chunk, and every tile of columns recomputes the scores.
    """
    B, L, A, C = 2, 1024, 4, 256
    shapes = [((B, L, A, width), jnp.bfloat16) for width in (K, K, V)]
    shapes += [((B, L, A), jnp.float32), ((B, A, K, V), jnp.float32)]
    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    y, state = arrays[2], arrays[4]

    def forward(*arrays):
        return gpu.attend(C, *arrays)

    def both(arrays, cotangents):
        values, pull = jax.vjp(forward, *arrays)
        return values, pull(cotangents)

    (of_y, of_gradients), met = tiles, (C + 64) // 2
    decays, states, ends = 2 * 4 * 4, 2 * K * V // C, 2 * 4 * B * A * K * V
    tokens = B * L * A
    flops_forward = 2 * met * (of_y * K + V) + 4 * K * V
    flops_backward = 2 * met * (of_gradients * (K + 2 * V) + 2 * K + V) + 8 * K * V
    bytes_forward = tokens * (2 * (3 * K + 3 * V) + 2 * states + decays) + ends
    bytes_backward = tokens * (2 * (5 * K + 4 * V) + 3 * states + decays + 8 * of_gradients) + ends
    flops_both, bytes_both = flops_forward + flops_backward, bytes_forward + bytes_backward
    for run, given, flops, size in [
        (forward, arrays, flops_forward, bytes_forward),
        (both, (arrays, (y, state)), flops_both, bytes_both),
    ]:
        estimates = cost_estimates(run, *given)
        assert sum(estimate.flops for estimate in estimates) == tokens * flops
        assert sum(estimate.bytes_accessed for estimate in estimates) == size


def test_any_order_of_programs(launch, capfd):
    """Programs in parallel and random order, memory that starts as NaN, and a check for races."""
    launch["interpret"] = interpreter(cores=2)
    launch["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    arrays, segment_ids = make(130, 16, 16, packed=True, batch=1)
    assert_equals_reference(arrays, segment_ids, implementation="gpu", chunk=128)
    assert "RACE" not in capfd.readouterr().out


@pytest.mark.parametrize(
    "K, V, dtype, implementation, calls",
    [
        (64, 128, "bfloat16", "auto", (2, 4)),
        (256, 24, "bfloat16", "auto", (2, 4)),
        (16, 16, "float32", "gpu", (2, 4)),
        (16, 16, "float32", "auto", (0, 0)),
    ],
)
def test_lowering_without_a_gpu(K, V, dtype, implementation, calls):
    """To Triton code, forward and backward, and by "auto" where they are the fastest."""
    B, L, A = 2, 300, 2
    arrays = [jax.ShapeDtypeStruct((B, L, A, *width), dtype) for width in ((K,), (K,), (V,), ())]

    def loss(q, k, v, log_decay):
        y = linear_attention(q, k, v, log_decay, implementation=implementation)
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
        (8, "float16", "head", "9.0", "q, k, v of float16"),
        (136, "float32", "head", "9.0", "width 136 in float32"),
        (8, "float32", "head", "7.5", "compute capability 7.5"),
        (8, "float32", "head", "gfx942", "compute capability 0.0"),
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

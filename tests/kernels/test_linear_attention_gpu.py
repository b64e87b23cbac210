"""Linear attention on GPU: Pallas kernels interpreted, and lowered without one."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import (
    AbstractDevice,
    AbstractMesh,
)

from jaxvid.kernels import linear_attention as op
from jaxvid.kernels.linear_attention import gpu, linear_attention
from tests.kernels.harness import (
    assert_close,
    assert_equals_reference,
    cost_estimates,
    inputs,
    interpreter,
    value_and_grads,
)


@pytest.mark.parametrize(
    "case, strength, chunk",
    [
        ("one token", "mixed", None),
        ("no decay", None, 128),
        ("decay of a token, packed", "mixed", None),
        ("decay of a token, long", "mixed", None),
        ("decay of a token, long", "weak", None),
    ],
)
def test_gpu_kernels_interpreted(case, strength, chunk, launch):
    arrays, segment_ids = inputs(case, strength)
    assert_equals_reference(arrays, segment_ids, implementation="gpu", chunk=chunk)


def test_a_wrong_gradient_of_the_decay_is_found(launch, monkeypatch):
    gradients = gpu._gradients

    def broken(*args):
        *right, sums_BARL = gradients(*args)
        return *right, 1.01 * sums_BARL

    monkeypatch.setattr(gpu, "_gradients", broken)
    arrays, segment_ids = inputs("decay of a token, packed")
    with pytest.raises(AssertionError, match=r"dlog_decay is off by 0\.0"):
        assert_equals_reference(arrays, segment_ids, implementation="gpu")


@pytest.mark.parametrize("K, V, tiles", [(128, 128, (1, 1)), (256, 256, (4, 4)), (256, 32, (1, 2))])
def test_gpu_kernels_estimate_their_cost(K, V, tiles):
    """Of two kernels forward and two backward, with the states between chunks saved.

    As for one fused kernel, 2 C K + 2 C V + 4 K V FLOPs a token forward, but a token meets only the
    C' = (C + 64) / 2 tokens of its chunk C whose blocks are not after its own, and each of the
    tiles of columns finds the scores anew.
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


def test_gpu_kernels_do_not_depend_on_order(launch, capfd):
    """All programs side by side and in any order; memory starts as NaN and races are looked for."""
    launch["interpret"] = interpreter(cores=2)
    launch["compiler_params"] = pltpu.CompilerParams(dimension_semantics=("parallel",) * 3)
    arrays, segment_ids = inputs("no decay, packed", batch=1)
    got = value_and_grads(arrays, segment_ids, implementation="gpu", chunk=128)
    jax.block_until_ready(got)
    assert "RACE" not in capfd.readouterr().out
    assert_close(got, value_and_grads(arrays, segment_ids, implementation="reference"))


def test_gpu_kernels_in_bfloat16(launch):
    exact, segment_ids = inputs("decay of a token, packed")
    arrays = [x.astype(jnp.bfloat16) for x in exact[:3]] + [*exact[3:]]
    exact = [x.astype(jnp.float32) for x in arrays]
    wanted = value_and_grads(exact, segment_ids, implementation="reference")
    got = value_and_grads(arrays, segment_ids, implementation="gpu")
    assert got["y"].dtype == got["dv"].dtype == jnp.bfloat16
    assert_close(got, wanted, value=0.01, gradient=0.02)


@pytest.mark.parametrize(
    "K, V, dtype, implementation, calls",
    [
        (64, 128, "bfloat16", "auto", (2, 4)),
        (256, 24, "bfloat16", "auto", (2, 4)),
        (16, 16, "float32", "gpu", (2, 4)),
        (16, 16, "float32", "auto", (0, 0)),
    ],
)
def test_gpu_kernels_lower_without_a_gpu(K, V, dtype, implementation, calls):
    """To the code of Triton, forward and backward; by themselves where they are the fastest."""
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
        (8, "float32", "head", "gfx942", "compute capability gfx942"),
    ],
)
def test_where_the_gpu_kernels_do_not_apply_others_do(
    K, dtype, kind, capability, message, monkeypatch
):
    x = jnp.ones((1, 4, 2, K), dtype)
    g = -jnp.ones(x.shape if kind == "channel" else (2,))
    wanted = linear_attention(x, x, x, g, implementation="chunked")
    monkeypatch.setattr(
        gpu.jax, "devices", lambda: [SimpleNamespace(compute_capability=capability)]
    )
    with pytest.raises(NotImplementedError, match=message):
        linear_attention(x, x, x, g, implementation="gpu")
    monkeypatch.setattr(op, "fastest", lambda *_: ("gpu", "chunked"))
    np.testing.assert_array_equal(linear_attention(x, x, x, g), wanted)

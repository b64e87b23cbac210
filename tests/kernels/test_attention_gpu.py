"""Attention on GPU: the kernels interpreted, lowered without a GPU, and on one if there is one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh

from jaxvid.kernels import dispatch
from jaxvid.kernels.attention import attention, gpu
from jaxvid.layers import masks
from jaxvid.training import flops
from tests.kernels.test_attention import CASES, after, frames, inputs, traced, value_and_grads

# Beyond those of every implementation: blocks that are whole, skipped, and cut by padding.
BLOCKS = {
    "frames of blocks": (frames(0, 4, 128), frames(0, 4, 128), masks.causal()),
    "clean and noisy": (
        np.concatenate([frames(0, 4, 70), masks.NOISY + frames(0, 4, 70)]),
        np.concatenate([frames(0, 4, 70), masks.NOISY + frames(0, 4, 70)]),
        masks.teacher_forced(window=2, sinks=1),
    ),
    "blocks without keys": (frames(0, 4, 100), frames(2, 2, 100), masks.causal()),
    "long past": (frames(9, 1, 50), after(7, frames(0, 10, 50)), masks.causal(window=2)),
}
H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", platform="gpu", num_cores=None)


@pytest.fixture(autouse=True)
def cases(monkeypatch):
    for name, case in BLOCKS.items():
        monkeypatch.setitem(CASES, name, case)


@pytest.fixture
def interpreted(launch, monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    monkeypatch.setattr(gpu, "FEWEST", 0)


def assert_equals_reference(case, width, static, dtype=jnp.float32, value=1e-5, gradient=1e-4):
    arrays, arguments = inputs(case, dtype, width=width)
    exact = value_and_grads("reference", [x.astype(jnp.float32) for x in arrays], arguments)
    got = value_and_grads("gpu", arrays, arguments if static else traced(arguments))
    for x, wanted, bound in zip(got, exact, (value, gradient, gradient, gradient)):
        assert x.dtype == dtype
        size = max(np.abs(wanted).max(), 1)  # a gradient may be zero
        np.testing.assert_allclose(x.astype(jnp.float32), wanted, atol=bound * size, rtol=0)


@pytest.mark.parametrize("case", [*CASES, *BLOCKS])
def test_equals_reference(case, interpreted):
    assert_equals_reference(case, 16, True)


@pytest.mark.parametrize("case", ["context", "queries without keys", "clean and noisy"])
def test_traced_positions(case, interpreted):
    assert_equals_reference(case, 16, False)


@pytest.mark.parametrize("width", [8, 72, 96, 128])
def test_widths(width, interpreted):
    assert_equals_reference("window and sinks", width, True)


def test_bfloat16(interpreted):
    assert_equals_reference("context", 72, True, jnp.bfloat16, value=0.02, gradient=0.02)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize(
    "case, width",
    [
        *((case, 64) for case in ("context", "window and sinks", "queries without keys")),
        ("clean and noisy", 128),
        ("frames of blocks", 16),
        ("long past", 72),
        ("context", 72),
    ],
)
def test_on_a_gpu(case, width, static):
    assert_equals_reference(case, width, static, jnp.bfloat16, value=0.02, gradient=0.02)


def positions(T, N):
    return dict(q_position_L=frames(0, T, N), k_position_M=frames(0, T, N), allow=masks.causal())


def test_masked_blocks_are_skipped(interpreted):
    """Of 4 x 4 blocks of whole frames, 10 are computed, in two products forward."""
    q = jax.ShapeDtypeStruct((2, 512, 3, 64), jnp.bfloat16)

    def run(q):
        return attention(q, q, q, implementation="gpu", **positions(4, 128))

    pairs = 2 * 3 * 128 * 128
    assert flops.count(run, q) == 4 * 64 * 10 * pairs
    assert flops.count(run, q, all_pairs=True) == 4 * 64 * 16 * pairs
    backward = flops.count(jax.grad(lambda q: run(q).astype(jnp.float32).sum()), q)
    inner = 2 * q.size  # of y and its cotangent
    assert backward == (2 + 3 + 4) * 2 * 64 * 10 * pairs + inner


@pytest.mark.parametrize("N", [64, 128])
def test_only_blocks_on_the_diagonal_have_a_mask(N):
    """Frames of 128 tokens are blocks of their own; in halves, they need a mask on the diagonal."""
    pairs = gpu.Pairs(masks.causal(), 512, *list(positions(512 // N, N).values())[:2])
    blocks = pairs.blocks(128, 128, *(np.zeros(512, np.int32),) * 2)
    wanted = np.tril(np.full((4, 4), gpu.ALL))
    if N == 64:
        np.fill_diagonal(wanted, gpu.SOME)
    np.testing.assert_array_equal(blocks, wanted)


def test_lowering_without_a_gpu():
    """To Triton code, by "auto"; cuDNN has the attention without a mask."""
    x = jax.ShapeDtypeStruct((2, 300, 4, 72), jnp.bfloat16)
    mesh = AbstractMesh((1,), ("data",), abstract_device=H100)

    def loss(x):
        return attention(x, x, x, **positions(3, 100)).astype(jnp.float32).sum()

    with jax.sharding.use_abstract_mesh(mesh):
        for function, launches in ((loss, 1), (jax.grad(loss), 3)):
            program = jax.jit(function).trace(x).lower(lowering_platforms=("cuda",)).as_text()
            assert program.count("__gpu$xla.gpu.triton") == launches


@pytest.mark.parametrize(
    "shape, dtype, message",
    [
        ((1, 8, 2, 64), jnp.float32, "q, k, v of float32: all must be bfloat16"),
        ((1, 8, 2, 136), jnp.bfloat16, "width 136: at most 128"),
        ((1, 8, 2, 64), jnp.bfloat16, "blocks are for 16384 pairs"),
    ],
)
def test_what_the_kernel_does_not_do(shape, dtype, message, monkeypatch):
    x = jnp.ones(shape, dtype)
    monkeypatch.setattr(dispatch, "platform", lambda: "gpu")
    with pytest.raises(NotImplementedError, match=message):
        attention(x, x, x, implementation="gpu", **positions(2, 4))
    np.testing.assert_allclose(attention(x, x, x, **positions(2, 4)), x, rtol=1e-2)

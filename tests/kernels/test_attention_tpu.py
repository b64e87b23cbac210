"""Attention on TPU by the splash kernel: interpreted, counted, and compiled ahead of time."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from jaxvid.kernels import dispatch
from jaxvid.kernels.attention import attention, tpu
from jaxvid.layers import masks
from jaxvid.training import flops
from tests.kernels.test_attention import CASES, frames, inputs, traced, value_and_grads
from tests.kernels.test_attention_gpu import BLOCKS


@pytest.fixture
def on_tpu(monkeypatch):
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    monkeypatch.setattr(tpu, "FEWEST", 0)


@pytest.mark.parametrize(
    "case", ["context", "window and sinks", "queries without keys", "one key", *BLOCKS]
)
def test_equals_reference(case, on_tpu, launch, monkeypatch):
    monkeypatch.setitem(CASES, case, (CASES | BLOCKS)[case])
    monkeypatch.setattr(tpu, "BLOCK", 128)
    arrays, arguments = inputs(case)
    exact = value_and_grads("reference", arrays, arguments)
    got = value_and_grads("tpu", arrays, arguments)
    for x, wanted, bound in zip(got, exact, (1e-5, 1e-4, 1e-4, 1e-4)):
        size = max(np.abs(wanted).max(), 1)  # a gradient may be zero
        np.testing.assert_allclose(x, wanted, atol=bound * size, rtol=0)


def positions(T, N):
    position_L = frames(0, T, N)
    return dict(q_position_L=position_L, k_position_M=position_L, allow=masks.causal())


def test_masked_blocks_do_not_count(on_tpu):
    """Of 3 x 3 blocks of two whole frames, 6 are computed."""
    q = jax.ShapeDtypeStruct((2, 1536, 3, 64), jnp.bfloat16)

    def run(q):
        return attention(q, q, q, **positions(6, 256))

    pairs = 2 * 3 * 512 * 512
    assert flops.count(run, q) == 4 * 64 * 6 * pairs
    assert flops.count(run, q, all_pairs=True) == 4 * 64 * 9 * pairs
    backward = flops.count(jax.grad(lambda q: run(q).astype(jnp.float32).sum()), q)
    assert backward == (2 + 7) * 2 * 64 * 6 * pairs


def test_what_the_kernel_does_not_do(monkeypatch):
    x = jnp.ones((1, 8, 2, 16))
    arguments = positions(2, 4)
    with pytest.raises(NotImplementedError, match="needs a TPU"):
        attention(x, x, x, implementation="tpu", **arguments)
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    with pytest.raises(NotImplementedError, match="needs positions known while tracing"):
        attention(x, x, x, implementation="tpu", **traced(arguments))
    with pytest.raises(NotImplementedError, match="is for 65536 pairs"):
        attention(x, x, x, implementation="tpu", **arguments)
    np.testing.assert_allclose(attention(x, x, x, **traced(arguments)), x)


def test_equal_masks_are_made_once():
    """Layers of a network share what the kernel makes of a mask."""
    position_L = frames(0, 4, 64)
    one, same = (
        tpu.FrameMask(masks.causal(2), position_L.copy(), position_L, (256, 256)) for _ in range(2)
    )
    other = tpu.FrameMask(masks.causal(3), position_L, position_L, (256, 256))
    assert one == same and hash(one) == hash(same) and one != other


def gradient(arguments):
    def run(q, k, v, dy):
        y, pull = jax.vjp(lambda *qkv: attention(*qkv, **arguments), q, k, v)
        return y, pull(dy)

    return run


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize(
    "topology, T, N, width, window",
    [
        ("v5e:2x2", 8, 256, 72, None),
        ("v6e:2x2", 16, 100, 64, 3),  # frames that cut blocks
        ("tpu7x:2x2x1", 4, 300, 128, None),
    ],
)
def test_compiles_for_tpu(topology, T, N, width, window, tpu_devices, monkeypatch):
    """Forward and backward, without a matrix of scores."""
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    where = SingleDeviceSharding(tpu_devices(topology)[0])
    x = jax.ShapeDtypeStruct((2, T * N, 4, width), jnp.bfloat16, sharding=where)
    arguments = positions(T, N) | dict(allow=masks.causal(window, 1 if window else 0))
    compiled = jax.jit(gradient(arguments)).lower(x, x, x, x).compile()
    assert compiled.as_text().count("tpu_custom_call") >= 3
    scores = 4 * 2 * 4 * (T * N) ** 2
    assert compiled.memory_analysis().temp_size_in_bytes < scores


@pytest.mark.slow
@pytest.mark.tpu_aot
@pytest.mark.parametrize("tokens, heads", [(None, ("tensor", "seq")), ("seq", "tensor")])
def test_splits_batch_and_heads(tokens, heads, tpu_pod, monkeypatch):
    """Parts of a sequence change places with parts of the heads."""
    monkeypatch.setattr(dispatch, "platform", lambda: "tpu")
    where = NamedSharding(tpu_pod, PartitionSpec(("data", "fsdp"), tokens, heads))
    x = jax.ShapeDtypeStruct((4, 512, 4, 64), jnp.bfloat16, sharding=where)
    with jax.set_mesh(tpu_pod):
        text = jax.jit(gradient(positions(4, 128))).lower(x, x, x, x).compile().as_text()
    assert "tpu_custom_call" in text
    assert not re.search("all-gather|permute|all-reduce", text)
    assert ("all-to-all" in text) == (tokens == "seq")

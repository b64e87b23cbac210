"""Counted FLOPs against arithmetic by hand."""

from types import SimpleNamespace

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.kernels.attention import attention
from jaxvid.layers.masks import causal
from jaxvid.training import flops

x = jax.ShapeDtypeStruct((4, 8), jnp.float32)
w = jax.ShapeDtypeStruct((8, 16), jnp.float32)
PRODUCT = 2 * 4 * 8 * 16


def test_products():
    assert flops.count(jnp.matmul, x, w) == PRODUCT
    batched = [jax.ShapeDtypeStruct((5, *a.shape), jnp.bfloat16) for a in (x, w)]
    assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bki", a, b), *batched) == 5 * PRODUCT


def test_convolutions():
    image, kernel = jnp.zeros((2, 9, 9, 6)), jnp.zeros((3, 3, 3, 10))

    def conv(image, kernel):
        return jax.lax.conv_general_dilated(
            image,
            kernel,
            (2, 2),
            "VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        )

    assert flops.count(conv, image, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)


def test_cudnn_attention():
    """A stand-in for the opaque primitive of jax.nn.dot_product_attention on a GPU."""
    primitive = jax.extend.core.Primitive("dot_product_attention_fwd_wrapper")
    primitive.def_abstract_eval(lambda q, k, v: q)
    q_BLAK, kv_BMAK = (jax.ShapeDtypeStruct((2, n, 4, 8), jnp.bfloat16) for n in (6, 10))
    products = 2 * (2 * 4) * 6 * 10 * 8 * 2
    assert flops.count(primitive.bind, q_BLAK, kv_BMAK, kv_BMAK) == products


@pytest.mark.parametrize("all_pairs", [False, True])
def test_all_pairs(all_pairs):
    """Two chunks of 128 queries. The first reads only its own 128 keys."""
    q_BLAK = jax.ShapeDtypeStruct((2, 256, 4, 8), jnp.float32)

    @jax.checkpoint
    def run(q_BLAK):
        frames = np.arange(256) // 64
        return attention(
            q_BLAK,
            q_BLAK,
            q_BLAK,
            q_position_L=frames,
            k_position_M=frames,
            allow=causal(),
            implementation="xla",
        )

    pairs = 256 * 256 if all_pairs else 128 * 128 + 128 * 256
    assert flops.count(run, q_BLAK, all_pairs=all_pairs) == 2 * 2 * (2 * 4) * pairs * 8


def test_control_flow():
    def scanned(x, w):
        return jax.lax.scan(lambda y, _: (jax.jit(jnp.matmul)(y, w @ w.T), None), x, None, length=7)

    assert flops.count(scanned, x, w) == 7 * (2 * 8 * 16 * 8 + 2 * 4 * 8 * 8)

    def either(x, w):
        return jax.lax.cond(x[0, 0] > 0, lambda: (x @ w).sum(), lambda: x.sum())

    assert flops.count(either, x, w) == PRODUCT


@pytest.mark.parametrize("remat, products", [(False, 3), (True, 4)])
def test_backward_pass(remat, products):
    """A forward pass and two gradients; remat repeats the forward pass."""

    def layer(x, w):
        return jnp.tanh(x @ w)

    def loss(x, w):
        return (jax.checkpoint(layer) if remat else layer)(x, w).sum()

    assert flops.count(jax.grad(loss, argnums=(0, 1)), x, w) == products * PRODUCT


def test_peak():
    def device(kind, platform="gpu"):
        return SimpleNamespace(device_kind=kind, platform=platform)

    assert flops.peak(device("NVIDIA H100 80GB HBM3"), "bfloat16") == 989e12
    assert flops.peak(device("NVIDIA H100 PCIe"), jnp.bfloat16) == 756e12
    assert flops.peak(device("NVIDIA H200"), "float32") == 989e12 / 2
    assert flops.peak(device("TPU v5 lite", "tpu"), "bfloat16") == 197e12
    assert flops.peak(device("TPU v5p", "tpu"), "bfloat16") == 459e12
    assert flops.peak(device("TPU v5 lite", "tpu"), "float32") is None
    assert flops.peak(device("cpu", "cpu"), "float32") is None
    assert flops.bandwidth(device("NVIDIA H100 80GB HBM3")) == 3.35e12
    assert flops.bandwidth(device("NVIDIA H100 PCIe")) is None  # not in the table
    assert flops.bandwidth(device("TPU v5 lite", "tpu")) == 0.82e12


def test_machine(monkeypatch):
    def device(kind, platform, process=0):
        return SimpleNamespace(device_kind=kind, platform=platform, process_index=process)

    assert flops.machine([device("TPU v4", "tpu")] * 4) == 4 * 275e12
    assert flops.machine([device("TPU v4", "tpu"), device("TPU v99", "tpu")]) is None
    monkeypatch.setattr(flops, "measured", lambda: 1e9)
    assert flops.machine([device("cpu", "cpu")] * 8) == 1e9  # one process
    assert flops.machine([device("cpu", "cpu", process) for process in (0, 0, 1)]) == 2e9


def test_measured():
    assert 1e8 < flops.measured(size=256, repeats=2) < 1e16

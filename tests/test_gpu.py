"""What only a GPU can show: JAX_PLATFORMS=cuda python -m pytest -m gpu."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels import test_linear_attention as kernel_tests
from tests.tasks.test_ar_diffusion import Task, batch, fields, opened

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU"),
]


@pytest.mark.parametrize("arrangement", ["joint", "factorised"])
def test_bfloat16_gradients_follow_float32(arrangement):
    grads = {}
    for dtype in ("float32", "bfloat16"):
        task = Task(**fields(model__dtype=dtype, model__arrangement=arrangement))

        def loss(params, task=task):
            rng = jax.random.key(0)
            return task.loss(params, batch(), rng, step=0, frozen={}, extra={})[0]

        with jax.default_matmul_precision("highest"):
            grads[dtype] = jax.jit(jax.grad(loss))(opened(task))
    flat = {
        dtype: jnp.concatenate(list(map(jnp.ravel, jax.tree.leaves(g))))
        for dtype, g in grads.items()
    }
    error = jnp.linalg.norm(flat["bfloat16"] - flat["float32"]) / jnp.linalg.norm(flat["float32"])
    assert error < 0.05


def test_cached_sampling_equals_uncached():
    rng, cond = jax.random.key(0), {"num": 2}
    videos = []
    with jax.default_matmul_precision("highest"):
        for memory in ("cache", "none"):
            task = Task(**fields(sampler__memory=memory))
            videos.append(task.sample(opened(task), rng, cond, frozen={}, frames=9))
    np.testing.assert_allclose(*videos, atol=1e-4)


@pytest.mark.parametrize(
    "case", ["one token", "no decay", "decay of a head", "decay of a token, long"]
)
@pytest.mark.parametrize(
    "dtype, value, gradient", [("float32", 1e-5, 1e-4), ("bfloat16", 0.01, 0.02)]
)
def test_linear_attention_kernels(case, dtype, value, gradient):
    arrays, segment_ids = kernel_tests.inputs(case)
    arrays = [x.astype(dtype) for x in arrays[:3]] + [*arrays[3:]]
    exact = [x if x is None else x.astype(jnp.float32) for x in arrays]
    wanted = kernel_tests.value_and_grads(exact, segment_ids, implementation="reference")
    got = kernel_tests.value_and_grads(arrays, segment_ids, implementation="gpu")
    kernel_tests.assert_close(got, wanted, value, gradient)


def test_linear_attention_runs_its_kernels_by_itself():
    x = jnp.ones((1, 256, 2, 64), jnp.bfloat16)
    program = jax.jit(linear_attention).lower(x, x, x).as_text()
    assert "triton" in program

"""The scan of LightNet against its definition, over the axes of a video."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.layers.embed import rotary_angles
from jaxvid.mixers.lightnet import apply_lrpe, decaying_sums, softmax_keys
from jaxvid.mixers.linear_attention import linear_attention_by_frame
from jaxvid.mixers.recurrent import LOG_ZERO

B, T, GRID, A, K = 2, 5, (2, 3), 2, 6
N = GRID[0] * GRID[1]


@pytest.mark.parametrize("sharpness", [1.0, 40.0])
def test_equals_the_definition(sharpness):
    """o_i = sum_j sum_c q_ic softmax_{j seen by i}(k_jc) cos(angle_i - angle_j) v_j, in float64."""
    q, k, v = np.random.default_rng(0).standard_normal((3, B, T, N, A, K)).astype(np.float32)
    k *= sharpness
    angle_TNK = rotary_angles(np.arange(T, dtype=np.int32), GRID, 2 * K)

    def scan(q, k, v):
        k, g_BTAK, _ = softmax_keys(k, jnp.full((B, A, K), LOG_ZERO))
        q, k = apply_lrpe(q, angle_TNK), apply_lrpe(k, angle_TNK)
        g_BTAK = jnp.concatenate([g_BTAK] * 2, -1)
        return linear_attention_by_frame(q, k, v, g_BTAK, None)[0]

    y = np.asarray(jax.jit(scan)(q, k, v))
    angle_LK = np.float64(angle_TNK).reshape(-1, K)
    q, k, v = (np.float64(part).reshape(B, T * N, A, K) for part in (q, k, v))
    for t in range(T):
        seen = slice(0, (t + 1) * N)
        p_BMAK = np.exp(k[:, seen] - k[:, seen].max(axis=1, keepdims=True))
        p_BMAK /= p_BMAK.sum(axis=1, keepdims=True)
        for n in range(N):
            near_MK = np.cos(angle_LK[t * N + n] - angle_LK[seen])
            score = np.einsum("BAK,BMAK,MK->BMA", q[:, t * N + n], p_BMAK, near_MK)
            expected = np.einsum("BMA,BMAV->BAV", score, v[:, seen])
            np.testing.assert_allclose(y[:, t, n], expected, atol=1e-5 * sharpness)


def test_equal_keys_weigh_the_same_in_a_long_stream():
    """After n frames of equal keys the memory is the mean of the values: rounding of decays near 1
    loses nothing."""
    frames = 3000
    k, v = np.zeros((1, frames, 1, 1, 2), np.float32), np.linspace(-1, 1, 2 * frames)
    v = v.astype(np.float32).reshape(1, frames, 1, 1, 2)

    @jax.jit
    def scan(k, v):
        weights, g, log_sum = softmax_keys(k, jnp.full((1, 1, 2), LOG_ZERO))
        return linear_attention_by_frame(jnp.ones_like(k), weights, v, g, None)[1], log_sum

    memory, log_sum = scan(k + 7.0, v)
    np.testing.assert_allclose(memory[0, 0, 0], v.mean((0, 1, 2, 3)), atol=2e-5)
    np.testing.assert_allclose(log_sum, np.log(frames) + 7, rtol=1e-5)


def test_decaying_sums_equal_their_toeplitz_matrix():
    L, D, E = 6, 4, 3
    rng = np.random.default_rng(1)
    x, weight, logit = rng.standard_normal((2, L, D)), *rng.standard_normal((2, D, E))
    decay = 1 / (1 + np.exp(-logit))
    gap = np.arange(L)[:, None] - np.arange(L)
    matrix_DLM = np.einsum("DE,DELM->DLM", weight, decay[..., None, None] ** np.maximum(gap, 0))
    expected = np.einsum("DLM,BMD->BLD", matrix_DLM * (gap >= 0), x)
    y, state = jax.jit(decaying_sums)(x, weight, logit, np.zeros((2, D, E)))
    np.testing.assert_allclose(y, expected, atol=1e-5)
    np.testing.assert_allclose((weight * state).sum(-1), expected[:, -1], atol=1e-5)

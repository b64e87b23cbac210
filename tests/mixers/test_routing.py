"""Routed attention against a loop over tokens, and against the published choice, which leaks."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.mixers.routing import Routing
from tests import laws

A, K, C = 2, 4, 3


def build(members, N=3):
    mixer = Routing(width=A * K, heads=A, clusters=C, members=members)
    x = jax.random.normal(jax.random.key(0), (1, laws.FRAMES, N, A * K))
    return mixer, laws.disturbed(jax.jit(mixer.init)(jax.random.key(1), x)), x


@pytest.mark.parametrize("members", [2, 100])
def test_equals_a_loop_over_tokens(members):
    """Clusters may overflow within one frame: 3 tokens join at once and 2 stay."""
    mixer, params, x = build(members)
    y, state = jax.jit(mixer.apply)(params, x)
    w = jax.tree.map(np.float64, params["params"])

    def heads(name):
        h = (np.float64(x[0]) @ w[name]["kernel"] + w[name]["bias"]).reshape(*x.shape[1:3], A, K)
        if name == "v":
            return h
        return h / np.sqrt(np.square(h).mean(-1, keepdims=True) + 1e-6) * w[f"{name}_norm"]["scale"]

    def unit(h):
        return h / np.linalg.norm(h, axis=-1, keepdims=True)

    q, k, v = (heads(name) for name in "qkv")
    mean = unit(w["centroids"])
    mixed = np.zeros_like(q)
    arrived = {}
    for t in range(x.shape[1]):
        for n, a in np.ndindex(x.shape[2], A):
            similarity = mean[a] @ unit(q[t, n, a])
            past = arrived.get((a, similarity.argmax()), [])[-members:]
            scores = [q[t, n, a] @ key * K**-0.5 + bias + similarity.max() for key, _, bias in past]
            scores += list(k[t, :, a] @ q[t, n, a] * K**-0.5)
            p = np.exp(scores) / np.exp(scores).sum()
            mixed[t, n, a] = p @ np.stack([value for _, value, _ in past] + list(v[t, :, a]))
        for n, a in np.ndindex(x.shape[2], A):
            similarity = mean[a] @ unit(k[t, n, a])
            members_so_far = arrived.setdefault((a, similarity.argmax()), [])
            members_so_far.append((k[t, n, a], v[t, n, a], similarity.max()))
    expected = mixed.reshape(x.shape[1:]) @ w["out"]["kernel"] + w["out"]["bias"]
    np.testing.assert_allclose(y[0], expected, atol=1e-5)
    counts = [[len(arrived.get((a, c), [])) for c in range(C)] for a in range(A)]
    np.testing.assert_array_equal(state.count_BAC[0], counts)
    assert np.max(counts) > 2


def published(x, state, members=5, clusters=C):
    """Clusters of the nearest tokens of the whole sequence, then attention to earlier members."""
    del state
    mean = jax.random.normal(jax.random.key(5), (clusters, x.shape[-1]))
    x_L = x[0, :, 0]
    similarity_LC = x_L @ mean.T / jnp.linalg.norm(x_L, axis=-1, keepdims=True)
    chosen_CW = jax.lax.top_k(similarity_LC.T, members)[1]
    in_CL = jax.nn.one_hot(chosen_CW, x.shape[1]).sum(1)
    together_LM = (in_CL.T @ in_CL > 0) & np.tri(x.shape[1], dtype=bool)
    together_LM |= np.eye(x.shape[1], dtype=bool)
    p_LM = jax.nn.softmax(jnp.where(together_LM, x_L @ x_L.T, -1e30))
    return (p_LM @ x_L)[None, :, None], None


def test_the_law_of_causality_catches_the_published_choice():
    x = jax.random.normal(jax.random.key(2), (1, laws.FRAMES, 1, 8))
    with pytest.raises(AssertionError, match="leaks back"):
        laws.causality(published, x, reach=1, gradients=False)


@pytest.mark.parametrize("members", [1, 100])
def test_nothing_leaks_from_full_or_empty_clusters(members):
    """Reach 1: content decides which past tokens are read."""
    mixer, params, x = build(members, N=1)
    laws.causality(functools.partial(mixer.apply, params), x, reach=1)

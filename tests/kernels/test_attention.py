"""Attention: the reference against brute force, XLA against the reference, and masks."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxvid.kernels.attention import attention, xla
from jaxvid.layers import masks
from jaxvid.training import flops


def frames(first, count, tokens):
    return np.repeat(np.arange(first, first + count, dtype=np.int32), tokens)


def after(context, position_L):
    return np.concatenate([np.full(context, masks.CONTEXT, np.int32), position_L])


# name: (query positions, key positions, allow)
CASES = {
    "one chunk": (frames(0, 5, 3), frames(0, 5, 3), masks.causal()),
    "chunks": (frames(0, 7, 50), frames(0, 7, 50), masks.causal()),
    "context": (frames(0, 9, 37), after(13, frames(0, 9, 37)), masks.causal()),
    "window and sinks": (
        frames(0, 8, 70),
        after(11, frames(0, 8, 70)),
        masks.causal(window=3, sinks=1),
    ),
    "full": (frames(0, 6, 45), frames(0, 6, 45), masks.full),
    "reversed": (frames(0, 8, 40)[::-1].copy(), frames(0, 8, 40), masks.causal()),
    "later part": (frames(6, 2, 70), frames(0, 8, 70), masks.causal()),
    "one query": (frames(3, 1, 1), frames(0, 4, 5), masks.causal()),
    "one key": (frames(0, 4, 3), frames(0, 1, 1), masks.causal()),
    "queries without keys": (frames(0, 5, 60), frames(2, 3, 60), masks.causal()),
    "empty slots": (
        frames(2, 2, 9),
        np.concatenate([frames(0, 4, 9), np.full(17, masks.EMPTY, np.int32)]),
        masks.causal(),
    ),
}


def inputs(case, dtype=jnp.float32, batch=2, heads=3, width=16):
    q_position_L, k_position_M, allow = CASES[case]
    shapes = [
        (batch, size, heads, width)
        for size in (q_position_L.size, k_position_M.size, k_position_M.size, q_position_L.size)
    ]
    rng = np.random.default_rng(0)
    arrays = [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]
    return arrays, dict(q_position_L=q_position_L, k_position_M=k_position_M, allow=allow)


def traced(arguments):
    """The arguments with positions as traced arrays, which hide their values from tracing."""
    positions = {name: jnp.asarray(arguments[name]) for name in ("q_position_L", "k_position_M")}
    return {**arguments, **positions}


def value_and_grads(implementation, arrays, arguments):
    *qkv, dy_BLAK = arrays

    def value(q_BLAK, k_BMAK, v_BMAK):
        return attention(q_BLAK, k_BMAK, v_BMAK, implementation=implementation, **arguments)

    @jax.jit
    def run(qkv, dy_BLAK):
        y_BLAK, pull = jax.vjp(value, *qkv)
        return y_BLAK, *pull(dy_BLAK)

    return run(qkv, dy_BLAK)


def brute_force(arrays, arguments):
    q, k, v = (np.asarray(x, np.float64) for x in arrays[:3])
    y = np.zeros_like(q)
    for b, i, a in np.ndindex(q.shape[:3]):
        keys = [
            j
            for j, position in enumerate(arguments["k_position_M"])
            if arguments["allow"](arguments["q_position_L"][i], position)
        ]
        if keys:
            weights = np.exp(k[b, keys, a] @ q[b, i, a] / np.sqrt(q.shape[-1]))
            y[b, i, a] = weights @ v[b, keys, a] / weights.sum()
    return y


@pytest.fixture(params=["kept", "recomputed"])
def probabilities(request, monkeypatch):
    """Whether the backward pass keeps the probabilities; the number of its products."""
    if request.param == "kept":
        return 4
    monkeypatch.setattr(xla, "_MAX_KEPT", 0)
    return 5


@pytest.mark.parametrize("case", ["one chunk", "one query", "one key", "empty slots"])
def test_reference_equals_brute_force(case):
    arrays, arguments = inputs(case)
    y_BLAK = attention(*arrays[:3], implementation="reference", **arguments)
    np.testing.assert_allclose(y_BLAK, brute_force(arrays, arguments), atol=5e-6)


def assert_equals_reference(arrays, arguments, static, *, atol=3e-5, rtol=1e-7):
    exact = [x.astype(jnp.float32) for x in arrays]
    expected = value_and_grads("reference", exact, arguments)
    got = value_and_grads("xla", arrays, arguments if static else traced(arguments))
    for x, wanted in zip(got, expected):
        assert x.dtype == arrays[0].dtype
        np.testing.assert_allclose(x.astype(jnp.float32), wanted, atol=atol, rtol=rtol)


@pytest.mark.parametrize("case", CASES)
def test_static_positions(case):
    assert_equals_reference(*inputs(case), static=True)


@pytest.mark.parametrize("case", ["window and sinks", "queries without keys", "empty slots"])
def test_traced_positions(case, probabilities):
    assert_equals_reference(*inputs(case), static=False)


def test_recomputed_probabilities(monkeypatch):
    monkeypatch.setattr(xla, "_MAX_KEPT", 0)
    assert_equals_reference(*inputs("window and sinks"), static=True)


def test_bfloat16(probabilities):
    arrays, arguments = inputs("window and sinks", jnp.bfloat16)
    assert_equals_reference(arrays, arguments, static=True, atol=0.02, rtol=0.02)


def test_scale_and_large_scores():
    arrays, arguments = inputs("chunks")
    arrays[0] *= 100
    for scale in (None, 0.5):
        got, wanted = (
            attention(*arrays[:3], scale=scale, implementation=name, **arguments)
            for name in ("xla", "reference")
        )
        np.testing.assert_allclose(got, wanted, atol=1e-4)  # scores of +-400 round by 3e-5


@pytest.mark.parametrize("static", [True, False])
def test_masked_keys_have_no_effect(static, probabilities):
    arrays, arguments = inputs("window and sinks")
    arguments = arguments if static else traced(arguments)
    frame = int(arguments["q_position_L"].max()) // 2
    later = arguments["k_position_M"] > frame
    earlier = arguments["q_position_L"] <= frame
    changed = [
        arrays[0],
        *(jnp.where(later[:, None, None], 1e4 * x - 3, x) for x in arrays[1:3]),
        jnp.where(earlier[:, None, None], arrays[3], 0),
    ]
    arrays[3] = changed[3]
    before, after_change = (value_and_grads("xla", x, arguments) for x in (arrays, changed))
    np.testing.assert_array_equal(before[0][:, earlier], after_change[0][:, earlier])
    np.testing.assert_array_equal(before[1], after_change[1])  # dq
    for d_BMAK in before[2:]:
        assert not d_BMAK[:, later].any()
        assert d_BMAK[:, ~later].any()
    assert np.any(before[0][:, ~earlier] != after_change[0][:, ~earlier])


def test_queries_without_keys(probabilities):
    for static in (True, False):
        arrays, arguments = inputs("queries without keys")
        alone = arguments["q_position_L"] < 2
        y, dq, _, _ = value_and_grads("xla", arrays, arguments if static else traced(arguments))
        assert not y[:, alone].any() and not dq[:, alone].any()
        assert y[:, ~alone].any() and dq[:, ~alone].any()


def pairs(case, products):
    """Pairs of query and key that forward and each of the `products` of backward compute."""
    arrays, arguments = inputs(case, batch=1, heads=1, width=16)
    forward = flops.count(
        lambda q, k, v: attention(q, k, v, implementation="xla", **arguments), *arrays[:3]
    )
    both = flops.count(lambda *x: value_and_grads("xla", x, arguments), *arrays)
    return forward / (2 * 2 * 16), (both - forward) / (products * 2 * 16)


def test_masked_blocks_are_skipped(probabilities):
    # Chunks of whole frames and at least 128 queries, and the rest in the last one.
    computed = (150, 150), (200, 350)
    expected = sum(queries * keys for queries, keys in computed)
    assert pairs("chunks", probabilities) == (expected, expected)


def test_query_chunks_of_window_and_sinks():
    chunks = xla.query_chunks(*CASES["window and sinks"])
    assert [(chunk.start, chunk.stop) for chunk in chunks] == [
        (start, start + 140) for start in range(0, 560, 140)
    ]
    # Frames 6 and 7 see the context and the sink, 81 tokens, and frames 4 .. 7.
    assert chunks[-1].runs == ((0, 81), (11 + 4 * 70, 11 + 8 * 70))
    assert chunks[0].runs == ((0, 11 + 2 * 70),)


def test_query_chunks_without_mask():
    chunks = xla.query_chunks(*CASES["full"])
    assert [(chunk.runs, chunk.mask_GM) for chunk in chunks] == [(((0, 270),), None)] * 2


def transformed(name, run, arrays):
    """run over the first axis of [3, 2, ...] arrays by a transformation; "" is a loop."""
    if name == "vmap":
        return jax.vmap(run)(*arrays)
    if name == "scan":
        return jax.lax.scan(lambda carry, x: (carry, run(*x)), 0, arrays)[1]
    if name == "remat":
        return jnp.stack([jax.checkpoint(run)(*x) for x in zip(*arrays)])
    return jnp.stack([run(*x) for x in zip(*arrays)])


@pytest.mark.parametrize(
    "name, static", [("vmap", True), ("vmap", False), ("scan", True), ("remat", False)]
)
def test_transformations(name, static):
    arrays, arguments = inputs("context", batch=6)
    arguments = arguments if static else traced(arguments)
    arrays = [x.reshape(3, 2, *x.shape[1:]) for x in arrays]

    @functools.partial(jax.jit, static_argnums=0)
    def loss_and_grads(name, arrays):
        def loss(*qkv):
            run = functools.partial(attention, implementation="xla", **arguments)
            return jnp.sum(transformed(name, run, qkv) * arrays[3])

        return jax.value_and_grad(loss, argnums=(0, 1, 2))(*arrays[:3])

    for got, wanted in zip(
        jax.tree.leaves(loss_and_grads(name, arrays)), jax.tree.leaves(loss_and_grads("", arrays))
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=3e-5)


def test_split_batch_and_heads_exchange_nothing():
    arrays, arguments = inputs("context", batch=4, heads=4)
    mesh = jax.make_mesh((4, 2), ("data", "tensor"))
    split = NamedSharding(mesh, PartitionSpec("data", None, "tensor"))

    def loss(arrays):
        y_BLAK = attention(*arrays[:3], implementation="xla", **arguments)
        return jnp.sum(y_BLAK * arrays[3], axis=(1, 3))

    program = jax.jit(lambda arrays: (loss(arrays), jax.grad(lambda x: loss(x).sum())(arrays)))
    expected = program(arrays)
    compiled = program.lower(jax.device_put(arrays, split)).compile()
    assert not re.search("all-gather|all-to-all|permute|all-reduce", compiled.as_text())
    for got, wanted in zip(
        jax.tree.leaves(compiled(jax.device_put(arrays, split))), jax.tree.leaves(expected)
    ):
        np.testing.assert_allclose(got, wanted, atol=3e-5)


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
@pytest.mark.parametrize("static", [True, False])
@pytest.mark.parametrize("case", ["context", "window and sinks", "queries without keys"])
def test_cudnn_equals_reference(case, static):
    arrays, arguments = inputs(case, jnp.bfloat16, width=64)
    even = [x[:, : x.shape[1] // 2 * 2] for x in arrays]
    q_position_L, k_position_M, allow = (arguments[name] for name in arguments)
    arguments = dict(
        q_position_L=q_position_L[: even[0].shape[1]],
        k_position_M=k_position_M[: even[1].shape[1]],
        allow=allow,
    )
    expected = value_and_grads("reference", [x.astype(jnp.float32) for x in even], arguments)
    arguments = arguments if static else traced(arguments)
    run = functools.partial(attention, implementation="cudnn", **arguments)
    assert flops.count(run, *even[:3]) == 4 * even[0].size * even[1].shape[1]
    for got, wanted in zip(value_and_grads("cudnn", even, arguments), expected):
        np.testing.assert_allclose(got.astype(jnp.float32), wanted, atol=0.02, rtol=0.02)

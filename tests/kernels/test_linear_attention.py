"""Linear attention: every implementation against the token recurrence, which has its own oracle."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import (
    AxisType,
    NamedSharding,
    PartitionSpec,
)

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels.harness import CASES, assert_close, inputs, value_and_grads


def brute_force(arrays, segment_ids):
    """y_i = scale sum_{j <= i} q_i exp(g_{j+1} + .. + g_i) k_j v_j in float64, pair by pair."""
    q, k, v, g, state = (np.asarray(x, np.float64) for x in arrays)
    g = np.broadcast_to(g[..., None] if g.ndim == 3 else g, k.shape)
    y, last = np.zeros(v.shape), np.zeros(state.shape)
    for b, i, a in np.ndindex(q.shape[:3]):
        segment = np.zeros(q.shape[1], int) if segment_ids is None else np.asarray(segment_ids[b])
        memory = np.exp(g[b, : i + 1, a].sum(0))[:, None] * state[b, a] * (segment[i] == segment[0])
        for j in np.flatnonzero(segment[: i + 1] == segment[i]):
            memory += np.outer(np.exp(g[b, j + 1 : i + 1, a].sum(0)) * k[b, j, a], v[b, j, a])
        y[b, i, a], last[b, a] = q[b, i, a] @ memory * q.shape[3] ** -0.5, memory
    return {"y": y, "state": last}


@pytest.mark.parametrize("case", ["decay of a token", "decay of a channel, packed"])
def test_reference_equals_brute_force(case):
    arrays, segment_ids = inputs(case, batch=1)
    got = value_and_grads(arrays, segment_ids, implementation="reference")
    assert_close({name: got[name] for name in ("y", "state")}, brute_force(arrays, segment_ids))


@pytest.mark.parametrize("implementation", ["chunked"])
@pytest.mark.parametrize("case", CASES)
def test_equals_reference(case, implementation):
    arrays, segment_ids = inputs(case)
    wanted = value_and_grads(arrays, segment_ids, implementation="reference")
    assert_close(value_and_grads(arrays, segment_ids, implementation=implementation), wanted)


@pytest.mark.parametrize("strength", ["weak", "strong"])
@pytest.mark.parametrize("case", ["decay of a token", "decay of a channel"])
def test_extreme_decays(case, strength):
    arrays, _ = inputs(case, strength)
    wanted = value_and_grads(arrays, implementation="reference")
    assert_close(value_and_grads(arrays, implementation="chunked", chunk=16), wanted)


@pytest.mark.parametrize(
    "case, chunk",
    [("decay of a token", 1), ("decay of a token", 24), ("decay of a channel", 4096)],
)
def test_chunk_changes_no_result(case, chunk):
    arrays, _ = inputs(case)
    wanted = value_and_grads(arrays, implementation="chunked", chunk=16)
    assert_close(value_and_grads(arrays, implementation="chunked", chunk=chunk), wanted)


@pytest.mark.parametrize("implementation", ["chunked", "tpu"])
def test_a_chunk_is_never_so_long_that_decays_round(implementation, launch):
    """Strong decays, and after them weak ones, whose sum must not be rounded to that of all."""
    L = 4096
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, L, 1, 16))
    g = jnp.where(jnp.arange(L) < L - 40, -100 - 1 / 64, -1 / 64)[None, :, None]
    run = functools.partial(linear_attention, q, k, v, g)
    got = run(implementation=implementation, chunk=L)
    assert_close(dict(y=got), dict(y=run(implementation="reference")))


def test_bfloat16_keeps_its_dtype_and_the_state_of_float32():
    exact, segment_ids = inputs("decay of a token, long")
    arrays = [x.astype(jnp.bfloat16) for x in exact[:3]] + [*exact[3:]]
    exact = [x.astype(jnp.float32) for x in arrays]
    wanted = value_and_grads(exact, segment_ids, implementation="reference")
    got = value_and_grads(arrays, segment_ids, implementation="chunked", chunk=16)
    for name in ("y", "dq", "dk", "dv"):
        assert got[name].dtype == jnp.bfloat16
    assert got["state"].dtype == got["dlog_decay"].dtype == jnp.float32
    assert_close(got, wanted, value=0.01, gradient=0.02)


def test_a_sequence_may_be_cut_anywhere():
    (q, k, v, g, state), _ = inputs("decay of a token")
    run = jax.jit(functools.partial(linear_attention, return_state=True))
    whole = run(q, k, v, g, initial_state=state)
    ys = []
    for part in (slice(0, 1), slice(1, 40), slice(40, None)):
        y, state = run(*(x[:, part] for x in (q, k, v, g)), initial_state=state)
        ys.append(y)
    assert_close(dict(y=jnp.concatenate(ys, 1), state=state), dict(y=whole[0], state=whole[1]))


def test_minus_infinity_is_a_decay():
    """What came before leaves no trace, and no NaN."""
    (q, k, v, g, state), _ = inputs("decay of a token")
    g = jnp.full_like(g, -jnp.inf)
    values = value_and_grads((q, k, v, g, state), implementation="chunked")
    own = jnp.sum(q * k, axis=-1, keepdims=True) * v * q.shape[-1] ** -0.5
    assert_close(dict(y=values["y"]), dict(y=own))
    assert all(np.isfinite(x).all() for x in values.values())
    assert not values["dinitial_state"].any() and not values["dlog_decay"].any()


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(k_BLAK=jnp.ones((1, 4, 2, 5))), "q, k, v of shapes"),
        (dict(log_decay=jnp.ones((1, 4))), r"log_decay of shape \[1, 4\]: must be \[2\] or \[1, 4"),
        (dict(initial_state=jnp.ones((1, 2, 8))), "initial_state of shape"),
        (dict(segment_ids=jnp.ones((4,), int)), "segment_ids of shape"),
        (dict(chunk=0), "chunk=0: must be at least 1"),
        (dict(chunk=2.5), "chunk=2.5: must be at least 1 and whole"),
        (dict(v_BLAV=jnp.ones((1, 4, 2, 0))), "q, k, v of shapes"),
        (dict(zip(("q_BLAK", "k_BLAK", "v_BLAV"), [jnp.ones((0, 4, 2, 8))] * 3)), "at least 1"),
        (dict(implementation="cuda"), "implementation='cuda': use auto, "),
    ],
)
def test_bad_input_is_answered_in_one_line(changes, message):
    x = jnp.ones((1, 4, 2, 8))
    with pytest.raises(ValueError, match=message) as error:
        linear_attention(**{**dict(q_BLAK=x, k_BLAK=x, v_BLAV=x), **changes})
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("rule", [linear_attention, gated_delta])
def test_lists_are_as_arrays(rule):
    x = jax.random.normal(jax.random.key(0), (1, 4, 2, 8))
    beta = () if rule is linear_attention else (x[..., 0],)
    segment_ids, state = [[0, 0, 1, 1]], np.ones((1, 2, 8, 8))

    @jax.jit
    def in_lists(a, b):
        options = dict(segment_ids=segment_ids, initial_state=state.tolist())
        return rule(x, x, x, *beta, [a, b], **options)

    arrays = dict(segment_ids=np.array(segment_ids), initial_state=jnp.asarray(state))
    wanted = rule(x, x, x, *beta, jnp.array([-1.0, -2.0]), **arrays)
    np.testing.assert_allclose(in_lists(-1.0, -2.0), wanted, rtol=1e-5, atol=1e-6)


def mesh_with_sequence():
    names = ("data", "fsdp", "tensor", "seq")
    return jax.make_mesh((2, 1, 2, 2), names, axis_types=(AxisType.Auto,) * 4)


def test_on_a_mesh_the_sequence_is_exchanged_by_states_alone():
    arrays, _ = inputs("decay of a head")
    mesh = mesh_with_sequence()
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "seq", "tensor")
        tokens = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays[:3]]
        run = jax.jit(functools.partial(linear_attention, implementation="chunked"))
        program = run.lower(*tokens, arrays[3]).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert sizes and max(sizes) <= arrays[4].size  # two parts of a quarter of the states each

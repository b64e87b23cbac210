"""Linear attention: the reference against brute force, and chunks where COVER does not look."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels.harness import (
    assert_close,
    assert_equals_reference,
    make,
    rounded,
)


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


@pytest.mark.parametrize("decay, packed", [("token", False), ("channel", True)])
def test_reference_equals_brute_force(decay, packed):
    arrays, segment_ids = make(30, 6, 5, decay, packed=packed)
    (*tokens, state) = arrays
    y, last = linear_attention(
        *tokens,
        initial_state=state,
        segment_ids=segment_ids,
        return_state=True,
        implementation="reference",
    )
    assert_close({"y": y, "state": last}, brute_force(arrays, segment_ids))


@pytest.mark.parametrize(
    "decay, strength, chunk",
    [
        ("token", "mixed", 1),
        ("token", "mixed", 24),
        ("channel", "weak", 16),
        ("channel", "strong", 24),
    ],
)
def test_chunks_equal_reference(decay, strength, chunk):
    arrays, _ = make(65, 16, 24, decay, strength)
    assert_equals_reference(arrays, implementation="chunked", chunk=chunk)


@pytest.mark.parametrize("implementation", ["chunked", "tpu"])
def test_longest_chunk(implementation, launch):
    """Weak decays after strong ones are not rounded to the precision of the sum of all decays."""
    L = 4096
    q, k, v = jax.random.normal(jax.random.key(0), (3, 1, L, 1, 16))
    g = jnp.where(jnp.arange(L) < L - 40, -100 - 1 / 64, -1 / 64)[None, :, None]
    run = functools.partial(linear_attention, q, k, v, g)
    got = run(implementation=implementation, chunk=L)
    assert_close(dict(y=got), dict(y=run(implementation="reference")))


def test_bfloat16_state_is_float32():
    """Without decay, sums of products of bfloat16 numbers are exact but for float32 rounding."""
    q, k, v, _, _ = rounded(make(300, 16, 24)[0])
    run = functools.partial(linear_attention, q, k, v, return_state=True)
    (_, got), (_, wanted) = run(implementation="chunked", chunk=16), run(implementation="reference")
    assert_close(dict(state=got), dict(state=wanted))


def test_cut_sequence():
    (q, k, v, g, state), _ = make(63, 16, 24, "token")
    run = jax.jit(functools.partial(linear_attention, return_state=True))
    whole = run(q, k, v, g, initial_state=state)
    ys = []
    for part in (slice(0, 1), slice(1, 40), slice(40, None)):
        y, state = run(*(x[:, part] for x in (q, k, v, g)), initial_state=state)
        ys.append(y)
    assert_close(dict(y=jnp.concatenate(ys, 1), state=state), dict(y=whole[0], state=whole[1]))


def test_minus_infinity_is_a_decay():
    """The first 20 tokens see themselves alone, and decays after them are not rounded away."""
    (q, k, v, g, state), _ = make(63, 16, 24, "token", "some")
    g = g.at[:, :20].set(-jnp.inf)
    got = assert_equals_reference((q, k, v, g, state), implementation="chunked")
    own = jnp.sum(q * k, axis=-1, keepdims=True) * v * q.shape[-1] ** -0.5
    assert_close(dict(y=got["y"][:, :20]), dict(y=own[:, :20]))
    assert not got["dinitial_state"].any() and not got["dlog_decay"][:, :20].any()


def test_split_sequence_exchanges_states_alone():
    arrays, _ = make(64, 128, 64, "head")
    names = ("data", "fsdp", "tensor", "seq")
    mesh = jax.make_mesh((2, 1, 2, 2), names, axis_types=(AxisType.Auto,) * 4)
    with jax.set_mesh(mesh):
        spec = PartitionSpec("data", "seq", "tensor")
        tokens = [jax.device_put(x, NamedSharding(mesh, spec)) for x in arrays[:3]]
        run = jax.jit(functools.partial(linear_attention, implementation="chunked"))
        program = run.lower(*tokens, arrays[3]).compile().as_text()
    gathered = re.findall(r"= f32\[([\d,]+)\]\S* all-gather", program)
    sizes = [math.prod(map(int, shape.split(","))) for shape in gathered]
    assert sizes and max(sizes) <= arrays[4].size  # two parts of a quarter of the states each

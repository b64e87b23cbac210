"""Every implementation of every operation over one list of cases, on one device and on a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels.harness import (
    EVERY,
    FORMS,
    assert_close,
    assert_equals_reference,
    cover,
    make,
    rounded,
    value_and_grads,
)


def test_the_list_covers_all_pairs():
    rows = list(cover())
    for one, other in itertools.combinations((2, 3, 6), 2):  # tokens, width, chunk
        assert len({(row[one], row[other]) for row in rows}) == 25
    for op, implementation in EVERY:
        own = [row[2:] for row in rows if row[:2] == (op, implementation)]
        assert [len(set(column)) for column in zip(*own)] == [5, 5, 5, len(set(FORMS)), 5]


@pytest.mark.parametrize(
    "op, implementation, L, K, decay, form, chunk",
    [pytest.param(*row, id=" ".join([row[0].__name__, *map(str, row[1:])])) for row in cover()],
)
def test_equals_reference(op, implementation, L, K, decay, form, chunk, launch):
    kind, strength = decay
    heads = 1 if L * K > 2**17 else 2  # the gradient of the reference keeps every state
    arrays, segment_ids = make(L, K, K, kind, form == "packed", strength, 1, heads, op)
    bounds = {}
    if form == "bfloat16":
        arrays, bounds = rounded(arrays), dict(value=0.02, gradient=0.03)
    run = dict(op=op, implementation=implementation, chunk=chunk, **bounds)
    got = assert_equals_reference(arrays, segment_ids, **run)
    assert got["y"].dtype == got["dk"].dtype == arrays[0].dtype


@pytest.mark.parametrize("op, implementation", EVERY)
def test_packed_segments_equal_separate_calls(op, implementation, launch):
    (*arrays, state), segment_ids = make(60, 16, 24, "token", True, batch=1, op=op)
    packed = op(
        *arrays, segment_ids=segment_ids, initial_state=state, implementation=implementation
    )
    cuts = [0, *(np.flatnonzero(np.diff(segment_ids[0])) + 1), None]
    assert len(cuts) == 4
    alone = [
        op(
            *(x[:, start:stop] for x in arrays),
            initial_state=None if start else state,
            implementation="reference",
        )
        for start, stop in itertools.pairwise(cuts)
    ]
    assert_close(dict(y=packed), dict(y=jnp.concatenate(alone, axis=1)))


MESH = dict(data=2, fsdp=1, tensor=2, seq=2)


@pytest.mark.parametrize(
    "op, implementation, case, mesh",
    [
        (linear_attention, "chunked", (150, 24, 16, "channel", True), MESH),
        (linear_attention, "chunked", (64, 16, 24, None, False), MESH),
        (linear_attention, "tpu", (64, 16, 24, "token", True), MESH),
        (linear_attention, "tpu", (64, 16, 24, "head", False), dict(data=2)),
        (gated_delta, "tpu", (64, 16, 24, "token", True), MESH),
        (gated_delta, "tpu", (64, 16, 24, "token", False), dict(data=2, tensor=2)),
    ],
)
def test_sharded_equals_whole(op, implementation, case, mesh, launch):
    """Also over a mesh that has not all the axes that arrays are split over."""
    arrays, segment_ids = make(*case, op=op)
    wanted = value_and_grads(arrays, segment_ids, op=op, implementation="reference")
    axes = (jax.sharding.AxisType.Auto,) * len(mesh)
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    made = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=axes, devices=devices)
    with jax.set_mesh(made):
        got = value_and_grads(arrays, segment_ids, op=op, implementation=implementation, chunk=32)
    assert_close(got, wanted)

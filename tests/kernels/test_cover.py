"""Every implementation of the recurrences against the reference, on one device and on a mesh."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from tests.kernels.harness import (
    COVER,
    FORMS,
    assert_close,
    assert_equals_reference,
    make,
    rounded,
    value_and_grads,
)

pytestmark = pytest.mark.slow


def test_cover_is_complete():
    for one, other in itertools.combinations((2, 3, 8), 2):  # tokens, K, chunk
        assert len({(row[one], row[other]) for row in COVER}) == 25
    for _, rows in itertools.groupby(COVER, lambda row: row[:2]):
        distinct = [len(set(column)) for column in zip(*rows)]
        assert distinct[2:4] + distinct[7:] == [5, 5, len(FORMS), 5]
        assert distinct[5] >= 3 and distinct[6] == 5  # kinds and strengths of decay


@pytest.mark.parametrize(
    "op, implementation, L, K, V, decay, strength, form, chunk",
    [pytest.param(*row, id=f"{row[0].__name__}-{row[1]}-{row[2]}") for row in COVER],
)
def test_equals_reference(op, implementation, L, K, V, decay, strength, form, chunk, launch):
    arrays, segment_ids = make(L, K, V, decay, strength, packed=form == "packed", op=op)
    bounds = {}
    if form == "bfloat16":
        arrays, bounds = rounded(arrays), dict(value=0.02, gradient=0.03)
    run = dict(op=op, implementation=implementation, chunk=chunk, **bounds)
    got = assert_equals_reference(arrays, segment_ids, **run)
    for name, x in got.items():
        of_tokens = name in ("y", "dq", "dk", "dv")
        assert x.dtype == (arrays[0].dtype if of_tokens else jnp.float32), name


MESH = dict(data=2, fsdp=1, tensor=2, seq=2)


@pytest.mark.parametrize(
    "op, implementation, L, decay, packed, mesh",
    [
        (linear_attention, "chunked", 150, "channel", True, MESH),
        (linear_attention, "tpu", 64, None, False, MESH),
        (linear_attention, "tpu", 63, "token", True, MESH),  # seq does not divide 63
        (linear_attention, "tpu", 64, "head", False, dict(data=2)),  # no tensor axis
        (gated_delta, "tpu", 64, "token", True, MESH),
    ],
)
def test_sharded_equals_whole(op, implementation, L, decay, packed, mesh, launch):
    arrays, segment_ids = make(L, 16, 24, decay, packed=packed, op=op)
    wanted = value_and_grads(arrays, segment_ids, op=op, implementation="reference")
    axes = (jax.sharding.AxisType.Auto,) * len(mesh)
    devices = jax.devices()[: np.prod(list(mesh.values()))]
    made = jax.make_mesh(tuple(mesh.values()), tuple(mesh), axis_types=axes, devices=devices)
    with jax.set_mesh(made):
        got = value_and_grads(arrays, segment_ids, op=op, implementation=implementation, chunk=32)
    assert_close(got, wanted)

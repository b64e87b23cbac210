"""What a program takes, read from its text: programs whose answer is known."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxvid.parallel.mesh import make_mesh
from jaxvid.training import program


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 2, "fsdp": 4})


def gathered(mesh, turns, width=64):
    """A loop that multiplies by a matrix whose rows are split over fsdp."""
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    whole = NamedSharding(mesh, PartitionSpec())
    rows = NamedSharding(mesh, PartitionSpec("data"))

    def run(x, w):
        def turn(x, _):
            # The barrier keeps the gather in the loop.
            w_here = jax.lax.optimization_barrier((w, x))[0]
            full = jax.lax.with_sharding_constraint(w_here, whole)
            return jnp.tanh(x @ full), None

        return jax.lax.scan(turn, x, None, length=turns)[0]

    x = jax.ShapeDtypeStruct((8, width), jnp.float32, sharding=rows)
    w = jax.ShapeDtypeStruct((width, width), jnp.float32, sharding=split)
    return jax.jit(run).lower(x, w).compile().as_text()


def test_a_gather_in_a_loop_counts_every_turn(mesh):
    (row,) = program.collectives(gathered(mesh, turns=6), mesh)
    assert row == ("all-gather", ("fsdp",), 4, 6, 6 * 4 * 64 * 64)


def test_a_sum_over_two_axes(mesh):
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
    x = jax.ShapeDtypeStruct((8, 32), jnp.bfloat16, sharding=rows)
    whole = NamedSharding(mesh, PartitionSpec())
    text = jax.jit(lambda x: x.sum(0), out_shardings=whole).lower(x).compile().as_text()
    (row,) = program.collectives(text, mesh)
    assert row[:4] == ("all-reduce", ("data", "fsdp"), 8, 1)
    assert row.bytes in (2 * 32, 4 * 32)  # in bfloat16, or in float32 as XLA on CPU sums


@pytest.mark.parametrize("turns", [3, 6])
def test_bytes_of_a_loop_grow_with_its_turns(turns, mesh):
    once, often = (program.bytes_moved(gathered(mesh, n, width=256)) for n in (turns, 2 * turns))
    loop = 3 * 4 * 256 * 256  # the gather reads a part and writes all, and the product reads it
    assert often - once == pytest.approx(turns * loop, rel=0.5)


@pytest.mark.parametrize(
    "text, groups",
    [
        ("replica_groups={{0,1},{2,3}}, x=1", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[4], x", [[0, 1], [2, 3]]),
        ("replica_groups=[2,2]<=[2,2]T(1,0), x", [[0, 2], [1, 3]]),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x", [[0, 1], [2, 3]]),
        ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x", [[0, 2], [1, 3]]),
        (
            "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x",
            [[0, 2], [1, 3]],
        ),
        ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
        ("no groups", [[0, 1, 2, 3]]),
    ],
)
def test_spellings_of_groups(text, groups):
    np.testing.assert_array_equal(program.replica_groups(text, 4), groups)


LOOP = """
%all-reduce-scatter.1 (p: f32[16]) -> f32[8] {
  %p = f32[16]{0} parameter(0)
  ROOT %sum = f32[16]{0} all-reduce(%p), channel_id=7, replica_groups=[4,2]<=[8], to_apply=%add
}

%body (t: (s32[], f32[16])) -> (s32[], f32[16]) {
  %t = (s32[], f32[16]{0}) parameter(0)
  %step = f32[8]{0} fusion(%t), kind=kCustom, calls=%all-reduce-scatter.1
  %begin = (f32[2]{0}, f32[4]{0}) all-gather-start(%t), channel_id=9, replica_groups=[4,2]<=[8]
  %end = f32[4]{0} all-gather-done(%begin)
  %start = ((f32[4]{0:T(8,128)(2,1)}, token[]), f32[8]{0}) call-start(%t), to_apply=%on_another_core
  %more = f32[4]{0} all-gather(%t), channel_id=9, replica_groups=[4,2]<=[8]
}

%on_another_core (u: f32[4]) -> f32[8] {
  %u = f32[4]{0} parameter(0)
  ROOT %apart = f32[8]{0} all-gather(%u), channel_id=11, replica_groups=[4,2]<=[8]
}, execution_thread="sparsecore"

%condition (t: (s32[], f32[16])) -> pred[] {
  %t = (s32[], f32[16]{0}) parameter(0)
  %six = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%t, %six), direction=LT
}

ENTRY %main (x: f32[16]) -> f32[16] {
  %x = f32[16]{0} parameter(0)
  %loop = (s32[], f32[16]{0}) while(%x), condition=%condition, body=%body
}
"""


def test_the_text_of_tpus(mesh):
    """A scatter inside a fusion, a gather in two steps of one channel and one on another core, a
    loop without a count.
    """
    found = {row.kind: row for row in program.collectives(LOOP, mesh)}
    assert found["reduce-scatter"] == ("reduce-scatter", ("fsdp",), 2, 6, 6 * 4 * 16)
    assert found["all-gather"] == ("all-gather", ("fsdp",), 2, 12, 6 * 4 * (4 + 8))
    assert len(found) == 2


def test_bytes_of_the_text_of_tpus():
    """Each turn: what is read and written, of a gather that begins by its type alone."""
    state = 4 + 4 * 16  # the counter and the array that the loop carries
    scatter = 4 * 16 + 4 * 8  # inside the fusion, the array alone is read
    begin, more, on_another_core = 4 * 2 + 4 * 4, state + 4 * 4, 4 * 4 + 4 * 8
    condition = 1 + state + 4
    turn = scatter + begin + more + on_another_core + condition
    assert program.bytes_moved(LOOP) == 6 * turn

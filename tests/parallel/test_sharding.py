import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import PartitionSpec as P

from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import batch_sharding, partition, shard, shard_params

RULES = (
    (r"query/kernel$", ("fsdp", "tensor")),
    (r"query/bias$", ("tensor",)),
    (r"whole", None),
)


@pytest.fixture
def mesh():
    return make_mesh({"data": 2, "fsdp": 2, "tensor": 2})


@pytest.mark.parametrize(
    "name, shape, expected",
    [
        ("params/query/kernel", (16, 8), P(("fsdp",), ("tensor",))),
        ("params/layers/query/kernel", (3, 16, 8), P(None, ("fsdp",), ("tensor",))),
        ("opt_state/0/mu/query/kernel", (16, 8), P(("fsdp",), ("tensor",))),
        ("params/query/kernel", (16, 7), P(("fsdp",), None)),  # 7 does not split: whole
        ("params/query/bias", (8,), P(("tensor",))),
        ("params/whole/kernel", (16, 16), P(None, None)),
        ("params/other/kernel", (6, 16), P(None, "fsdp")),  # fallback: the largest divisible
        ("params/other/kernel", (9, 6), P(None, "fsdp")),
        ("params/other/kernel", (9, 7), P()),
        ("params/other/bias", (64,), P()),
        ("step", (), P()),
    ],
)
def test_partition(mesh, name, shape, expected):
    assert partition(name, shape, mesh, RULES) == expected


def test_moments_lie_where_their_parameters_do(mesh):
    params = {"query": {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros(8)}}
    state = {"params": params, "opt_state": optax.adam(1.0).init(params)}
    shardings = shard_params(jax.eval_shape(lambda: state), mesh, RULES)
    moments = shardings["opt_state"][0].mu
    assert moments["query"]["kernel"].spec == shardings["params"]["query"]["kernel"].spec
    placed = jax.device_put(state, shardings)
    assert placed["params"]["query"]["kernel"].addressable_shards[0].data.shape == (8, 4)


def test_shard_is_a_no_op_without_a_mesh():
    x_BTND = jnp.ones((4, 3, 2, 5))
    assert shard(x_BTND, "BTND") is x_BTND


def test_shard_splits_by_letter(mesh):
    with jax.set_mesh(mesh):
        y_BLAK = jax.jit(lambda x: shard(x, "BLAK"))(jnp.ones((8, 3, 4, 5)))
        odd_BLAK = jax.jit(lambda x: shard(x, "BLAK"))(jnp.ones((3, 3, 5, 5)))
    assert y_BLAK.sharding.is_equivalent_to(
        jax.NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None)), 4
    )
    assert odd_BLAK.sharding.is_fully_replicated  # a single clip still samples on many devices


def test_shard_refuses_letters_that_do_not_fit(mesh):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match="BTND"):
        shard(jnp.ones((2, 3)), "BTND")


def test_a_batch_is_split_over_data_and_fsdp(mesh):
    rows = jax.device_put(jnp.arange(8), batch_sharding(mesh))
    assert {shard.data.shape for shard in rows.addressable_shards} == {(2,)}

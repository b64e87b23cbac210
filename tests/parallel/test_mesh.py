import jax
import pytest

from jaxvid.errors import UserError
from jaxvid.parallel.mesh import make_mesh


@pytest.mark.parametrize(
    "sizes, shape",
    [
        ((-1, 1, 1), (8, 1, 1, 1)),
        ((2, -1, 2), (2, 2, 2, 1)),
        ((1, 8, 1, 1), (1, 8, 1, 1)),
        ((2, 1, 1, -1), (2, 1, 1, 4)),
    ],
)
def test_minus_one_takes_the_rest(sizes, shape):
    mesh = make_mesh(dict(zip(("data", "fsdp", "tensor", "seq"), sizes)))  # or without the last
    assert tuple(mesh.shape.values()) == shape
    assert mesh.axis_names == ("data", "fsdp", "tensor", "seq")


@pytest.mark.parametrize("sizes", [(3, 1, 1), (-1, 3, 1), (-1, -1, 1), (0, 1, 8), (16, 1, 1)])
def test_a_mesh_that_does_not_match_the_devices_is_one_line(sizes):
    with pytest.raises(UserError, match=r"mesh=.*data=") as error:
        make_mesh(dict(zip(("data", "fsdp", "tensor"), sizes)))
    assert "\n" not in str(error.value)


def test_a_part_of_the_devices():
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, devices=jax.devices()[3:4])
    assert mesh.devices.item() == jax.devices()[3]

"""The device mesh: four axes, named for what they split."""

import math

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from jaxvid.errors import UserError

AXES = ("data", "fsdp", "tensor", "seq")


def make_mesh(sizes, devices=None):
    """Mesh over all `devices` with axes data, fsdp, tensor and seq; a size of -1 takes the rest.

    sizes: {axis: size}, 1 for axes without a size. Axis types are Auto: the compiler places arrays
    that have no annotation. Slices of TPUs, which a slower network joins, are parts of `data`.
    Raises UserError unless the product of the sizes is the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    shape = [int(sizes.get(axis, 1)) for axis in AXES]
    named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, shape))
    if shape.count(-1) > 1 or any(size < 1 and size != -1 for size in shape):
        raise UserError(
            f"mesh={{{named}}}: sizes must be positive; one of them may be -1, the rest"
        )
    if -1 in shape:
        known = math.prod(size for size in shape if size != -1)
        shape[shape.index(-1)] = len(devices) // known
    if math.prod(shape) != len(devices):
        raise UserError(
            f"mesh={{{named}}}: does not match the {len(devices)} devices present; "
            "the product of the sizes must equal it (use -1 for one axis to take the rest)"
        )
    types = (AxisType.Auto,) * len(AXES)
    slices = len({getattr(device, "slice_index", None) for device in devices})
    # An axis may take a part of a side of a TPU's torus, such as 16 of 8 x 8 x 8 chips.
    options = {"devices": devices, "allow_split_physical_axes": True}
    if slices == 1:
        return Mesh(mesh_utils.create_device_mesh(shape, **options), AXES, axis_types=types)
    if shape[0] % slices:
        raise UserError(
            f"mesh.data={shape[0]}: must be a multiple of the {slices} slices, which share no fast "
            "network; raise it, or use -1"
        )
    within, between = [shape[0] // slices, *shape[1:]], [slices, 1, 1, 1]
    grid = mesh_utils.create_hybrid_device_mesh(within, between, **options)
    return Mesh(grid, AXES, axis_types=types)

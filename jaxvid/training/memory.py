"""What a training step takes, from shapes alone, compared with the memory of the devices."""

import math

import jax
from jax.extend.core import jaxprs_in_params

from jaxvid import memory
from jaxvid.config import flatten

# The compiled gradients of the tiny presets take 0.7 to 1.3 times what autodiff keeps, so a refusal
# is sure if half of it does not fit.
SURE = 0.5


def check_step(task, config, state, frozen, batch, mesh) -> None:
    """Raise UserError, naming the fields that decide, unless a step can fit into the devices.

    state, batch: shapes with shardings. Counts parameters, their gradients, the optimiser's state
    and the average as they are sharded, then what the backward pass keeps of the forward pass.
    """
    local = mesh.local_devices
    there = memory.device_bytes(local[0], sharing=len(local))
    held = _shard_bytes(state) + _shard_bytes(state.params)
    fields = _fields_of(config.task, "task", jax.tree.leaves(state.params))
    parts = "parameters, gradients, optimiser state and average"
    memory.require(fields, parts, held, there, "lower them, or split with mesh.fsdp")

    kept, largest = of_gradient(task, state, frozen, _part(batch, config))
    needed = held + max(int(SURE * kept), largest) // mesh.size
    sizes = (f"data.{name}={config.data[name]}" for name in ("batch_size", "frames", "size"))
    fields = ", ".join(sizes)
    remedy = "lower them, raise optim.accumulate, or use more devices"
    memory.require(fields, "state and activations of a step", needed, there, remedy)


def check_program(fields: str, weights, jaxpr, mesh) -> None:
    """Raise UserError unless the weights and the largest product of a program can fit.

    fields: "name=value, ..." of those that decide. weights: shapes with shardings. The products are
    split over all devices at best.
    """
    local = mesh.local_devices
    there = memory.device_bytes(local[0], sharing=len(local))
    products = list(_products(jaxpr))
    if products:
        needed = _shard_bytes(weights) + max(map(_bytes, products)) // mesh.size
        memory.require(fields, "weights and the largest product", needed, there)


def _products(jaxpr):
    """Results of the matrix products and convolutions of a program, which are always stored."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
            yield eqn.outvars[0].aval
        for body in jaxprs_in_params(eqn.params):
            yield from _products(body)


def of_gradient(task, state, frozen, batch) -> tuple[int, int]:
    """Bytes that the gradient of the loss needs, beside parameters, from shapes alone.

    (what it keeps until its backward pass, the largest product of its forward pass).
    """

    def keep(params, extra, frozen, batch):
        def loss(params):
            rng = jax.random.key(0)
            return task.loss(params, batch, rng, step=0, frozen=frozen, extra=extra)

        _, backward, _ = jax.vjp(loss, params, has_aux=True)
        return backward

    arguments = (state.params, state.extra, frozen, batch)
    program, kept = jax.make_jaxpr(keep, return_shape=True)(*arguments)
    total, params = (sum(map(_bytes, jax.tree.leaves(tree))) for tree in (kept, state.params))
    largest = max((_bytes(product) for product in _products(program.jaxpr)), default=0)
    return max(total - params, 0), largest


def _part(batch, config):
    """The shapes of one part of a batch that gradients are accumulated over."""
    rows = config.data.batch_size // config.optim.accumulate
    return {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in batch.items()}


def _fields_of(section, name, leaves) -> str:
    """ "name=value, ..." of the fields that are the largest sizes of the largest array."""
    largest = max(leaves, key=_bytes)
    names = {}
    for field, value in flatten(section).items():
        if type(value) is int:
            names.setdefault(value, f"{name}.{field}={value}".lstrip("."))
    sizes = sorted({size for size in largest.shape if size > 1}, reverse=True)
    return ", ".join(names[size] for size in sizes[:2] if size in names) or name


def _shard_bytes(tree) -> int:
    """Bytes of a tree of shapes with shardings on one device."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )


def _bytes(x) -> int:
    return math.prod(x.shape) * x.dtype.itemsize

"""FLOPs of a program and FLOP/s of devices, the two parts of model FLOPs utilisation (MFU)."""

import functools
import math
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import jaxprs_in_params

from jaxvid.kernels import dispatch
from jaxvid.parallel.topology import look_up

# Dense matrix FLOP/s of one device in bfloat16, by `device_kind`, from data sheets.
_PEAK_BFLOAT16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 1153.5e12,  # a chip is two devices
}

# Memory bandwidth of one device in bytes/s, from the same sheets.
_PEAK_BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "TPU v4": 1.228e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
    "TPU7x": 3.69e12,
}


def count(function: Callable, *args, all_pairs: bool = False) -> int:
    """FLOPs of the matrix products and convolutions in function(*args), from shapes alone.

    A scan counts once per iteration, unlike in the compiler's cost analysis. A `cond` counts its
    most expensive branch, and a `while` counts one iteration. Work that remat repeats counts again.
    Calls in `kernels.dispatch.FLOPS` and Pallas kernels count what they declare. all_pairs: softmax
    attention counts every pair of a query and a key, also masked pairs that are skipped. args:
    arrays or ShapeDtypeStructs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, all_pairs)


def of_step(task, state, frozen, batch, all_pairs: bool = False) -> int:
    """FLOPs of one training step: the loss, plus twice as much for its gradient.

    Work that remat repeats does not count, and the optimiser has no matrix products. all_pairs: as
    in `count`.
    """

    def loss(params, extra, frozen, batch):
        rng = jax.random.key(0)
        return task.loss(params, batch, rng, step=0, frozen=frozen, extra=extra)

    return 3 * count(loss, state.params, state.extra, frozen, batch, all_pairs=all_pairs)


def peak(device: jax.Device, dtype) -> float | None:
    """Peak FLOP/s of the device for matrices of `dtype`, from its data sheet; None if unknown.

    For float32, NVIDIA states half the rate of bfloat16 (TF32), and Google states none.
    """
    promised = look_up(_PEAK_BFLOAT16, device)
    if promised is None or jnp.dtype(dtype) == jnp.bfloat16:
        return promised
    return promised / 2 if device.platform == "gpu" else None


def bandwidth(device: jax.Device) -> float | None:
    """Memory bandwidth of the device in bytes/s, from its data sheet; None if unknown."""
    return look_up(_PEAK_BANDWIDTH, device)


def machine(devices: Sequence[jax.Device]) -> float | None:
    """Peak FLOP/s of all devices together, in bfloat16 by data sheet; None if unknown.

    That of a CPU is measured, in float32. The CPU devices of one process share one processor, so
    they count once per process.
    """
    if devices[0].platform == "cpu":
        return measured() * len({device.process_index for device in devices})
    promised = [peak(device, jnp.bfloat16) for device in devices]
    return None if None in promised else sum(promised)


@functools.cache
def measured(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of this machine: the best of `repeats` float32 products of square matrices."""
    matrix = jax.device_put(np.ones((size, size), np.float32))
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(repeats + 1):  # the first call compiles
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds[1:])


def _count(jaxpr, all_pairs):
    total = 0
    for eqn in jaxpr.eqns:
        primitive = eqn.primitive.name
        if primitive == "dot_general":
            total += _dot(eqn)
        elif primitive == "conv_general_dilated":
            total += _convolution(eqn)
        elif primitive == "pallas_call" and eqn.params["cost_estimate"]:
            total += eqn.params["cost_estimate"].flops
        elif declared := _declared(eqn, all_pairs):
            total += declared
        else:
            inner = [_count(body, all_pairs) for body in jaxprs_in_params(eqn.params)]
            if inner:
                total += max(inner) if primitive == "cond" else _runs(eqn) * sum(inner)
    return total


def _declared(eqn, all_pairs):
    """The FLOPs that a kernel declares for this call; None if it declares none."""
    flops = dispatch.FLOPS.get(eqn.params.get("name", eqn.primitive.name))
    of_operands = flops and (flops.all_pairs if all_pairs else flops.executed)
    return of_operands and of_operands(*(operand.aval for operand in eqn.invars))


def _dot(eqn):
    (contracted, _), _ = eqn.params["dimension_numbers"]
    depth = math.prod(eqn.invars[0].aval.shape[axis] for axis in contracted)
    return 2 * depth * eqn.outvars[0].aval.size


def _convolution(eqn):
    kernel = eqn.invars[1].aval
    outputs = kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * (kernel.size // outputs) * eqn.outvars[0].aval.size


def _runs(eqn):
    return eqn.params["length"] if eqn.primitive.name == "scan" else 1

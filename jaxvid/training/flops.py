"""How much arithmetic a program is, and how much a device could do: the two halves of MFU."""

import functools
import math
import time

import jax
import jax.numpy as jnp

# Dense matrix FLOP/s of one device in bfloat16, from the makers' data sheets, by `device_kind`.
_PEAK_BFLOAT16 = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,
    "TPU v6 lite": 918e12,
    "TPU7x": 2307e12,
}

# Bytes/s of its memory, from the same sheets.
_PEAK_BANDWIDTH = {
    "NVIDIA A100-SXM4-80GB": 2.039e12,
    "NVIDIA H100 80GB HBM3": 3.35e12,
    "NVIDIA H200": 4.8e12,
    "TPU v5 lite": 0.82e12,
    "TPU v5": 2.765e12,
    "TPU v6 lite": 1.64e12,
}


def count(function, *args, all_pairs=False):
    """FLOPs of the matrix products and convolutions in function(*args), from shapes alone.

    A scan counts as often as it runs, which the compiler's own cost analysis leaves out; of a
    `cond` the dearest branch counts, and a `while` counts once. What remat repeats counts again.
    all_pairs: softmax attention counts every pair of a query and a key, also those that a mask
    hides and that are not computed. `args` may be arrays or ShapeDtypeStructs.
    """
    return _count(jax.make_jaxpr(function)(*args).jaxpr, all_pairs)


def of_step(task, state, frozen, batch, all_pairs=False):
    """FLOPs of one training step: the loss, and twice as much again for its gradient.

    What remat repeats does not count, and the optimiser multiplies no matrices. all_pairs: as in
    `count`.
    """

    def loss(params, extra, frozen, batch):
        rng = jax.random.key(0)
        return task.loss(params, batch, rng, step=0, frozen=frozen, extra=extra)

    return 3 * count(loss, state.params, state.extra, frozen, batch, all_pairs=all_pairs)


def peak(device, dtype):
    """FLOP/s that the maker of the device promises for matrices of `dtype`; None where unknown.

    float32 is promised at half the rate of bfloat16 (TF32) by NVIDIA and not at all by Google.
    """
    promised = _promised(_PEAK_BFLOAT16, device)
    if promised is None or jnp.dtype(dtype) == jnp.bfloat16:
        return promised
    return promised / 2 if device.platform == "gpu" else None


def bandwidth(device):
    """Bytes/s that the maker of the device promises for its memory; None where unknown."""
    return _promised(_PEAK_BANDWIDTH, device)


def _promised(table, device):
    """The first entry of which the device's kind is a variant; None if there is none."""
    kinds = (kind for kind in table if device.device_kind.startswith(kind))
    return table.get(next(kinds, None))


def machine(devices):
    """FLOP/s of all devices together: the makers' bfloat16, on CPU measured; None where unknown.

    The devices of a CPU are one processor cut into parts, so its rate is that of one process.
    """
    if devices[0].platform == "cpu":
        return measured() * len({device.process_index for device in devices})
    promised = [peak(device, jnp.bfloat16) for device in devices]
    return None if None in promised else sum(promised)


@functools.cache
def measured(size=1024, repeats=5):
    """FLOP/s of the best of a few float32 products of square matrices, here and now."""
    matrix = jnp.ones((size, size), jnp.float32)
    product = jax.jit(jnp.matmul)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        jax.block_until_ready(product(matrix, matrix))
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds[1:])


def _count(jaxpr, all_pairs):
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            total += _dot(eqn)
        elif eqn.primitive.name == "conv_general_dilated":
            total += _convolution(eqn)
        elif eqn.primitive.name == "pallas_call" and eqn.params["cost_estimate"]:
            total += eqn.params["cost_estimate"].flops
        elif eqn.primitive.name.startswith("dot_product_attention_fwd"):
            q_BLAK, k_BMAK = (variable.aval for variable in eqn.invars[:2])
            total += 4 * q_BLAK.size * k_BMAK.shape[1]  # cuDNN computes masked pairs too
        elif all_pairs and eqn.params.get("name") == "softmax_attention":
            q_BALK, k_BAMK = (variable.aval for variable in eqn.invars[:2])
            total += 4 * q_BALK.size * k_BAMK.shape[2]
        else:
            inner = [_count(body, all_pairs) for body in _bodies(eqn)]
            if inner:
                total += max(inner) if eqn.primitive.name == "cond" else _runs(eqn) * sum(inner)
    return total


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


def _bodies(eqn):
    """The jaxprs among the parameters of an equation, closed or open, single or in a tuple."""
    for value in eqn.params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                yield item

"""Devices to compile for: those at hand, or TPUs that are not there."""

import importlib.util
import os
import re

import jax

from jaxvid.errors import UserError

# Memory of a device in bytes and the bandwidth of its links to other chips in bytes/s, both ways of
# all links together, by `device_kind`; from Google's pages on each version. A chip of TPU7x is two
# devices.
MEMORY = {
    "TPU v4": 32 * 2**30,
    "TPU v5 lite": 16 * 2**30,
    "TPU v5": 95 * 2**30,
    "TPU v6 lite": 32 * 2**30,
    "TPU7x": 96 * 2**30,
}
LINKS = {
    "TPU v4": 300e9,
    "TPU v5 lite": 200e9,
    "TPU v5": 600e9,
    "TPU v6 lite": 448e9,
    "TPU7x": 600e9,
}
VERSIONS = {"v4": 3, "v5e": 2, "v5p": 3, "v6e": 2, "tpu7x": 3}  # numbers of a shape
EXAMPLES = "v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4"


def devices(topology: str, slices: int = 1) -> list[jax.Device]:
    """Devices of "local", or of a TPU as in "v5e:4x4", which needs libtpu but no TPU.

    slices: pods of that shape, joined by a slower network. Raises UserError for an unknown version
    or shape.
    """
    if topology == "local":
        if slices != 1:
            raise UserError("slices: topology=local has one; leave --slices out")
        return jax.devices()
    match = re.fullmatch(r"(\w+):(\d+(?:x\d+)*)", topology)
    count = VERSIONS.get(match[1]) if match else None
    shape = [int(n) for n in match[2].split("x")] if match else []
    if count != len(shape) or 0 in shape:
        raise UserError(f"topology={topology}: write local, or a version and shape: {EXAMPLES}")
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(f"topology={topology}: needs the compiler for TPUs; pip install libtpu")
    # Without these, libtpu asks a metadata server, and locks the TPU for one process.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # after the environment is set

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        found = topologies.get_topology_desc(platform="tpu", topology_name=topology, **options)
    except (jax.errors.JaxRuntimeError, ValueError, RuntimeError, NotImplementedError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"topology={topology}: {reason}; try {EXAMPLES}") from error
    return found.devices


def look_up(table: dict, device: jax.Device):
    """The entry whose key the device's kind starts with, the longest such key; None without one."""
    kinds = [kind for kind in table if device.device_kind.startswith(kind)]
    return table[max(kinds, key=len)] if kinds else None

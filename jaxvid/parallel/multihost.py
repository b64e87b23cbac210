"""Many processes, one program: start-up, and global arrays from each host's part."""

import contextlib
import hashlib
import logging
import os
import re

import jax
import numpy as np
import portpicker
from jax._src import distributed  # the client has no public name
from jax.experimental import multihost_utils

from jaxvid.errors import UserError
from jaxvid.parallel import peers

# A single process must survive Ctrl-Z and a sleeping laptop, where it misses its heartbeat.
_ALONE_HEARTBEAT_SECONDS = 7 * 24 * 3600
# Hosts of a pod may start minutes apart, where they first fetch an image.
JOIN_SECONDS, DETECTED_JOIN_SECONDS = 55, 600


def initialize(coordinator=None, num_processes=None, process_id=None, join_seconds=None):
    """Join the other processes; call before anything touches a device. Safe to call again.

    Processes end if not all of them start within join_seconds, by default JOIN_SECONDS with a
    coordinator that is given, and DETECTED_JOIN_SECONDS on a detected cluster. From then on they
    watch each other (`parallel.peers`).

    Without arguments and without JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID the
    cluster is detected (Cloud TPU, Kubernetes, SLURM, Open MPI); without one, this process
    is a cluster of one, because only jax.distributed turns SIGTERM into a save.
    """
    if jax.distributed.is_initialized():
        return
    given = {
        "coordinator_address": coordinator or os.environ.get("JAX_COORDINATOR_ADDRESS"),
        "num_processes": _integer(num_processes, "JAX_NUM_PROCESSES"),
        "process_id": _integer(process_id, "JAX_PROCESS_ID"),
    }
    missing = [name for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise UserError(f"{missing[0]}: missing; give all of {', '.join(given)}, or none")
    try:
        if not missing:
            _check(*given.values())
            seconds = join_seconds or JOIN_SECONDS
            who = (
                f"the {given['num_processes']} processes (this is {given['process_id']}, and "
                f"{given['coordinator_address']} the coordinator)"
            )
            with peers.joining(who, seconds):
                jax.distributed.initialize(**given, initialization_timeout=2 * seconds)
        else:
            seconds = join_seconds or DETECTED_JOIN_SECONDS
            with peers.joining("the processes of the cluster", seconds):
                _detect_or_alone(2 * seconds)
    except RuntimeError as error:
        if "must be called before" not in str(error):
            raise
        logging.warning("jax was in use before jaxvid started: SIGTERM will stop without a save")
    else:
        peers.watch(distributed.global_state.client)


@contextlib.contextmanager
def failing_alone():
    """A context whose errors end this process without waiting for the others; see `peers.leave`."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except Exception as error:
        peers.leave(error, 2 if isinstance(error, UserError) else 1)
        raise


def _check(coordinator, num_processes, process_id):
    """Raise UserError for what jax.distributed would answer with a traceback."""
    port = re.fullmatch(r"(?:[^\s:\[\]]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})", coordinator)
    if not coordinator.isascii() or not port or not 0 < int(port[1]) < 2**16:
        raise UserError(
            f"coordinator={coordinator[:100]}: write HOST:PORT of process 0, such as 10.0.0.1:1234"
        )
    if num_processes < 1:
        raise UserError(f"num_processes={num_processes}: must be at least 1")
    if not 0 <= process_id < num_processes:
        raise UserError(f"process_id={process_id}: must be from 0 to {num_processes - 1}")


def _integer(value, variable):
    if value is None and variable in os.environ:
        value = os.environ[variable]
    try:
        return None if value is None else int(value)
    except ValueError as error:
        raise UserError(f"{variable}={value}: must be a whole number") from error


def _detect_or_alone(timeout):
    try:
        jax.distributed.initialize(initialization_timeout=timeout)
    except ValueError as error:  # what jax raises without a cluster
        if "should be defined" not in str(error):
            raise
        address = f"localhost:{portpicker.pick_unused_port()}"
        jax.distributed.initialize(
            address,
            num_processes=1,
            process_id=0,
            coordinator_bind_address=address,
            cluster_detection_method="deactivate",
            heartbeat_timeout_seconds=_ALONE_HEARTBEAT_SECONDS,
        )


def batch_share(mesh):
    """(index, count): this process feeds share `index` of `count` equal parts of every batch.

    Processes that hold the same rows (tensor parallelism across hosts) feed the same share.
    """
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    blocks = {}
    for block, devices in enumerate(mesh.devices.reshape(rows, -1)):
        for device in devices:
            blocks.setdefault(device.process_index, set()).add(block)
    shares = sorted({tuple(sorted(held)) for held in blocks.values()})
    return shares.index(tuple(sorted(blocks[jax.process_index()]))), len(shares)


def agreed(*flags):
    """The flags of process 0, on all processes."""
    if jax.process_count() == 1:
        return flags
    return tuple(map(bool, multihost_utils.broadcast_one_to_all(np.array(flags))))


def together(place):
    """Wait until all processes have come to this place, a name."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(place)


def all_equal(text: str) -> bool:
    """Whether all processes call this with the same text."""
    if jax.process_count() == 1:
        return True
    digest = np.frombuffer(hashlib.sha256(os.fsencode(text)).digest(), np.int32)
    return bool((multihost_utils.process_allgather(digest) == digest).all())


def to_host(array):
    """The whole of a global array as numpy, on all processes."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return multihost_utils.process_allgather(array, tiled=True)


def to_global(batch, sharding):
    """Global arrays [B, ...] from this process's rows (numpy), transferred when this returns.

    A device does not wait: it still works on the step before. On CPU, a step whose arguments are
    still being transferred would run on a thread whose memory is not kept (`parallel.host`).
    """
    return jax.block_until_ready(
        jax.tree.map(lambda rows: jax.make_array_from_process_local_data(sharding, rows), batch)
    )

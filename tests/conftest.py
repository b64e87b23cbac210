"""Eight CPU devices for every test, set before jax starts its backend."""

import gc
import os
from importlib import metadata
from pathlib import Path

import pytest

MAX_MAPPINGS = 30_000  # of a process; the limit of Linux is 65,530

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    # Tests compile much and compute little, so half of the compiler's work is left out.
    flags += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    if metadata.version("jax").startswith("0.10."):  # later ones have the slower emitters alone
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()


@pytest.fixture(autouse=True)
def few_mappings():
    """Forget compiled programs when a worker holds many.

    Each has memory mappings of its own, and the compiler crashes where there can be no more.
    """
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > MAX_MAPPINGS:
        import jax  # after the flags are set

        jax.clear_caches()
        gc.collect()


@pytest.fixture
def tpu_devices(monkeypatch):
    """A function from a topology, e.g. "v5e:2x2", to its devices. Skips without libtpu."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # no metadata server
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    # libtpu locks the TPU for one process. Tests only compile, in several processes.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies  # after the flags are set

    return lambda topology: (
        topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    )

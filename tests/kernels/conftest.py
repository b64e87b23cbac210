"""Devices that need not be there, to compile for or to interpret."""

import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental import topologies
from jax.sharding import AxisType, Mesh


@pytest.fixture
def launch(monkeypatch):
    """What launches a kernel where it cannot run: set `interpret` and other options."""
    options, pallas_call = dict(interpret=True), pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **own: pallas_call(*args, **own | options))
    return options


@pytest.fixture
def tpu_devices(monkeypatch):
    """Topology, "v5e:2x2" say, to its devices; skips without libtpu."""
    pytest.importorskip("libtpu", reason="libtpu is not installed")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU machine to ask about itself
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "localhost")
    # A lock keeps a TPU for one process; compiling takes none, and tests run side by side.
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    return lambda topology: (
        topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    )


@pytest.fixture
def tpu_pod(tpu_devices):
    """Sixteen such devices as a mesh with two along every axis."""
    devices = np.array(tpu_devices("v5e:4x4")).reshape(2, 2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)

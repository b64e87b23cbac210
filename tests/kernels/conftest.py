"""Devices that the machine lacks: kernels are interpreted, or compiled ahead of time."""

import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh


@pytest.fixture
def launch(monkeypatch):
    """Options that override those of every pallas_call; interpret=True at first."""
    options, pallas_call = dict(interpret=True), pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **own: pallas_call(*args, **own | options))
    return options


@pytest.fixture
def tpu_pod(tpu_devices):
    """A mesh of sixteen TPU devices, two along every axis."""
    devices = np.array(tpu_devices("v5e:4x4")).reshape(2, 2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)

"""Devices that the machine lacks: kernels are interpreted, or compiled ahead of time."""

import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.sharding import AxisType, Mesh

from jaxvid.kernels.attention import gpu as attention_gpu
from jaxvid.kernels.linear_attention import gpu as linear_attention_gpu


@pytest.fixture
def launch(monkeypatch):
    """Options that override those of every pallas_call; interpret=True at first.

    A GPU runs its kernels in bfloat16 only. Interpreted, their exactness shows in float32.
    """
    for module in (attention_gpu, linear_attention_gpu):
        monkeypatch.setattr(module, "DTYPES", ("bfloat16", "float32"))
    options, pallas_call = dict(interpret=True), pl.pallas_call
    monkeypatch.setattr(pl, "pallas_call", lambda *args, **own: pallas_call(*args, **own | options))
    return options


@pytest.fixture
def tpu_pod(tpu_devices):
    """A mesh of sixteen TPU devices, two along every axis."""
    devices = np.array(tpu_devices("v5e:4x4")).reshape(2, 2, 2, 2)
    return Mesh(devices, ("data", "fsdp", "tensor", "seq"), axis_types=(AxisType.Auto,) * 4)

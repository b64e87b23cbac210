"""The GPU kernels compiled for an H100 without one: registers, spills, shared memory, grids."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = os.environ.get("JAXVID_GPU_AOT")

pytestmark = [
    pytest.mark.gpu_aot,
    pytest.mark.skipif(not PACKAGES, reason="JAXVID_GPU_AOT names no folder with XLA for GPUs"),
]


@pytest.fixture(scope="module")
def compiled():
    command = [sys.executable, "-m", "tests.kernels.gpu_aot"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout)
    for case, kernels in found.items():
        for kernel, facts in kernels.items():
            print(case, kernel, facts)
    return found


def test_every_kernel_fits_an_h100(compiled):
    for case, kernels in compiled.items():
        assert len(kernels) >= 3, case
        for kernel, facts in kernels.items():
            where = f"{case} {kernel} {facts}"
            assert facts["tensor_cores"] and not facts["serialised"], where
            assert facts["spills"] < 256, where
            assert facts["shared"] <= 232448, where
            assert facts["registers"] * facts["threads"] <= 65536, where
            x, *others = facts["grid"]
            assert x < 2**31 and max(others) <= 65535, where


def test_kernels_of_a_head_share_a_processor(compiled):
    """Two programs of the linear attention of width 128 run on one processor at once."""
    for facts in compiled["linear_attention (4, 32, 32768, 128)"].values():
        assert 2 * facts["registers"] * facts["threads"] <= 65536
        assert 2 * facts["shared"] <= 233472

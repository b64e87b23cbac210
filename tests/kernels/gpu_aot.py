"""Compiles the GPU kernels for an H100 that is not there; prints what the compiler says of them.

    JAXVID_GPU_AOT=DIR python -m tests.kernels.gpu_aot

DIR: where `pip install --no-deps --target DIR jax-cuda12-plugin==JAX jax-cuda12-pjrt==JAX
nvidia-cuda-nvcc-cu12` has put XLA for GPUs and ptxas; JAX is the version of jax. Prints one JSON
object: {case: {kernel: {registers, spills, shared, threads, serialised}}}, bytes of spills and
shared memory per thread and program, and whether tensor cores wait for each other (C7515).
"""

import glob
import json
import os
import re
import subprocess
import sys
import tempfile

PACKAGES = os.environ["JAXVID_GPU_AOT"]
sys.path.append(PACKAGES)
NVCC = os.path.join(PACKAGES, "nvidia", "cuda_nvcc")
DUMP = tempfile.mkdtemp()
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = f"--xla_gpu_cuda_data_dir={NVCC} --xla_dump_to={DUMP}"

import jax  # noqa: E402  after the flags
import jax.numpy as jnp  # noqa: E402
import jax_plugins.xla_cuda12  # noqa: E402
import numpy as np  # noqa: E402
from jax.experimental import topologies  # noqa: E402
from jax.sharding import SingleDeviceSharding  # noqa: E402

from jaxvid.kernels import dispatch  # noqa: E402
from jaxvid.kernels.attention import gpu as attention  # noqa: E402
from jaxvid.kernels.linear_attention import gpu as linear_attention  # noqa: E402
from jaxvid.layers import masks  # noqa: E402

# From the data sheet of the H100 SXM and the limits of compute capability 9.0.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  memory_bandwidth: 3350000000000 l2_cache_size: 52428800 device_memory_size: 85899345920
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 8 }
runtime_version { major: 12 minor: 9 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""


def kernels(run, *shapes):
    """{kernel: what ptxas and XLA say of it} of the program `run` of arrays of these shapes."""
    for path in glob.glob(f"{DUMP}/*"):
        os.remove(path)
    topology = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    where = SingleDeviceSharding(topology.devices[0])
    arrays = [jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=where) for s in shapes]
    jax.jit(run).lower(*arrays).compile()
    launches = {}
    for path in glob.glob(f"{DUMP}/*thunk_sequence.txt"):
        with open(path) as file:
            found = re.findall(
                r"(\w+) grid: \[(\d+), (\d+), (\d+)\] threads: \[(\d+),.*?shared_memory: (\d+)",
                file.read(),
            )
        launches |= {name: list(map(int, numbers)) for name, *numbers in found}
    facts = {}
    for path in glob.glob(f"{DUMP}/*.ptx"):
        with open(path) as file:
            text = file.read()
        for name in re.findall(r"\.entry (\w*attention\w*)\(", text):  # others are XLA's own
            command = [f"{NVCC}/bin/ptxas", "-v", "-arch=sm_90a", path, "-o", f"{DUMP}/cubin"]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            *grid, threads, shared = launches[name]
            facts[name] = {
                "registers": int(re.search(r"Used (\d+) registers", said)[1]),
                "spills": int(re.search(r"(\d+) bytes spill stores", said)[1]),
                "shared": shared,
                "threads": threads,
                "grid": grid,
                "tensor_cores": "wgmma" in text,
                "serialised": "C7515" in said,
            }
    return facts


def gradient(attend):
    def run(dy, *arrays):
        y, pull = jax.vjp(attend, *arrays)
        return y, pull(dy)

    return run


def of_linear_attention(B, A, L, K):
    x = jax.ShapeDtypeStruct((B, L, A, K), jnp.bfloat16)
    g = jax.ShapeDtypeStruct((B, L, A), jnp.float32)

    def attend(q, k, v, g):
        state = jnp.zeros((B, A, K, K))
        return linear_attention.linear_attention(
            q, k, v, g, scale=1.0, state_BAKV=state, chunk=None
        )[0]

    return kernels(gradient(attend), x, x, x, x, g)


def of_attention(B, A, T, N, K):
    x = jax.ShapeDtypeStruct((B, T * N, A, K), jnp.bfloat16)
    position_L = np.arange(T).repeat(N)
    options = dict(q_position_L=position_L, k_position_M=position_L, allow=masks.causal(8, 1))

    def attend(q, k, v):
        return attention.attention(q, k, v, **options, scale=K**-0.5)

    return kernels(gradient(attend), x, x, x, x)


# The published shapes, and frames as short and rows as many as a factorised network has.
CASES = {
    "linear_attention": (
        of_linear_attention,
        [
            (4, 32, 32768, 128),
            (2, 16, 16384, 128),
            (4, 8, 16384, 256),
            (8, 12, 4096, 64),
            (8192, 24, 128, 32),
        ],
    ),
    "attention": (
        of_attention,
        [(8, 12, 16, 256, 64), (4, 16, 16, 256, 72), (4, 9, 16, 256, 128), (1, 16, 128, 256, 72)],
    ),
}

if __name__ == "__main__":
    jax_plugins.xla_cuda12.initialize()
    dispatch.platform = lambda: "gpu"
    found = {
        f"{name} {shape}": of(*shape) for name, (of, shapes) in CASES.items() for shape in shapes
    }
    json.dump(found, sys.stdout)

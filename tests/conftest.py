"""Eight CPU devices for every test, set before jax starts its backend."""

import os
from importlib import metadata

os.environ.setdefault("JAX_PLATFORMS", "cpu")
flags = os.environ.get("XLA_FLAGS", "")
if "xla_force_host_platform_device_count" not in flags:
    # Tests compile much and compute little, so half of the compiler's work is left out.
    flags += " --xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
    if metadata.version("jax").startswith("0.10."):  # later ones have the slower emitters alone
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = flags.strip()

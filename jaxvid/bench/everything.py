"""What is worth knowing of one device, in one command and a given time."""

import sys
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxvid import config as config_lib
from jaxvid.bench import attention, kernels, runs, timing
from jaxvid.errors import UserError
from jaxvid.models.stand_in import stand_in
from jaxvid.training import flops

SECONDS = 2.0  # of measuring in one group of contenders


def measure(minutes: float, save: Callable[[dict], None]) -> dict:
    """{name of a part: its figures}, the parts that a new machine is judged by first.

    No part begins after `minutes`, and parts that are left out are named. save: gets the figures
    after every part, so that a command that is stopped leaves those that it has.
    """
    small = jax.default_backend() == "cpu"
    deadline, figures = time.perf_counter() + 60 * minutes, {}
    steps = ("tiny",) if small else ("b", "xl")
    size = steps[0]
    parts = {
        "rates": _rates,
        "attention": lambda: attention.measure(("b",) if small else tuple(attention.SHAPES)),
        **{f"step_{name}": lambda name=name: runs.step(*_generator(name)) for name in steps},
        "linear_attention": lambda: kernels.measure("linear_attention", (), kernels.SHORT),
        f"sample_{size}": lambda: runs.cached_sample(*_generator(size)),
        f"encode_{size}": lambda: runs.encode(*_tokenizer(size)),
        "data": lambda: runs.input_pipeline(*_generator("tiny")),
    }
    with timing.lasting(SECONDS):
        for name, part in parts.items():
            if time.perf_counter() > deadline:
                figures[name] = {"left_out": f"{minutes} minutes were over"}
                continue
            print(f"part {name}", file=sys.stderr)
            begin = time.perf_counter()
            try:
                figures[name] = part()
            except (UserError, jax.errors.JaxRuntimeError) as error:  # out of memory, for one
                figures[name] = {"error": str(error).splitlines()[0]}
            figures[name]["took_s"] = time.perf_counter() - begin
            save(figures)
    return figures


def _rates():
    """Rates of a large product and a large copy, and those of the data sheet if they are known."""
    small = jax.default_backend() == "cpu"
    dtype, device = jnp.float32 if small else jnp.bfloat16, jax.devices()[0]
    square, _ = timing.products(1024, dtype)
    large = jax.random.normal(jax.random.key(0), (2**24 if small else 2**29,), dtype)
    add = jax.jit(lambda x: x + 1)
    of_square, of_copy = timing.take_turns(square.run, lambda: add(large), calls=timing.calls())
    found = {
        "matmul_tflop_per_s": square.flops / min(of_square) / 1e12,
        "copy_gb_per_s": 2 * large.nbytes / min(of_copy) / 1e9,
    }
    if peak := flops.peak(device, dtype):
        found["matmul_tflop_per_s_by_data_sheet"] = peak / 1e12
    if bandwidth := flops.bandwidth(device):
        found["copy_gb_per_s_by_data_sheet"] = bandwidth / 1e9
    return found


def _generator(size):
    """AR-Diffusion of this size; sizes for accelerators have 16 frames of 256 latent tokens."""
    config = config_lib.read(f"configs/ar_diffusion.py:size={size}")
    if size == "tiny":
        return config, None
    config.data.frames = 16
    config.data.batch_size = {"b": 8, "xl": 4}[size]
    return config, stand_in("256x4")


def _tokenizer(size):
    return config_lib.read(f"configs/tokenizer.py:size={size}"), None

"""Benchmarks of a config on this machine, as a table and as JSON in the work folder.

    python -m jaxvid.bench all --out=DIR --minutes=8                 this device, all that matters
    python -m jaxvid.bench step --config=configs/ar_diffusion.py     training step, MFU, memory
    python -m jaxvid.bench data --config=configs/ar_diffusion.py     input pipeline, waiting share
    python -m jaxvid.bench sample --config=configs/ar_diffusion.py   sampling, or parallel decoding
    python -m jaxvid.bench encode --config=configs/tokenizer.py      clips to latents
    python -m jaxvid.bench stream --config=configs/ar_diffusion.py   a long stream, frame by frame
    python -m jaxvid.bench stream --config=configs/tokenizer.py      long videos through a tokenizer
    python -m jaxvid.bench kernels --op=linear_attention             kernels beside softmax, a plot
    python -m jaxvid.bench kernels --op=gated_delta --device=gpu     another one, on that platform
    python -m jaxvid.bench kernels --op=attention --tune             tiles of a GPU kernel
    python -m jaxvid.bench mixers                                    mixers by length of the stream
    python -m jaxvid.bench memory                                    the neural memory by length
    python -m jaxvid.bench forcing --seeds=3                         layouts of training by quality

`--latents=32x4` puts 32 latent tokens of 4 channels in the place of a frame's patches, so that the
network can be timed at the size of a tokenizer's output without one. `--config=RUN/config.json`
measures the config of a run.
"""

import functools
import json
from pathlib import Path

from absl import flags

from jaxvid import cli, files
from jaxvid.bench import (
    attention,
    everything,
    forcing,
    kernels,
    masked,
    memory,
    mixers,
    runs,
    timing,
    tune,
)
from jaxvid.evaluators import report
from jaxvid.layers import masks
from jaxvid.models.stand_in import stand_in

RUNS = {
    "step": runs.step,
    "data": runs.input_pipeline,
    "sample": runs.sample,
    "encode": runs.encode,
    "stream": runs.stream,
}


def main(command):
    """Runs a benchmark, prints its table and writes <workdir>/bench_<command>.json."""
    if command in RUNS:
        config, workdir = cli.config_from_flags()
        options = {"frames": flags.FLAGS.frames} if command == "stream" else {}
        is_masked = config.task.name == "masked_transformer" and command == "sample"
        measure = masked.sample if is_masked else RUNS[command]
        figures = measure(config, stand_in(flags.FLAGS.latents), **options)
        if "by_frame" in figures:
            timing.plot_stream(figures["by_frame"], Path(workdir, f"bench_{command}.png"))
    elif command == "forcing":
        workdir = flags.FLAGS.workdir
        figures = forcing.measure(Path(workdir), flags.FLAGS.seeds, flags.FLAGS.steps)
    elif command == "all":
        workdir = flags.FLAGS.out
        _use(flags.FLAGS.device)
        figures = everything.measure(
            flags.FLAGS.minutes, functools.partial(_write, workdir, command)
        )
    else:
        workdir = flags.FLAGS.workdir
        _use(flags.FLAGS.device)
        if command == "kernels" and flags.FLAGS.tune:
            figures = tune.measure(flags.FLAGS.op)
        elif command == "kernels" and flags.FLAGS.op == "attention":
            figures = attention.measure()
        elif command == "kernels":
            figures = kernels.measure(flags.FLAGS.op)
        else:
            figures = {"mixers": mixers, "memory": memory}[command].measure()
        timing.plot(figures, Path(workdir, f"bench_{command}.png"))
    facts = timing.circumstances()
    print(f"bench {command} on {facts['devices']} x {facts['device']}, {facts['date']}")
    for part, found in figures.items() if command == "all" else [("", figures)]:
        print("\n".join([*([f"\n{part}"] if part else []), *lines(found)]))
    print(f"written to {_write(workdir, command, figures)}")


def _use(platform):
    if platform:
        timing.use(platform)


def _write(workdir, command, figures):
    """Writes the figures and their circumstances; returns the path."""
    path = Path(workdir, f"bench_{command}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps({**timing.circumstances(), "figures": figures}, indent=2) + "\n")
    return path


def lines(figures: dict) -> list[str]:
    """Lines of the figures of a benchmark: numbers and texts, then the tables."""
    tables = {name: rows for name, rows in figures.items() if isinstance(rows, dict)}
    found = []
    for name, value in figures.items():
        if name not in tables:
            text = value if isinstance(value, str) else _cell(value)
            found.append(f"  {name:<42}{text:>12}")
    for name, rows in tables.items():
        head = (name.removeprefix("by_"), *next(iter(rows.values()), ()))
        cells = [(str(row), *map(_cell, columns.values())) for row, columns in rows.items()]
        found += ["", *(f"  {line}" for line in report.table(head, cells).splitlines())]
    return found


def _cell(value):
    return f"{value:,.5g}"


def run_flags():
    """Flags of the commands in RUNS."""
    cli.define_config_flags()
    flags.DEFINE_string("latents", "", "Time the network on TOKENSxCHANNELS latents, as in 32x4.")


def stream_flags():
    """Flags of the command stream."""
    run_flags()
    bounds = dict(lower_bound=100, upper_bound=masks.NOISY - 1)
    flags.DEFINE_integer("frames", 1000, "Frames of the stream.", **bounds)


def mixer_flags(folder="runs/mixers"):
    """Flags of the command mixers."""
    flags.DEFINE_string("device", "", "cpu, gpu or tpu; what JAX finds first unless given.")
    cli.define_path("workdir", "Folder for the figures and the plot.", default=folder)


def memory_flags():
    """Flags of the command memory."""
    mixer_flags("runs/memory")


def forcing_flags():
    """Flags of the command forcing."""
    cli.define_path("workdir", "Folder of the runs and figures.", default="runs/forcing")
    flags.DEFINE_integer("seeds", 3, "Runs of each kind.", lower_bound=1)
    flags.DEFINE_integer("steps", 1000, "Training steps of a run.", lower_bound=101)


def kernel_flags():
    """Flags of the command kernels."""
    mixer_flags("runs/kernels")
    flags.DEFINE_enum("op", "linear_attention", [*kernels.OPS, "attention"], "Operation to time.")
    flags.DEFINE_bool("tune", False, "Time the tiles of the GPU kernel beside each other.")


def all_flags():
    """Flags of the command all."""
    flags.DEFINE_string("device", "", "cpu, gpu or tpu; what JAX finds first unless given.")
    cli.define_path("out", "Folder for the figures.", default="runs/all")
    flags.DEFINE_float("minutes", 8, "No part begins later than this.", lower_bound=0)


if __name__ == "__main__":
    others = {
        **{"stream": stream_flags, "kernels": kernel_flags, "mixers": mixer_flags},
        **{"forcing": forcing_flags, "memory": memory_flags, "all": all_flags},
    }
    cli.run(main, dict.fromkeys(RUNS, run_flags) | others)

"""Compile the training and the sampling of a config for devices that need not be there.

    python -m jaxvid.compile --config=configs/ar_diffusion.py:size=xl --latents=256x4 \\
        --topology=v5e:16x16 --config.data.batch_size=256 --config.mesh.fsdp=-1

Says whether they fit, before a pod is paid for: memory of a device by kind, FLOPs, bytes moved and
collectives by kind and mesh axis, all with loops multiplied out, and the least time of a step by
the rates of the data sheet. --topology: local, or a TPU such as v5e:16x16, v5p:8x8x8 or tpu7x:4x4x4
(libtpu compiles without a TPU). --slices: so many pods of that shape. --latents=256x4 puts 256
latent tokens of 4 channels in the place of a tokenizer. --largest_batch finds the largest batch
that fits. --json writes the figures to a file. Where memory does not suffice, the largest buffers
are named, and what would help.
"""

import json
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import flags

from jaxvid import cli, data, files
from jaxvid import config as config_lib
from jaxvid.errors import UserError, within
from jaxvid.evaluators import report
from jaxvid.models.stand_in import stand_in
from jaxvid.parallel import topology
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import batch_sharding, shard_params
from jaxvid.runs import make_task
from jaxvid.training import flops, program
from jaxvid.training.optim import make_optimizer
from jaxvid.training.state import make_init, placed
from jaxvid.training.step import make_step

FLAGS = flags.FLAGS
PROGRAMS = ("train", "sample")
REMEDIES = (
    "what helps: more of mesh.fsdp or mesh.tensor, a smaller data.batch_size or a larger "
    "optim.accumulate, task.model.remat=True, fewer frames, a smaller sample.num"
)


def main():
    """Compiles, prints the tables and writes --json."""
    config, _ = cli.config_from_flags()
    names = FLAGS.programs.split(",")
    if unknown := set(names) - set(PROGRAMS):
        raise UserError(f"programs={','.join(sorted(unknown))}: choose of {', '.join(PROGRAMS)}")
    folder = Path(FLAGS.json or ".").parent
    if not folder.is_dir():
        raise UserError(f"json={FLAGS.json}: there is no folder {folder}; make it")
    devices = topology.devices(FLAGS.topology, FLAGS.slices)
    latents = stand_in(FLAGS.latents)
    found = {
        "topology": FLAGS.topology,
        "slices": FLAGS.slices,
        "devices": len(devices),
        "device": devices[0].device_kind,
        "batch_size": config.data.batch_size,
    }
    print(f"{found['devices']} x {found['device']}, batch of {found['batch_size']}")
    for name in names:
        found[name] = measure(config, devices, latents, name)
        print("\n".join(lines(name, found[name])), flush=True)
    if FLAGS.largest_batch:
        found["largest_batch"] = largest_batch(config, devices, latents)
        print(f"the largest batch that fits: {found['largest_batch']}")
    if FLAGS.json:
        files.write(FLAGS.json, json.dumps(found, indent=2) + "\n")
        print(f"written to {FLAGS.json}")


def measure(config, devices, latents, name: str) -> dict:
    """The figures of one of PROGRAMS, per device; {"error", "buffers"} if memory does not suffice.

    devices: as from `topology.devices`. latents: a tokenizer to use, or None for that of the
    config. Raises UserError for a config that does not fit together.
    """
    mesh = make_mesh(config.mesh, devices)
    with jax.set_mesh(mesh):
        lowered, counts = _lower(config, mesh, latents, name)
        begin = time.perf_counter()
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if not re.search("(?i)resource.?exhausted|out of memory", str(error)):
                raise
            return {"fits": False, "error": _first_line(error), "buffers": _buffers(str(error))}
    seconds = time.perf_counter() - begin
    text, memory, device = compiled.as_text(), compiled.memory_analysis(), devices[0]
    moved, rows = program.bytes_moved(text), program.collectives(text, mesh)
    needed = memory.peak_memory_in_bytes + memory.generated_code_size_in_bytes
    there = topology.look_up(topology.MEMORY, device)
    return {
        "fits": None if there is None else needed <= there,
        "memory": {
            "arguments": memory.argument_size_in_bytes,
            "results": memory.output_size_in_bytes,
            "of them in place": memory.alias_size_in_bytes,
            "temporaries": memory.temp_size_in_bytes,
            "program": memory.generated_code_size_in_bytes,
            "peak, with the program": needed,
            **({"of the device": there} if there else {}),
        },
        "whole_on_every_device": counts.pop("whole"),
        **{name: count / mesh.size for name, count in counts.items()},
        "bytes_moved": moved,
        "collectives": [row._asdict() for row in rows],
        **_model(device, counts["flops"] / mesh.size, moved, rows),
        "compile_s": seconds,
    }


def largest_batch(config, devices, latents) -> int:
    """The largest batch of training that fits, a multiple of what the mesh splits; 0 if none does.

    Doubles the batch until it does not fit, and then halves the interval. Raises UserError where
    the memory of the devices is unknown.
    """
    if topology.look_up(topology.MEMORY, devices[0]) is None:
        raise UserError(f"largest_batch: unknown memory of {devices[0].device_kind}; leave it out")
    mesh = make_mesh(config.mesh, devices)
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * config.optim.accumulate
    config = config.copy_and_resolve_references()

    def fits(count):
        with config.unlocked():
            config.data.batch_size = count * parts
        found = measure(config, devices, latents, "train")["fits"]
        print(f"batch of {count * parts}: {'fits' if found else 'does not fit'}", flush=True)
        return found

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * parts


def _lower(config, mesh, latents, name):
    """(the lowered program, its FLOPs on all devices), through the functions of `train`."""
    config_lib.check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"])
    task = make_task(config.task, latents)
    with within("data"):
        shapes = data.batch_shapes(config.data, config.data.batch_size)
    rows = batch_sharding(mesh)
    batch = {
        key: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=rows) for key, x in shapes.items()
    }
    with within("optim"):
        tx, schedule = make_optimizer(config.optim, config.steps)
    with within("task"):
        init, shardings = make_init(task, tx, batch, config, mesh)
        frozen = task.frozen()
        state = placed(jax.eval_shape(init), shardings)
        frozen = placed(frozen, shard_params(frozen, mesh))
        if name == "sample":
            return _sampling(config, task, state, frozen, batch)
        update = make_step(task, tx, schedule, config, mesh, shardings)
        counts = {
            "whole": _whole(state),
            "flops": flops.count(update, state, frozen, batch),
            "model_flops": flops.of_step(task, state, frozen, batch),
        }
        return update.lower(state, frozen, batch), counts


def _sampling(config, task, state, frozen, batch):
    """The sampling of `sample.num` clips as long as in training."""

    def sample(weights, frozen, batch):
        cond = {**batch, "num": config.sample.num}
        return task.sample(weights, jax.random.key(0), cond, frozen=frozen)

    given = {
        key: jax.ShapeDtypeStruct((config.sample.num, *x.shape[1:]), x.dtype)
        for key, x in batch.items()
    }
    arguments = state.weights, frozen, given
    counts = {"whole": _whole(state.weights), "flops": flops.count(sample, *arguments)}
    return jax.jit(sample).lower(*arguments), counts


def _whole(tree):
    """Bytes of the arrays, each of 1 MiB at least, that no axis of the mesh splits."""
    sizes = (
        x.size * x.dtype.itemsize for x in jax.tree.leaves(tree) if x.sharding.is_fully_replicated
    )
    return sum(size for size in sizes if size >= 2**20)


def _model(device, work, moved, rows):
    """The least time of a step: arithmetic or memory, whichever is longer, and then all links.

    A ring of n devices moves (n - 1) / n of the bytes of a gather, scatter or exchange over the
    links of each, and twice that of a sum. Links between slices count like those within.
    """
    peak, bandwidth = flops.peak(device, jnp.bfloat16), flops.bandwidth(device)
    links = topology.look_up(topology.LINKS, device)
    if not peak or not bandwidth:
        return {}
    times = {"arithmetic_s": work / peak, "memory_s": moved / bandwidth}
    shares = {"all-reduce": 2.0}
    if links:
        sent = sum(shares.get(r.kind, 1.0) * r.bytes * (r.size - 1) / r.size for r in rows)
        times["links_s"] = sent / links
    longest = max(times["arithmetic_s"], times["memory_s"])
    return {**times, "least_step_s": longest + times.get("links_s", 0)}


def _first_line(error):
    return str(error).strip().splitlines()[0][:300]


def _buffers(text):
    """The largest buffers, from the compiler's message."""
    sizes = re.findall(r"Size: ([\d.]+[KMG]?)\n.*?\n?\s*Shape: (\S+)", text)
    return [f"{size} {shape}" for size, shape in sizes[:5]]


def lines(name: str, found: dict) -> list[str]:
    """The figures of a program as lines of text."""
    if "error" in found:
        return [f"\n{name}: does not fit: {found['error']}", *found["buffers"], REMEDIES]
    fits = {True: "fits", False: f"does not fit; {REMEDIES}", None: "unknown memory"}
    said = [f"\n{name}: {fits[found['fits']]} (compiled in {found['compile_s']:.0f} s)"]
    for kind, size in found["memory"].items():
        said.append(f"  {kind:<28}{size / 2**20:>14,.1f} MiB")
    if found["whole_on_every_device"]:
        size = found["whole_on_every_device"] / 2**20
        said.append(
            f"  {size:,.0f} MiB of parameters, moments and averages are whole on every device: no "
            "mesh axis divides them; try mesh.fsdp=16 and mesh.data=-1"
        )
    for label in ("flops", "model_flops", "bytes_moved"):
        if label in found:
            said.append(f"  {label:<28}{found[label] / 1e9:>14,.1f} G")
    for label in ("arithmetic_s", "memory_s", "links_s", "least_step_s"):
        if label in found:
            said.append(f"  {label:<28}{1e3 * found[label]:>14,.2f} ms")
    if found["collectives"]:
        rows = [
            (
                row["kind"],
                " ".join(row["axes"]),
                str(row["size"]),
                str(row["count"]),
                f"{row['bytes'] / 2**20:,.2f}",
            )
            for row in found["collectives"]
        ]
        table = report.table(("collective", "axes", "devices", "times", "MiB"), rows)
        said += [f"  {line}" for line in table.splitlines()]
    return said


def define_flags():
    """Flags of this command beside those of a config."""
    cli.define_config_flags()
    flags.DEFINE_string("topology", None, "local, or a TPU: v5e:16x16.", required=True)
    flags.DEFINE_integer("slices", 1, "Pods of that shape.", lower_bound=1)
    flags.DEFINE_string("latents", "", "TOKENSxCHANNELS in the place of a tokenizer, as in 256x4.")
    flags.DEFINE_string("programs", "train,sample", "What to compile.")
    flags.DEFINE_boolean("largest_batch", False, "Search the largest batch that fits.")
    cli.define_path("json", "File for the figures.")


if __name__ == "__main__":
    define_flags()
    cli.run(main)

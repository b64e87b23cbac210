"""Score a run on held-out clips: `python -m jaxvid.evaluate --workdir=DIR [--batches=N]`.

Uses the averaged weights of the newest checkpoint and the config of the run. Of a model that
generates, prints the loss by noise level and the quality of continuations by frame, beside that of
repeating the last given frame; of a tokenizer, the quality of rebuilt clips by frame and the use of
its codes. Leaves in the work folder evaluate.json with these figures, and evaluate.png and
evaluate.mp4 with true clips above what became of them.

--i3d=FILE, the weights of I3D as .npz or .safetensors, adds FVD between the true clips and what
became of them, with what it takes to compare it: the number of clips and all else that was chosen,
and the same distance between halves of the true clips, which is how much of it is bias. Without
weights FVD is unavailable, and nothing stands in for it.
"""

import contextlib
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from jaxvid import config as config_lib
from jaxvid import data, files, weights
from jaxvid.data import video as video_lib
from jaxvid.data.transforms import normalize, to_uint8
from jaxvid.inference import open_run
from jaxvid.layers.quantize import usage
from jaxvid.metrics import frechet, i3d
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.training.state import EVALUATE, stream
from jaxvid.training.writer import FPS

FLAGS = flags.FLAGS
SHOWN = 4  # clips in the pictures
BASELINE = "_copy_last"  # suffix of a metric's baseline


def main():
    """Entry point."""
    run = open_run(FLAGS.workdir)
    folder = Path(FLAGS.workdir)
    params = i3d.convert(weights.read(FLAGS.i3d), f"--i3d={FLAGS.i3d}") if FLAGS.i3d else None
    batches = FLAGS.batches or run.config.evaluate.batches
    with jax.set_mesh(run.mesh):
        scores, clips = score(run, batches)
        if run.config.task.name == "tokenizer":
            scores |= codes(run, batches)
        print(f"{folder}, step {run.step}, {clips} held-out clips of {run.config.data.name}\n")
        print(report(scores))
        document = {"step": run.step, "clips": clips, **{k: _json(v) for k, v in scores.items()}}
        if params is None:
            print("fvd  unavailable: no weights of I3D were given (--i3d)\n")
        else:
            document["video_distance"] = video_distance(run, batches, params, FLAGS.i3d)
            print(json.dumps(document["video_distance"], indent=2) + "\n")
        files.write(folder / "evaluate.json", json.dumps(document, indent=2) + "\n")
        write_pictures(run, folder)


def score(run, batches):
    """({metric: mean over clips, shape [...]}, number of clips) of the first `batches` batches.

    A clip counts once, even where the split is smaller than that; NaN counts nowhere.
    """
    evaluate = jax.jit(run.task.evaluate, out_shardings=replicated(run.mesh))
    rows, clips = [], 0
    for rng, batch, fresh in _batches(run, batches):
        found = evaluate(run.params, _place(batch, run.mesh), rng, frozen=run.frozen)
        rows.append({name: np.asarray(value)[fresh] for name, value in found.items()})
        clips += len(fresh)
    return {name: _mean(np.concatenate([row[name] for row in rows])) for name in rows[0]}, clips


def codes(run, batches):
    """Tokens per frame of a tokenizer, and how all held-out clips together use its codes.

    That of a batch alone, which `score` gives, is bounded by the number of its tokens.
    """
    tokenizer, frames = run.task.tokenizer, run.config.data.frames
    cells = np.prod(tokenizer.grid(run.config.data.size))
    per_frame = cells * tokenizer.latents_for_frames(frames) / frames
    found = {"tokens_per_frame": per_frame}
    if not hasattr(tokenizer.quantizer, "size"):  # Gaussian latents
        return found
    tokens = jax.jit(lambda params, video: tokenizer.tokens(params, normalize(video))[0])
    ids = [
        np.asarray(tokens(run.params, _place(batch, run.mesh)["video"]))[fresh]
        for _, batch, fresh in _batches(run, batches)
    ]
    whole = usage(jnp.asarray(np.concatenate(ids)), tokenizer.quantizer.size)
    return found | {name: np.asarray(value) for name, value in whole.items()}


def report(scores):
    """The scores as tables: noise levels, then whatever goes by frame, then single figures."""
    scores = dict(scores)
    parts = []
    if (levels := scores.pop("loss_by_level", None)) is not None:
        edges = np.linspace(0, 1, len(levels) + 1)
        rows = [(f"{a:.1f} - {b:.1f}", f"{x:.5f}") for a, b, x in zip(edges, edges[1:], levels)]
        parts.append(_table(("noise level", "loss"), rows))
    curves = {name: value for name, value in scores.items() if value.ndim == 1}
    if curves:
        frames = np.flatnonzero(~np.all(np.isnan(list(curves.values())), axis=0))
        rows = [(str(f), *(f"{curve[f]:.3f}" for curve in curves.values())) for f in frames]
        rows.append(("mean", *(f"{_mean(curve):.3f}" for curve in curves.values())))
        parts.append(_table(("frame", *curves), rows))
        parts += [_verdict(name, curves) for name in curves if name + BASELINE in curves]
    parts += [f"{name}  {value:.5f}" for name, value in scores.items() if value.ndim == 0]
    return "\n\n".join(parts) + "\n"


def video_distance(run, batches, params, path, repeats=4):
    """FVD and MMD between held-out clips and samples under their conditions, with the protocol.

    Clips that are given frames begin with these in both sets.
    """
    features = jax.jit(i3d.features)
    real, fake = [], []
    for rng, batch, fresh in _batches(run, batches):
        batch = {name: rows[fresh] for name, rows in batch.items()}
        real.append(features(params, normalize(batch["video"])))
        fake.append(features(params, _samples(run, batch, rng)))
    real_ND, fake_ND = np.concatenate(real), np.concatenate(fake)
    draws = np.random.default_rng(run.config.seed)
    mean, spread = frechet.floor(real_ND, frechet.frechet, draws, repeats)
    fields = run.config.data
    return {
        "fvd": frechet.frechet(real_ND, fake_ND),
        "real_against_real": {"mean": mean, "std": spread, "clips": len(real_ND) // 2},
        "mmd_unbiased": frechet.mmd(real_ND, fake_ND),
        "jedi": frechet.jedi(real_ND, fake_ND),
        "protocol": {
            "clips": len(real_ND),
            "samples_per_clip": 1,
            "given_frames": run.config.task.get("given", 0),
            "frames": fields.frames,
            "stride": fields.stride,
            "size": fields.size,
            "data": fields.name,
            "split": "validation",
            "features": "I3D logits, mean over time",
            "weights_sha256": weights.digest(path),
            "resize": f"bilinear to {i3d.SIZE}, TensorFlow 1 grid",
            "compression": "none",
            "ddof": 1,
            "repeats": repeats,
            "seed": run.config.seed,
            "step": run.step,
        },
    }


def write_pictures(run, folder):
    """True clips above continued or rebuilt ones: evaluate.png by row, evaluate.mp4 tiled."""
    with contextlib.closing(_held_out(run)) as iterator:
        batch = {name: rows[:SHOWN] for name, rows in next(iterator).items()}
    truth, guess = batch["video"], _samples(run, batch, stream(run.config.seed, EVALUATE))
    pairs = np.stack([truth, to_uint8(np.asarray(guess))])  # [2, B, T, H, W, 3]
    rows = pairs.swapaxes(0, 1).reshape(-1, *truth.shape[1:])
    files.write(folder / "evaluate.png", video_lib.contact_sheet(rows))
    _, B, T, H, W, C = pairs.shape
    tiled_THWC = pairs.transpose(2, 0, 3, 1, 4, 5).reshape(T, 2 * H, B * W, C)
    video_lib.write_mp4(folder / "evaluate.mp4", tiled_THWC, FPS)
    print(f"pictures: {folder / 'evaluate.png'}, {folder / 'evaluate.mp4'}")


def _samples(run, batch, rng):
    """What the run makes of the clips of a batch: continued or rebuilt, in [-1, 1]."""
    truth = batch["video"]
    cond = {name: batch[name] for name in ("label", "text") if name in batch}
    cond |= {"num": len(truth), "video": truth}
    if "given" in run.config.task:
        cond["first_frames"] = truth[:, : run.config.task.given]
    return run.task.sample(run.params, rng, cond, frozen=run.frozen, frames=truth.shape[1])


def _batches(run, batches):
    """Yield (rng, batch, its rows that are new) of held-out clips until none is new."""
    seen = set()
    with contextlib.closing(_held_out(run)) as iterator:
        for index in range(batches):
            batch = next(iterator)
            fresh = _first_places(batch["id"], seen)
            if not fresh:
                return
            yield jax.random.fold_in(stream(run.config.seed, EVALUATE), index), batch, fresh


def _held_out(run):
    fields = run.config.data
    return data.make_iterator(
        fields,
        split="validation",
        seed=run.config.seed,
        batch_size=fields.batch_size,
        process_index=0,
        process_count=1,
    )


def _place(batch, mesh):
    """The batch on the devices, its rows shared out where their number allows."""
    even = len(batch["id"]) % mesh.size == 0
    return jax.device_put(batch, batch_sharding(mesh) if even else replicated(mesh))


def _first_places(ids, seen):
    """Rows whose clip is not in `seen`; adds them to it."""
    fresh = []
    for row, clip in enumerate(ids.tolist()):
        if clip not in seen:
            seen.add(clip)
            fresh.append(row)
    return fresh


def _mean(rows):
    """Mean over the first axis of what is not NaN; NaN where nothing is left."""
    count = np.sum(~np.isnan(rows), axis=0)
    return np.where(count, np.nansum(rows, axis=0) / np.maximum(count, 1), np.nan)


def _table(head, rows):
    widths = [max(map(len, column)) for column in zip(head, *rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths)) for row in (head, *rows)
    )


def _verdict(name, curves):
    better = np.flatnonzero(curves[name] > curves[name + BASELINE]).tolist()
    frames = ", ".join(map(str, better)) or "none"
    return f"{name} beats {name}{BASELINE} at frames: {frames}"


def _json(value):
    """Nested lists for JSON, which has no NaN: what is not defined is null."""
    return json.loads(json.dumps(value.tolist()).replace("NaN", "null"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer(
        "batches", None, "Held-out batches. Default: evaluate.batches.", lower_bound=1
    )
    flags.DEFINE_string("i3d", None, "Weights of I3D, for FVD: .npz or .safetensors.")
    config_lib.run(main)

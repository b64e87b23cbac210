"""Score a run on held-out clips: `python -m jaxvid.evaluate --workdir=DIR [--batches=N]`.

Uses the averaged weights of the newest checkpoint and the config of the run. Of a model that
generates, prints the loss by noise level and the quality of continuations by frame, beside that of
repeating the last given frame; of a tokenizer, the quality of rebuilt clips by frame, the use of
its codes and the speed of encoding and decoding. Leaves in the work folder evaluate.json with these
figures, and evaluate.png and evaluate.mp4 with true clips above what became of them.

--frames=17,65,257 rebuilds held-out videos of these lengths by a tokenizer, as streams in pieces:
what the device holds does not grow with the length. Prints the quality by length; that by frame is
in evaluate.json.

--i3d=FILE, the weights of I3D as .npz or .safetensors, adds FVD between the true clips and what
became of them, with what it takes to compare it: the number of clips and all else that was chosen,
and the same distance between halves of the true clips, which is how much of it is bias. Likewise
--lpips=FILE adds LPIPS of what a tokenizer rebuilds, where its training named no file. Without
weights either is unavailable, and nothing stands in for it.
"""

import contextlib
import json
import statistics
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from ml_collections import ConfigDict

from jaxvid import config as config_lib
from jaxvid import data, files, weights
from jaxvid.bench.timing import device_name
from jaxvid.data import video as video_lib
from jaxvid.data.transforms import normalize, to_uint8
from jaxvid.errors import UserError
from jaxvid.inference import open_run, pieces
from jaxvid.layers.quantize import usage
from jaxvid.metrics import frechet, i3d, lpips, quality
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.training.logging import figure
from jaxvid.training.state import EVALUATE, stream
from jaxvid.training.writer import FPS

FLAGS = flags.FLAGS
SHOWN = 4  # clips in the pictures
BASELINE = "_copy_last"  # suffix of a metric's baseline
LONGEST = 10**6  # frames of a video, whose pixels wait in host memory
REPEATS = 5  # of encoding and decoding, whose median is their speed
DISTANCES = {"fvd": frechet.frechet, "mmd_unbiased": frechet.mmd, "jedi": frechet.jedi}


def main():
    """Entry point."""
    run = open_run(FLAGS.workdir)
    path, is_tokenizer = Path(FLAGS.workdir, "evaluate.json"), run.config.task.name == "tokenizer"
    params = None
    if FLAGS.i3d:
        params = i3d.convert(weights.read(FLAGS.i3d, "--i3d"), f"--i3d={FLAGS.i3d}")
    for name in ("lpips", "frames"):
        if getattr(FLAGS, name) and not is_tokenizer:
            raise UserError(
                f"--{name}: is for tokenizers, and this is a run of task {run.config.task.name}; "
                "leave it out"
            )
    if FLAGS.lpips:
        run = with_lpips(run, FLAGS.lpips)
    videos = long_videos(run, FLAGS.frames) if FLAGS.frames else {}
    batches = FLAGS.batches or run.config.evaluate.batches
    with jax.set_mesh(run.mesh):
        scores, clips = score(run, batches)
        if is_tokenizer:
            # Under a name of its own what training reports: a mean over batches.
            for name in ("perplexity", "usage", "dead"):
                if name in scores:
                    scores[f"{name}_in_a_batch"] = scores.pop(name)
            scores |= codes(run, batches)
        print(f"{path.parent}, step {run.step}, {clips} held-out clips of {run.config.data.name}\n")
        print(report(scores))
        document = {"step": run.step, "clips": clips, **{k: _json(v) for k, v in scores.items()}}
        document["video_distance"] = lacking = _lacking(params, clips)
        # At once, and anew with what is added: these are there whatever becomes of the rest.
        _write(path, document)
        if is_tokenizer:
            document |= tokenizer_only(run, videos, batches * run.config.data.batch_size)
            _write(path, document)
        if lacking:
            print(f"fvd  {lacking}\n")
        else:
            document["video_distance"] = video_distance(run, batches, params, FLAGS.i3d)
            print(json.dumps(document["video_distance"], indent=2) + "\n")
            _write(path, document)
        write_pictures(run, path.parent)


def tokenizer_only(run, videos, clips):
    """What evaluate.json says of tokenizers alone, printed too: speed, LPIPS, quality by length."""
    found = {"speed": speed(run)}
    print("\n".join(f"{name}  {_cell(value)}" for name, value in found["speed"].items()) + "\n")
    if "lpips" in run.frozen:
        file = FLAGS.lpips or run.config.task.perceptual.lpips
        found["lpips_protocol"] = {
            "features": "VGG-16, linear heads of LPIPS 0.1",
            "weights_sha256": weights.digest(file),
        }
    else:
        found["lpips"] = "unavailable: no weights of LPIPS were given (--lpips)"
        print(f"lpips  {found['lpips']}\n")
    if videos:
        found["by_length"] = {
            str(frames): rebuild_long(run, source, frames, clips)
            for frames, source in videos.items()
        }
        names = ("clips", "psnr", "ssim")
        rows = [(frames, *(_cell(x[n]) for n in names)) for frames, x in found["by_length"].items()]
        print(_table(("frames", *names), rows) + "\n")
    return found


def with_lpips(run, path):
    """The run with the weights of LPIPS in a file in the place of those it was trained with."""
    params = lpips.convert(weights.read(path, "--lpips"), f"--lpips={path}")
    return run._replace(
        frozen={**run.frozen, "lpips": jax.device_put(params, replicated(run.mesh))}
    )


def long_videos(run, lengths):
    """{frames: source of held-out clips so long}; UserError where there are none, or none fit.

    lengths: numbers of frames as the command line has them.
    """
    found = {}
    for text in lengths:
        if not text.isdecimal() or len(text) > 9 or not 0 < int(text) <= LONGEST:
            raise UserError(
                f"--frames={text[:20]}: write numbers of frames, such as 17,65,257, up to {LONGEST}"
            )
        fields = ConfigDict(run.config.data.to_dict())
        fields.frames = int(text)
        try:
            run.task.tokenizer.latents_for_frames(fields.frames)
        except UserError as error:
            raise UserError(f"--frames={text}: {error}") from error
        try:
            found[fields.frames] = data.make_source(fields, "validation")
        except UserError as error:
            raise UserError(f"--frames={text}: no held-out clips so long ({error})") from error
    return found


def rebuild_long(run, source, frames, most):
    """PSNR and SSIM of the first `most` clips of a source, encoded and decoded as streams.

    {"clips", "frames_at_once", "psnr" and "ssim", means, and these "_by_frame"}. Clips pass one by
    one and in pieces. On the device are then one piece and the states of encoder and decoder; the
    pixels of a clip, one byte a colour, wait in host memory.
    """
    tokenizer = run.task.tokenizer
    grid, cuts = tokenizer.grid(run.config.data.size), pieces(tokenizer, frames)

    @jax.jit
    def through(params, video_u8, states):
        video_BTHWC = normalize(video_u8)
        z_BTNZ, encoder = tokenizer.encode(params, video_BTHWC, states[0])
        guess_BTHWC, decoder = tokenizer.decode(params, z_BTNZ, grid, states[1])
        pair = jnp.clip(guess_BTHWC, -1, 1), video_BTHWC
        return {"psnr": quality.psnr(*pair), "ssim": quality.ssim(*pair)}, (encoder, decoder)

    rows = []
    for index in range(min(len(source), most)):
        clip_BTHWC = source.read(index)["video"][None]
        states, found = (None, None), []
        for piece_BTHWC in np.split(clip_BTHWC, np.cumsum(cuts)[:-1], axis=1):
            piece_BTHWC = jax.device_put(piece_BTHWC, replicated(run.mesh))
            scores, states = through(run.params, piece_BTHWC, states)
            found.append(jax.device_get(scores))
        rows.append({name: np.concatenate([x[name][0] for x in found]) for name in found[0]})
    curves = {name: np.mean([row[name] for row in rows], axis=0) for name in rows[0]}
    return {
        "clips": len(rows),
        "frames_at_once": max(cuts),
        **{name: float(curve.mean()) for name, curve in curves.items()},
        **{f"{name}_by_frame": curve.tolist() for name, curve in curves.items()},
    }


def speed(run):
    """Tokens and frames per second of encoding and of decoding a batch of held-out clips.

    The median of REPEATS, after compilation, from pixels on the device to stored tokens, or latents
    where there are no codes, and back; with how many clips of what length at once, and on what.
    """
    tokenizer, size = run.task.tokenizer, run.config.data.size
    has_codes = hasattr(tokenizer.quantizer, "size")
    with contextlib.closing(_held_out(run)) as iterator:
        video_BTHWC = _place(next(iterator), run.mesh)["video"]

    @jax.jit
    def encode(params, video_u8):
        store = tokenizer.tokens if has_codes else tokenizer.encode
        return store(params, normalize(video_u8))[0]

    @jax.jit
    def decode(params, stored):
        z_BTNZ = tokenizer.lookup(params, stored) if has_codes else stored
        return tokenizer.decode(params, z_BTNZ, tokenizer.grid(size))[0]

    stored = encode(run.params, video_BTHWC)
    found = {}
    for name, function, argument in (("encode", encode, video_BTHWC), ("decode", decode, stored)):
        jax.block_until_ready(function(run.params, argument))
        times = []
        for _ in range(REPEATS):
            begin = time.perf_counter()
            jax.block_until_ready(function(run.params, argument))
            times.append(time.perf_counter() - begin)
        seconds = statistics.median(times)
        found[f"{name}_tokens_per_s"] = float(np.prod(stored.shape[:3]) / seconds)
        found[f"{name}_frames_per_s"] = float(np.prod(video_BTHWC.shape[:2]) / seconds)
    clips, frames = video_BTHWC.shape[:2]
    return {**found, "clips_at_once": clips, "frames_of_a_clip": frames, "device": device_name()}


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
    found |= {name: np.asarray(value) for name, value in whole.items()}
    return found | {"dead": found["dead"].astype(int)}


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
        rows = [
            # Blank where a metric is not defined, as a change is not at the first frame.
            (str(f), *("" if np.isnan(c[f]) else f"{c[f]:.3f}" for c in curves.values()))
            for f in frames
        ]
        rows.append(("mean", *(f"{_mean(curve):.3f}" for curve in curves.values())))
        parts.append(_table(("frame", *curves), rows))
        parts += [_verdict(name, curves) for name in curves if name + BASELINE in curves]
    parts += [f"{name}  {figure(value)}" for name, value in scores.items() if value.ndim == 0]
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
    floors = {}
    for name, distance in DISTANCES.items():
        draws = np.random.default_rng(run.config.seed)  # the same halves for all
        mean, spread = frechet.floor(real_ND, distance, draws, repeats)
        floors[name] = {"mean": mean, "std": spread}
    fields = run.config.data
    return {
        **{name: distance(real_ND, fake_ND) for name, distance in DISTANCES.items()},
        "real_against_real": {"clips": len(real_ND) // 2, **floors},
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


def _lacking(params, clips):
    """Why there is no distance of videos, "" where there is one."""
    if params is None:
        return "unavailable: no weights of I3D were given (--i3d)"
    if clips < frechet.FEWEST:
        return f"unavailable: needs at least {frechet.FEWEST} held-out clips, and here are {clips}"
    return ""


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


def _cell(value):
    return value if isinstance(value, str) else figure(value)


def _write(path, document):
    files.write(path, json.dumps(document, indent=2) + "\n")


def _json(value):
    """Nested lists for JSON, which has no NaN: what is not defined is null."""
    return json.loads(json.dumps(value.tolist()).replace("NaN", "null"))


if __name__ == "__main__":
    flags.DEFINE_string("workdir", None, "Folder of the run.", required=True)
    flags.DEFINE_integer(
        "batches", None, "Held-out batches. Default: evaluate.batches.", lower_bound=1
    )
    flags.DEFINE_string("i3d", None, "Weights of I3D, for FVD: .npz or .safetensors.")
    flags.DEFINE_string("lpips", None, "Weights of LPIPS (VGG-16), for tokenizers, likewise.")
    flags.DEFINE_list("frames", [], "Lengths of videos that a tokenizer rebuilds as streams.")
    config_lib.run(main)

"""Score a run on held-out clips: `python -m jaxvid.evaluate --workdir=DIR [--batches=N]`.

Uses the averaged weights of the newest checkpoint and the config of the run. For a model that
generates, prints the loss by noise level and the quality of continuations by frame, beside that of
guesses without a network, the strongest of them marked. On sprites it also prints what becomes of
the objects in continuations, and in how many samples without given frames the sprites keep colour
and shape, beside the share of held-out clips. For a tokenizer, prints the quality of
reconstructions by frame, the use of its codes and the speed of encoding and decoding. Writes
evaluate.json with these figures to the work folder, and evaluate.png and evaluate.mp4 with real
clips above the model's output.

--frames=17,65,257 reconstructs held-out videos of these lengths by a tokenizer. They pass as
streams in pieces, so device memory does not grow with the length. Prints the quality by length;
evaluate.json has it by frame.

--frames=16,64,256,1024 of a model that generates measures its drift: one stream continues --clips
held-out clips to the last length, and the last frames up to each length are scored beside the real
clips. Prints a table with the meaning of its columns, and writes evaluate_drift.png.

--gaps=2,4,8,16,32,64 of a run on clips that test memory (configs/recall.py) measures its recall.
--clips held-out clips are given up to the end of a gap of each length and continued. Prints how
many answers are right by gap, beside the real clips and chance.

A model of sprites with captions is also asked for the captions of held-out clips, without given
frames. Prints in how many samples colour, shape and direction are right, beside the real clips and
chance; --guidance=1,3,5 does so at each of these scales, all other figures have that of the run.

--story=51,101,151 of such a model makes --clips streams whose caption changes at these frames.
Prints how soon the new colour and shape are seen, and writes evaluate_story.png.

A masked transformer that was trained on conditions of pixels (task.mask.commit) also completes
held-out clips: PSNR of what it fills in, and the steps at the seams.

--i3d=FILE, the weights of I3D as .npz or .safetensors, adds FVD between real clips and the model's
output, with its protocol, and the same distance between halves of the real clips, which shows its
bias. --lpips=FILE adds LPIPS of reconstructions, with this file instead of the one of the training.
Without weights these scores are unavailable; nothing replaces them.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np
from absl import flags

from jaxvid import checks, cli, data, files, weights
from jaxvid.errors import UserError
from jaxvid.evaluators import (
    alignment,
    codec,
    drift,
    filling,
    fvd,
    recall,
    report,
    sprites,
    stories,
)
from jaxvid.evaluators.held_out import mean, open_held_out, strongest
from jaxvid.metrics import i3d
from jaxvid.runs import open_run, with_sampler
from jaxvid.tasks.base import Autoencoder, Generator
from jaxvid.training.log import figure

FLAGS = flags.FLAGS


def main():
    """Entry point."""
    run = open_run(FLAGS.workdir)
    path, is_autoencoder = Path(FLAGS.workdir, "evaluate.json"), isinstance(run.task, Autoencoder)
    is_generator, i3d_params = isinstance(run.task, Generator), None
    if FLAGS.i3d:
        checks.at_least("data.frames", run.config.data.frames, i3d.MIN_FRAMES)
        i3d_params = i3d.convert(weights.read(FLAGS.i3d, "--i3d"), f"--i3d={FLAGS.i3d}")
    for name, suits, whom in (
        ("lpips", is_autoencoder, "tokenizers"),
        ("frames", is_autoencoder or is_generator, "tokenizers and models that generate"),
        ("gaps", is_generator, "models that generate"),
    ):
        if getattr(FLAGS, name) and not suits:
            raise UserError(
                f"--{name}: is for {whom}, and this is a run of task {run.config.task.name}; "
                "leave it out"
            )
    if FLAGS.lpips:
        run = codec.with_lpips(run, FLAGS.lpips)
    videos = codec.long_videos(run, FLAGS.frames) if is_autoencoder else {}
    lengths = drift.check(run, FLAGS.frames, FLAGS.clips) if is_generator else []
    gaps = recall.check(run, FLAGS.gaps) if is_generator else []
    scales = alignment.check(run, FLAGS.guidance)
    switches = stories.check(run, FLAGS.story)
    by_scale = {scale: with_sampler(run, {"guidance": scale}) for scale in scales}
    batches = FLAGS.batches or run.config.evaluate.batches
    with jax.set_mesh(run.mesh), open_held_out(run) as clips:
        print("scoring the held-out clips", file=sys.stderr)
        rows = clips.scores(run.params, run.frozen, batches)
        count = len(next(iter(rows.values())))
        scores = {name: mean(values) for name, values in rows.items()}
        if is_autoencoder:
            scores["tokens_per_frame"] = codec.tokens_per_frame(run)
        print(f"{path.parent}, step {run.step}, {count} held-out clips of {run.config.data.name}\n")
        has_sprites = is_generator and run.config.data.name == "sprites"
        if has_sprites:
            print("looking for the objects in continuations", file=sys.stderr)
            of_objects = sprites.continuations(run, clips, batches)
            scores |= {name: mean(values) for name, values in of_objects.items()}
        print(report.tables(scores, run.task.baselines))
        document = {"step": run.step, "clips": count, **{k: _json(v) for k, v in scores.items()}}
        document["strongest_baselines"] = strongest(scores, run.task.baselines)
        document["video_distance"] = lacking = fvd.unavailable(i3d_params, count)
        # Written at once, and again with every addition: whatever fails later, these are kept.
        _write(path, document)
        if is_autoencoder:
            document |= codec_figures(run, clips, videos, batches * run.config.data.batch_size)
            _write(path, document)
        if has_sprites:
            document["steady_sprites"] = found = sprites.steady(run)
            print(
                f"clips whose sprites keep colour and shape  samples {found['samples']:.0%}  "
                f"data {found['data']:.0%}  ({found['clips']} clips each)\n"
            )
            _write(path, document)
        if by_scale:
            print("looking for the captions in samples", file=sys.stderr)
            document["alignment"] = found = alignment.measure(by_scale, clips, batches)
            print(alignment.table(found) + "\n")
            _write(path, document)
        if switches:
            print(f"telling stories of {stories.length(switches)} frames", file=sys.stderr)
            document["story"], told = stories.measure(run, clips, switches, FLAGS.clips)
            print(stories.table(document["story"]) + "\n")
            _write(path, document)
            stories.write_picture(told, path.with_name("evaluate_story.png"))
        if filling.suits(run):
            print("completing clips from some of their pixels", file=sys.stderr)
            document["filling"] = found = filling.measure(run, clips, batches)
            print(filling.table(found) + "\n")
            _write(path, document)
        if lacking:
            print(f"fvd  {lacking}\n")
        else:
            found = fvd.video_distance(run, clips, batches, i3d_params, FLAGS.i3d)
            document["video_distance"] = found
            print(json.dumps(found, indent=2) + "\n")
            _write(path, document)
        if lengths:
            print(f"continuing clips to {lengths[-1]} frames", file=sys.stderr)
            document["drift"] = found = drift.measure(run, lengths, FLAGS.clips)
            print(drift.table(found) + "\n")
            _write(path, document)
            drift.write_picture(found, path.with_name("evaluate_drift.png"))
        if gaps:
            print(f"continuing clips after gaps of up to {gaps[-1]} frames", file=sys.stderr)
            document["recall"] = found = recall.measure(run, gaps, FLAGS.clips)
            print(recall.table(found) + "\n")
            _write(path, document)
        report.write_pictures(run, path.parent)


def codec_figures(run, clips, videos, limit: int) -> dict:
    """Figures of a tokenizer alone, printed too: speed, LPIPS, quality by length of the video."""
    found = {"speed": codec.speed(run, clips)}
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
            str(frames): codec.reconstruct_long(run, source, frames, limit)
            for frames, source in videos.items()
        }
        names = ("clips", "psnr", "ssim")
        rows = [(frames, *(_cell(x[n]) for n in names)) for frames, x in found["by_length"].items()]
        print(report.table(("frames", *names), rows) + "\n")
    return found


def _cell(value) -> str:
    return value if isinstance(value, str) else figure(value)


def _write(path, document) -> None:
    files.write(path, json.dumps(document, indent=2) + "\n")


def _json(value: np.ndarray):
    """Nested lists for JSON, which has no NaN: null stands for it."""
    return json.loads(json.dumps(value.tolist()).replace("NaN", "null"))


if __name__ == "__main__":
    cli.define_path("workdir", "Folder of the run.", required=True)
    flags.DEFINE_integer(
        "batches", None, "Held-out batches. Default: evaluate.batches.", lower_bound=1
    )
    cli.define_path("i3d", "Weights of I3D, for FVD: .npz or .safetensors.")
    cli.define_path("lpips", "Weights of LPIPS (VGG-16), for tokenizers: likewise.")
    flags.DEFINE_list("frames", [], "Lengths of videos to reconstruct or to continue as streams.")
    flags.DEFINE_list("gaps", [], "Lengths of gaps, in frames, after which memory is tested.")
    flags.DEFINE_list("guidance", [], "Scales of guidance at which captions are scored.")
    flags.DEFINE_list("story", [], "Frames at which the caption of a stream changes.")
    flags.DEFINE_integer(
        "clips",
        8,
        "Clips that a model which generates continues or makes, for --frames, each of --gaps and "
        "--story.",
        lower_bound=1,
        upper_bound=data.MAX_CLIPS,
    )
    cli.run(main)

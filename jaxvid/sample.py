"""Sample videos from a run: `python -m jaxvid.sample --workdir=DIR --frames=64 --num=4`.

    [--first_frames=clip.mp4]                    continue a clip, at the rate of the run's data
    [--prompt="a red square moves left"] [--label=3]   what a conditional model should show
    [--schedule=ad --s=5 --steps=50 --guidance=1]      the frame schedule

Frames come out as a stream, each as soon as it is finished, from the averaged weights of the newest
checkpoint. Prints the latency to the first frame, the speed with and without decoding and the peak
memory, and leaves clips as mp4 and GIF with a contact sheet in --out.
"""

import itertools
import time
from pathlib import Path

import jax
import numpy as np
from absl import flags

from jaxvid import cli, data, memory
from jaxvid.data import text, video
from jaxvid.data.transforms import MAX_FRAMES, to_uint8
from jaxvid.errors import UserError, within
from jaxvid.parallel.devices import peak_bytes
from jaxvid.runs import open_run
from jaxvid.tasks.base import Generator
from jaxvid.training.writer import FPS, write_clips

FLAGS = flags.FLAGS
OVERRIDES = ("schedule", "s", "steps", "guidance")


def main():
    """Entry point."""
    overrides = {name: FLAGS[name].value for name in OVERRIDES if FLAGS[name].present}
    run = open_run(FLAGS.workdir, sampler=overrides)
    if not isinstance(run.task, Generator):
        raise UserError(
            f"workdir={FLAGS.workdir}: task {run.config.task.name} does not generate video; "
            "use python -m jaxvid.evaluate to score it"
        )
    out = Path(FLAGS.out or _new_folder(FLAGS.workdir, f"stream-{run.step:06d}-{FLAGS.seed}"))
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: is a file; name a folder")
    frames = FLAGS.frames or run.config.data.frames
    clip = 3 * frames * run.config.data.size**2
    memory.require(f"num={FLAGS.num}, frames={frames}", "clips", FLAGS.num * clip)
    cond, fps = conditions(run, FLAGS.num)
    given = cond["first_frames"].shape[1] if "first_frames" in cond else 0
    if given >= frames:
        raise UserError(
            f"frames={frames}: --first_frames already has {given}; ask for more than that"
        )
    run.task.split_frames(frames)  # raises for lengths that do not suit the tokenizer
    with jax.set_mesh(run.mesh), within("task"):
        begin = time.perf_counter()
        for _ in zip(range(2 if given else 1), decoded_frames(run, cond, frames)):
            pass  # compiles; the figures below exclude it
        compiling = time.perf_counter() - begin
        clips_BTHWC, times = timed(run, cond, frames)
    write_clips(out, clips_BTHWC, fps)
    print(report(times, compiling, FLAGS.num * (frames - given)))
    print(f"{len(clips_BTHWC)} clips of {clips_BTHWC.shape[1]} frames at {fps:g} fps: {out}")


def _new_folder(workdir, name) -> Path:
    """samples/<name> in the work folder, or the next of <name>-2, <name>-3 ... that is free."""
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    folders = (Path(workdir, "samples", name) for name in names)
    return next(folder for folder in folders if not folder.exists())


def conditions(run, num):
    """(`cond` of `Task.sample` from the flags, frames per second of the clips).

    First frames are read at the rate and stride of the run's data. Raises UserError for flags that
    do not suit the run.
    """
    cond, fields = {"num": num}, run.config.task.condition
    source, fps = run.config.data, data.clip_rate(run.config.data)
    for flag, kind in (("label", "class"), ("prompt", "text")):
        if FLAGS[flag].present and fields.kind != kind:
            raise UserError(
                f"{flag}={FLAGS[flag].value}: this run's condition is {fields.kind!r}, "
                f"not {kind!r}; leave --{flag} out"
            )
    if fields.kind == "class":
        if not 0 <= FLAGS.label < fields.num_classes:
            raise UserError(f"label={FLAGS.label}: use 0 to {fields.num_classes - 1}")
        cond["label"] = np.full(num, FLAGS.label, np.int32)
    if fields.kind == "text":
        embedded_ME = text.embed(FLAGS.prompt, fields.tokens, fields.width)
        cond["text"] = np.repeat(embedded_ME[None], num, axis=0)
    if FLAGS.first_frames:
        frames = FLAGS.num_first_frames or run.config.task.given
        clip_THWC, fps = video.read_clip(
            FLAGS.first_frames, frames, source.size, source.get("fps", 0.0), source.stride
        )
        cond["first_frames"] = np.repeat(clip_THWC[None], num, axis=0)
    return cond, fps or FPS


def decoded_frames(run, cond, frames):
    """Yield (uint8 video of the next frames, seconds for latents, seconds for decoding)."""
    rng = jax.random.key(FLAGS.seed)
    latents = run.task.stream(run.params, rng, cond, frozen=run.frozen, frames=frames)
    state, begin = None, time.perf_counter()
    for z_BTNC in latents:
        jax.block_until_ready(z_BTNC)
        ready = time.perf_counter()
        clip, state = run.task.decode(run.frozen, z_BTNC, state)
        clip = to_uint8(np.asarray(clip))
        decoded = time.perf_counter()
        yield clip, ready - begin, decoded - ready
        begin = time.perf_counter()


def timed(run, cond, frames):
    """(uint8 clips [B, F, H, W, 3], [(latent seconds, decoding seconds)] of each yield)."""
    clips, *seconds = zip(*decoded_frames(run, cond, frames))
    times = list(zip(*seconds))
    if "first_frames" in cond:
        # Reading the given frames counts as latency of the first new one.
        (read, shown), (latent, decode), *rest = times
        times = [(read + latent, shown + decode), *rest]
    return np.concatenate(clips, axis=1), times


def report(times, compiling, frames):
    """The figures of a stream, one line each."""
    latent, decode = (sum(column) for column in zip(*times))
    peak = peak_bytes(jax.local_devices()[0])
    return "\n".join(
        [
            f"compiled, with a first piece   {compiling:8.2f} s",
            f"latency to the first frame     {sum(times[0]):8.2f} s",
            f"speed with decoding            {frames / (latent + decode):8.2f} frames/s",
            f"speed without decoding         {frames / latent:8.2f} frames/s",
            f"peak memory                    {peak / 2**20:8.0f} MiB",
        ]
    )


if __name__ == "__main__":
    cli.define_path("workdir", "Folder of the run.", required=True)
    flags.DEFINE_integer(
        "frames",
        None,
        "Frames of a clip. Default: as trained.",
        lower_bound=1,
        upper_bound=MAX_FRAMES,
    )
    flags.DEFINE_integer("num", 4, "Clips.", lower_bound=1, upper_bound=data.MAX_CLIPS)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    cli.define_path("first_frames", "Video file whose frames begin the clips.")
    flags.DEFINE_integer(
        "num_first_frames", None, "Frames read from it. Default: task.given.", lower_bound=1
    )
    flags.DEFINE_integer("label", 0, "Class to show.")
    flags.DEFINE_string("prompt", "", "Caption to show.")
    flags.DEFINE_string("schedule", None, "Overrides task.sampler.schedule.")
    flags.DEFINE_float("s", None, "Overrides task.sampler.s.")
    flags.DEFINE_integer("steps", None, "Overrides task.sampler.steps.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Overrides task.sampler.guidance.")
    cli.define_path("out", "Folder of the clips. Default: samples/ of the run.")
    cli.run(main)

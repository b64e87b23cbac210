"""Sample videos from a run: `python -m jaxvid.sample --workdir=DIR --frames=64 --num=4`.

    [--first_frames=clip.mp4]                    continue a clip, at the rate of the run's data
    [--first_frames=picture.png]                 animate an image
    [--prompt="a red square moves left"] [--label=3]   what a conditional model should show
    [--story=story.txt]                          prompts that change along the video
    [--negative_prompt="a blue circle"]          what guidance leads away from
    [--fill=inpaint_central --first_frames=clip.mp4]   complete a clip from some of its pixels
    [--schedule=ad --s=5 --steps=50 --guidance=1]      the frame schedule
    [--history_guidance=1.5]                     follow the frames so far more closely
    [--resume]                                   go on with a stream that was stopped, or prolong it

Frames come out as a stream, each as soon as it is finished, from the averaged weights of the newest
checkpoint, and go to disk as they come: neither memory nor the time of a frame grows, so --frames
may be any number. Ctrl-C and SIGTERM save the stream after the next frame and exit with status 0; a
second Ctrl-C stops at once. Prints the latency to the first frame, the speed with and without
decoding and the peak memory, and leaves clips as mp4, and the first frames as GIF and contact
sheet, in --out.
"""

import itertools
import re
import sys
import time
from pathlib import Path
from types import MappingProxyType

import jax
import numpy as np
from absl import flags

from jaxvid import checks, cli, data, prompts
from jaxvid.data import story, video
from jaxvid.data.transforms import to_uint8
from jaxvid.errors import UserError, within
from jaxvid.evaluators import filling
from jaxvid.layers import masks
from jaxvid.masking import commit
from jaxvid.parallel.devices import peak_bytes
from jaxvid.runs import open_run, weights_digest
from jaxvid.tasks.base import Generator
from jaxvid.tasks.streaming import Decoded, shown
from jaxvid.training import interrupt
from jaxvid.training.lock import locked
from jaxvid.training.recorder import STATE, Recorder
from jaxvid.training.writer import FPS

FLAGS = flags.FLAGS
OVERRIDES = ("schedule", "s", "steps", "guidance")
HISTORY = ("guidance", "level", "window")
SAVE_EVERY = 256  # frames


def main():
    """Entry point."""
    overrides = {name: FLAGS[name].value for name in OVERRIDES if FLAGS[name].present}
    history = {name: FLAGS[f"history_{name}"] for name in HISTORY}
    history = {name: flag.value for name, flag in history.items() if flag.present}
    if history:
        overrides["history"] = history
    run = open_run(FLAGS.workdir, sampler=overrides)
    if not isinstance(run.task, Generator):
        raise UserError(
            f"workdir={FLAGS.workdir}: task {run.config.task.name} does not generate video; "
            "use python -m jaxvid.evaluate to score it"
        )
    out = _folder(run)
    if FLAGS.fill:
        fill(run, out)
        return
    frames = FLAGS.frames or run.config.data.frames
    lines = lines_of(run)
    cond, fps = conditions(run, FLAGS.num, lines)
    given = cond["first_frames"].shape[1] if "first_frames" in cond else 0
    if given >= frames:
        raise UserError(
            f"frames={frames}: --first_frames already has {given}; ask for more than that"
        )
    run.task.split_frames(frames)  # raises for lengths that do not suit the tokenizer
    switches = switches_of(run, lines, given, frames)
    checks.writable("out", out)
    recorder = Recorder(out, fps, made_with(run, cond, lines))
    with locked(out, "out"):
        _sample(run, cond, frames, given, recorder, switches)
    if recorder.frames < frames:
        saved = f"{recorder.frames} of {frames} frames are saved"
        print(f"{out}: stopped; {saved}, the same command with --resume goes on from there")
    else:
        print(f"{FLAGS.num} clips of {frames} frames at {fps:g} fps: {out}")


def fill(run, out):
    """Complete the clip of --first_frames from the pixels that --fill knows, and write it to out.

    Raises UserError for a run that cannot, and for flags that mean nothing then.
    """
    if not filling.suits(run):
        raise UserError(
            f"fill={FLAGS.fill}: this run had no conditions of pixels; train one with "
            "--config=configs/masked_transformer.py and task.mask.commit=0.5"
        )
    for name in ("resume", "story", "frames", "num_first_frames"):
        if FLAGS[name].present:
            raise UserError(
                f"{name}={FLAGS[name].value}: --fill completes a whole clip; leave it out"
            )
    if not FLAGS.first_frames:
        raise UserError(f"fill={FLAGS.fill}: of which clip? Give --first_frames too")
    cond, fps = conditions(run, FLAGS.num, lines_of(run), frames=run.config.data.frames)
    cond["video"] = cond.pop("first_frames")
    checks.writable("out", out)
    _require_no_stream(Path(out))
    with locked(out, "out"), jax.set_mesh(run.mesh), within("task"):
        rng = jax.random.key(FLAGS.seed)
        video_BTHWC = run.task.fill(run.params, rng, cond, FLAGS.fill, frozen=run.frozen)
        recorder = Recorder(out, fps, {"fill": FLAGS.fill})
        recorder.write(to_uint8(np.asarray(video_BTHWC)))
        recorder.save(None)
        recorder.finish(FLAGS.num)
    print(f"{FLAGS.num} clips, completed by {FLAGS.fill}: {out}")


def _require_no_stream(folder):
    """Raise UserError where writing would replace a stream that could go on."""
    if (folder / STATE).exists():
        raise UserError(
            f"out={folder}: holds a stream; go on with --resume, or name another folder"
        )


def _sample(run, cond, frames, given, recorder, switches=MappingProxyType({})):
    """Sample into the recorder's folder and print the figures of the stream, if it is whole."""
    if FLAGS.resume:
        recorder.resume()
        if recorder.frames > frames:
            has = f"{recorder.folder} has {recorder.frames} already"
            raise UserError(f"frames={frames}: {has}; ask for more")
        if recorder.frames == frames:  # all that a stop prevented
            recorder.finish(FLAGS.num)
            return
    else:
        _require_no_stream(recorder.folder)
    with jax.set_mesh(run.mesh):
        compiling = time.perf_counter()
        print("compiling", file=sys.stderr)
        with within("task"):
            first = Decoded(run, cond, frames, jax.random.key(FLAGS.seed))
            for _ in itertools.islice(first, 2 if given else 1):
                pass  # the figures below exclude it
            if switches:
                first.switch({})
            pieces = Decoded(run, cond, frames, jax.random.key(FLAGS.seed), switches)
        compiling = time.perf_counter() - compiling
        if FLAGS.resume:
            pieces.restore(recorder.restored(first.state()), recorder.frames)
        with interrupt.stops() as stop:
            times = record(pieces, recorder, frames, given, stop)
    if recorder.frames == frames:
        recorder.finish(FLAGS.num)
        print(report(times, compiling, FLAGS.num))


def _folder(run) -> Path:
    """--out, or a new folder in samples/ of the run, or with --resume the newest one there."""
    if FLAGS.out:
        if Path(FLAGS.out).exists() and not Path(FLAGS.out).is_dir():
            raise UserError(f"out={FLAGS.out}: is a file; name a folder")
        return Path(FLAGS.out)
    parent, name = Path(FLAGS.workdir, "samples"), f"stream-{run.step}-{FLAGS.seed}"
    folders = [folder for folder in parent.glob(f"{name}*") if (folder / STATE).exists()]
    numbered = re.compile(rf"{name}(-\d+)?")
    folders = [folder for folder in folders if numbered.fullmatch(folder.name)]
    if FLAGS.resume and folders:
        return max(folders, key=lambda folder: (folder / STATE).stat().st_mtime)
    names = itertools.chain([name], (f"{name}-{number}" for number in itertools.count(2)))
    return next(folder for folder in map(parent.joinpath, names) if not folder.exists())


def made_with(run, cond, lines) -> dict:
    """What the frames of a stream are a function of, as JSON; the names are those of flags."""
    fields = run.config.task.sampler
    history = fields.get("history", {})  # runs of earlier versions have none
    history = history if history.get("guidance", 1) != 1 else {}
    first = {name: cond[name] for name in ("first_frames",) if name in cond}
    return {
        "checkpoint": run.step,
        "weights": weights_digest({}, run.params),
        "seed": FLAGS.seed,
        "num": FLAGS.num,
        "label": FLAGS.label,
        "prompt": lines[0].prompt,
        "story": [[line.frame, line.prompt] for line in lines[1:]],
        **({"negative_prompt": FLAGS.negative_prompt} if FLAGS.negative_prompt else {}),
        "first_frames": weights_digest({}, first) if first else "",
        **{name: fields[name] for name in OVERRIDES if name in fields},
        **{f"history_{name}": value for name, value in history.items()},
    }


def lines_of(run) -> list[story.Line]:
    """The lines of --story, or one line with --prompt. Raises UserError."""
    if not FLAGS.story:
        return [story.Line(0, FLAGS.prompt or "", "prompt")]
    if FLAGS["prompt"].present:
        raise UserError(f"prompt={FLAGS.prompt}: --story has the prompts; leave one of them out")
    kind = run.config.task.condition.kind
    if kind != "text":
        raise UserError(
            f"story={FLAGS.story}: this run's condition is {kind!r}, not 'text'; leave --story out"
        )
    return story.read(FLAGS.story)


def switches_of(run, lines, given, frames) -> dict[int, dict]:
    """{frame: conditions} of all prompts but the first one, as `Decoded` takes them.

    Raises UserError for a frame at which the stream cannot change its prompt.
    """
    found = {}
    for line in lines[1:]:
        if line.frame >= frames:
            raise UserError(
                f"{line.place}: begins at frame {line.frame}, but the clips have {frames} frames; "
                "ask for more --frames, or leave it out"
            )
        if line.frame <= given:
            raise UserError(
                f"{line.place}: begins at frame {line.frame}, but --first_frames has {given}, so "
                f"no frame would follow the prompt before; begin after frame {given}"
            )
        try:
            run.task.check_switch(line.frame, given=given, frames=frames)
        except UserError as error:
            raise UserError(f"{line.place}: {error}") from error
        found[line.frame] = {"text": embedded(run, line.prompt, FLAGS.num)}
    return found


def embedded(run, prompt, num, field="prompt"):
    """[num, ...]: a prompt, of the flag `field`, as the "text" of a batch of the run's data."""
    return np.repeat(prompts.read(run.config.data, [prompt], field), num, axis=0)


def conditions(run, num, lines, frames=None):
    """(`cond` of `Task.sample` from the flags, frames per second of the clips).

    lines: see `lines_of`; the stream begins with the first one. First frames, `frames` or as many
    as the flags say, are read at the rate and stride of the run's data. Raises UserError for flags
    that do not suit the run.
    """
    cond, fields = {"num": num}, run.config.task.condition
    source, fps = run.config.data, data.clip_rate(run.config.data)
    for flag, kind in (("label", "class"), ("prompt", "text"), ("negative_prompt", "text")):
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
        cond["text"] = embedded(run, lines[0].prompt, num)
    if FLAGS.negative_prompt:
        if run.config.task.sampler.guidance == 1:
            raise UserError(
                f"negative_prompt={FLAGS.negative_prompt}: guidance leads away from it, and there "
                "is none; add --guidance=3, or leave it out"
            )
        cond["negative_text"] = embedded(run, FLAGS.negative_prompt, num, "negative_prompt")
    if FLAGS.num_first_frames and not FLAGS.first_frames:
        raise UserError(
            f"num_first_frames={FLAGS.num_first_frames}: of which clip? Give --first_frames too"
        )
    if FLAGS.first_frames and Path(FLAGS.first_frames).suffix.lower() in video.IMAGES:
        if FLAGS.num_first_frames not in (None, 1):
            raise UserError(
                f"num_first_frames={FLAGS.num_first_frames}: {FLAGS.first_frames} is an image and "
                "has one; leave it out"
            )
        clip_THWC = video.read_image(FLAGS.first_frames, source.size)
        cond["first_frames"] = np.repeat(clip_THWC[None], num, axis=0)
    elif FLAGS.first_frames:
        frames = frames or FLAGS.num_first_frames or run.config.task.given
        clip_THWC, fps = video.read_clip(
            FLAGS.first_frames, frames, source.size, source.get("fps", 0.0), source.stride
        )
        cond["first_frames"] = np.repeat(clip_THWC[None], num, axis=0)
    return cond, fps or FPS


def record(pieces, recorder, frames, given, stop):
    """Write the pieces of a stream, the last one when the event `stop` is set, and save.

    Returns [(new frames, latent seconds, decoding seconds)] of each.
    """
    times, saved = [], recorder.frames
    for clip_BTHWC, *seconds in shown(pieces, frames, done=saved):
        is_given = recorder.frames < given
        recorder.write(clip_BTHWC)
        times.append((0 if is_given else clip_BTHWC.shape[1], *seconds))
        if recorder.frames - saved >= SAVE_EVERY:
            recorder.save(pieces.state())
            saved = recorder.frames
        if stop.is_set():
            break
    recorder.save(pieces.state())
    return times


def report(times, compiling, clips):
    """The figures of a stream, one line each. times: see `record`."""
    counts, latent, decode = (np.array(column) for column in zip(*times))
    latency = (latent + decode)[: counts.argmax() + 1].sum()  # given frames are read before
    frames, peak = clips * counts.sum(), peak_bytes(jax.local_devices()[0])
    return "\n".join(
        [
            f"compiled, with a first piece   {compiling:8.2f} s",
            f"latency to the first frame     {latency:8.2f} s",
            f"speed with decoding            {frames / (latent + decode).sum():8.2f} frames/s",
            f"speed without decoding         {frames / latent.sum():8.2f} frames/s",
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
        upper_bound=masks.NOISY - 1,
    )
    flags.DEFINE_integer("num", 4, "Clips.", lower_bound=1, upper_bound=data.MAX_CLIPS)
    flags.DEFINE_integer("seed", 0, "Seed of the noise.", lower_bound=0, upper_bound=2**32 - 1)
    cli.define_path("first_frames", "Video file or image (png, jpg) that begins the clips.")
    flags.DEFINE_integer(
        "num_first_frames", None, "Frames read from it. Default: task.given.", lower_bound=1
    )
    flags.DEFINE_integer("label", 0, "Class to show.")
    flags.DEFINE_string("prompt", "", "Caption to show.")
    cli.define_path("story", "Text file of lines `first_frame: prompt`, instead of --prompt.")
    flags.DEFINE_string(
        "negative_prompt", "", "Caption that guidance leads away from. Default: that of no words."
    )
    flags.DEFINE_enum("fill", None, commit.KINDS, "Pixels that are known of --first_frames.")
    flags.DEFINE_string("schedule", None, "Overrides task.sampler.schedule.")
    flags.DEFINE_float("s", None, "Overrides task.sampler.s.")
    flags.DEFINE_integer("steps", None, "Overrides task.sampler.steps.", lower_bound=1)
    flags.DEFINE_float("guidance", None, "Overrides task.sampler.guidance.")
    flags.DEFINE_float("history_guidance", None, "Overrides task.sampler.history.guidance.")
    flags.DEFINE_float("history_level", None, "Overrides task.sampler.history.level.")
    flags.DEFINE_integer("history_window", None, "Overrides task.sampler.history.window.")
    cli.define_path("out", "Folder of the clips. Default: a new one in samples/ of the run.")
    flags.DEFINE_bool("resume", False, "Go on with the stream in --out, or the newest of the run.")
    cli.run(main)

"""Turn a directory of videos into a data set that is fast to train on.

    python -m jaxvid.prepare --src=DIR --out=DIR --size=128 --frames=16 --fps=8

Each clip is resampled by its timestamps, scaled, cropped to a square and cut into chunks of
--frames frames. No chunk spans a gap in the timestamps or a picture that is shown for more than two
seconds; clips that are cut there are counted and named. One field of interlaced video is used. A
chunk is one H.264 group of pictures and one record. The directories directly below --src are the
classes; a tenth of the scenes goes to validation, always by clip and never by window. Files that
cannot be used, for whatever reason, are skipped, counted and named, here and in dataset.json. The
set appears at --out only when it is complete; the same command resumes one that was interrupted or
failed. Files from anywhere are safe to decode: it happens in processes of bounded memory.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
import sys

from absl import flags

from jaxvid import checks
from jaxvid.data import clips, progress, shards
from jaxvid.data.journal import JOURNAL, Journal
from jaxvid.data.processes import in_processes
from jaxvid.data.source import SPLITS
from jaxvid.errors import UserError, printable

FLAGS = flags.FLAGS
MAX_WORKERS = 1024


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Chunks of `frames` frames of `size` pixels; an fps of 0 keeps the rate of the source."""

    size: int
    frames: int
    fps: float

    def __post_init__(self):
        clips.check_cut(self.size, self.frames, self.fps)
        checks.require(self.size % 2 == 0, "size", self.size, "H.264 needs an even number; use one")


def main():
    """Entry point."""
    recipe = Recipe(FLAGS.size, FLAGS.frames, FLAGS.fps)
    manifest = prepare(FLAGS.src, FLAGS.out, recipe, FLAGS.workers)
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['clips']} clips, {part['records']} records")
    for done in ("cut", "skipped"):
        if manifest[done]:
            print(f"{done} {len(manifest[done])} files:")
        for entry in manifest[done]:
            print(printable(f"  {entry['name']} {entry['reason']}"))


def prepare(src: str, out: str, recipe: Recipe, workers: int) -> dict:
    """Write the data set of the videos below `src` to `out` -> its manifest. Raises UserError."""
    checks.at_least("workers", workers, 1, at_most=MAX_WORKERS)
    with shards.writing(out):
        out, partial = shards.reserve(out)
        names = clips.find(src, "src")  # before any change on disk
        manifest = _write_set(str(src), names, partial, recipe, workers)
        partial.rename(out)
        (out / JOURNAL).unlink()
    return manifest


def _write_set(src, names, folder, recipe, workers):
    """Write the chunks of all clips to `folder`, from where its journal ends -> the manifest."""
    classes, splits = clips.classes_of(names), clips.Splits(names)
    journal = Journal(folder, {"src": src, **dataclasses.asdict(recipe)}, splits.order)
    if journal.done:
        print(journal.resuming("clips"), file=sys.stderr)
    writers = {split: shards.Shards(folder, split, journal.records[split]) for split in SPLITS}
    used = dict.fromkeys(SPLITS, 0)
    for name in journal.used():
        used[splits.assign(name)] += 1
    left = splits.order[journal.done :]
    outcomes = in_processes(functools.partial(clips.cut, src, recipe), left, workers)
    for name, outcome in _saved(progress.shown(outcomes, len(left)), journal, writers):
        if isinstance(outcome, str):
            journal.skipped.append((name, outcome))
            continue
        parts, chunks = outcome
        if clips.cuts_in(parts):
            journal.cut.append((name, clips.cuts_in(parts)))
        split = splits.assign(name)
        used[split] += 1
        label = classes.index(clips.class_of(name)) if classes else 0
        for number, chunk in enumerate(chunks):
            header = {"name": name, "chunk": number, "label": label}
            writers[split].write(shards.pack(header, chunk))
    try:
        if len(journal.skipped) == len(names):
            report = clips.report(journal.skipped, len(names))
            raise UserError(f"src={src}: {report}; give readable videos")
        shards.refuse_empty(src, used)
    except UserError:
        shutil.rmtree(folder)  # nothing to go on from: other videos make another set
        raise
    parts = {split: {"clips": used[split], **writers[split].finish()} for split in SPLITS}
    fields = {**dataclasses.asdict(recipe), "classes": classes}
    return shards.write_manifest(folder, "h264", fields, parts, journal.skipped, journal.cut)


def _saved(outcomes, journal, writers):
    """Pass outcomes through and save the progress between them, also if the next one fails."""
    outcomes, done = iter(outcomes), journal.done
    while True:
        try:
            outcome = next(outcomes)
        except StopIteration:
            journal.save(done, 0, writers, always=True)
            return
        except BaseException:
            with contextlib.suppress(OSError):
                journal.save(done, 0, writers, always=True)
            raise
        yield outcome
        done += 1
        journal.save(done, 0, writers)


if __name__ == "__main__":
    # Imported here, because it imports jax; each decoding process imports the module above.
    from jaxvid import cli

    cli.define_path("src", "Directory of videos.", required=True)
    cli.define_path("out", "Directory of the new data set.", required=True)
    flags.DEFINE_integer("size", 128, "Pixels along each side.")
    flags.DEFINE_integer("frames", 16, "Frames of a chunk.")
    flags.DEFINE_float("fps", 8.0, "Frames per second; 0 keeps the rate of the source.")
    flags.DEFINE_integer("workers", os.cpu_count(), "Decoding processes.")
    cli.run(main)

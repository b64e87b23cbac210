"""Turn a directory of videos into a data set that is fast to train on.

    python -m jaxvid.prepare --src=DIR --out=DIR --size=128 --frames=16 --fps=8

Each clip is resampled by its timestamps, scaled, cropped to a square and cut into chunks of
--frames frames. No chunk spans a gap in the timestamps or a picture that is shown for more than two
seconds; clips that are cut there are counted and named. One field of interlaced video is used. A
chunk is one H.264 group of pictures and one record. The directories directly below --src are the
classes; a tenth of the scenes goes to validation, always by clip and never by window. Files that
cannot be used are skipped, counted and named, here and in dataset.json. The set appears at --out
only when it is complete; a killed run leaves nothing that looks complete. Files from anywhere are
safe to decode: it happens in processes of bounded memory.
"""

import dataclasses
import functools
import os
import shutil

from absl import flags

from jaxvid import checks
from jaxvid.data import clips, shards
from jaxvid.data.processes import in_processes
from jaxvid.data.source import SPLITS
from jaxvid.errors import UserError

FLAGS = flags.FLAGS


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
    if manifest["skipped"]:
        print(f"skipped {len(manifest['skipped'])} files:")
    for entry in manifest["skipped"]:
        print(f"  {clips.printable(entry['name'])} {entry['reason']}")


def prepare(src: str, out: str, recipe: Recipe, workers: int) -> dict:
    """Write the data set of the videos below `src` to `out` -> its manifest. Raises UserError."""
    checks.at_least("workers", workers, 1)
    with shards.writing(out):
        out, partial = shards.reserve(out)
        names = clips.find(src, "src")  # before any change on disk
        shards.clear(partial)
        partial.mkdir(parents=True)
        try:
            manifest = _write_set(src, names, partial, recipe, workers)
            partial.rename(out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return manifest


def _write_set(src, names, folder, recipe, workers):
    """Write the chunks of all clips and the manifest to `folder` -> the manifest."""
    classes, splits = clips.classes_of(names), clips.Splits(names)
    writers = {split: shards.Shards(folder, split) for split in SPLITS}
    used = dict.fromkeys(SPLITS, 0)
    skipped, cut = [], []
    outcomes = in_processes(functools.partial(clips.cut, str(src), recipe), splits.order, workers)
    for name, outcome in shards.progress(outcomes, len(names)):
        if isinstance(outcome, str):
            skipped.append((name, outcome))
            continue
        split = splits.assign(name)
        used[split] += 1
        label = classes.index(clips.class_of(name)) if classes else 0
        parts, chunks = outcome
        if clips.cuts_in(parts):
            cut.append((name, clips.cuts_in(parts)))
        for number, chunk in enumerate(chunks):
            header = {"name": name, "chunk": number, "label": label}
            writers[split].write(shards.pack(header, chunk))
    if len(skipped) == len(names):
        raise UserError(f"src={src}: {clips.report(skipped, len(names))}; give readable videos")
    shards.refuse_empty(src, used)
    parts = {split: {"clips": used[split], **writers[split].finish()} for split in SPLITS}
    fields = {**dataclasses.asdict(recipe), "classes": classes}
    return shards.write_manifest(folder, "h264", fields, parts, skipped, cut)


if __name__ == "__main__":
    # Imported here, because it imports jax; each decoding process imports the module above.
    from jaxvid import cli

    flags.DEFINE_string("src", None, "Directory of videos.", required=True)
    flags.DEFINE_string("out", None, "Directory of the new data set.", required=True)
    flags.DEFINE_integer("size", 128, "Pixels along each side.")
    flags.DEFINE_integer("frames", 16, "Frames of a chunk.")
    flags.DEFINE_float("fps", 8.0, "Frames per second; 0 keeps the rate of the source.")
    flags.DEFINE_integer("workers", os.cpu_count(), "Decoding processes.")
    cli.run(main)

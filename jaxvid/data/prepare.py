"""Turn a directory of videos into a set that trains at full speed.

    python -m jaxvid.data.prepare --src DIR --out DIR --size 128 --frames 16 --fps 8

Every clip is resampled by its timestamps, scaled, cropped to a square and cut into chunks of
--frames frames, each one H.264 group of pictures and one record. Directories below --src are the
classes; a tenth of the scenes goes to validation, by clip and never by window. Files that cannot
be used are skipped, counted and named, here and in dataset.json. The set appears in one stroke
at the end: a run that is killed leaves nothing that looks complete. Decoding, of files that
nobody has vetted, happens in processes of bounded memory.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import dataclasses
import functools
import hashlib
import json
import multiprocessing
import os
import pathlib
import re
import resource
import shutil
import signal
import sys
import time

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from jaxvid.data import array_record, clips, video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError

SHARD_BYTES = 2**28
WORKER_BYTES = 2**33  # of address space
# Files in the folder where a set grows.
_OWN = re.compile(r"(train|validation)-\d{5}.*|(dataset|journal)\.json(\.tmp\d+)?")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What to make of a clip; an fps of 0 keeps the rate of the source."""

    size: int
    frames: int
    fps: float

    def __post_init__(self):
        if self.size < 2 or self.size % 2:
            raise UserError(f"--size={self.size}: H.264 needs an even number of pixels")
        if self.frames < 1:
            raise UserError(f"--frames={self.frames}: must be at least 1")
        if not 0 <= self.fps <= 1000:
            raise UserError(f"--fps={self.fps:g}: must lie in [0, 1000]; 0 keeps the source's rate")


def cut(root, recipe, name):
    """A clip -> its chunks, [bytes, ...], or the reason, a str, why there are none."""
    window = Window(recipe.frames, recipe.size)
    chunks, held = [], []

    def take(picture_HWC):
        nonlocal held
        held.append(picture_HWC)
        if len(held) == recipe.frames:
            chunks.append(video.encode_chunk(window.augment(np.stack(held), None)))
            held = []

    seen = walk(root, recipe, name, take)
    return seen if isinstance(seen, str) else chunks


def walk(root, recipe, name, take=lambda picture_HWC: None):
    """Give `take` all pictures of a clip -> their number, or a str, why the clip is of no use.

    recipe: an object with size, frames and fps. A file that breaks off is of no use either.
    """
    frames = 0
    try:
        with open(os.path.join(root, name), "rb") as file:
            for picture_HWC in video.resample(file, recipe.size, recipe.fps):
                take(picture_HWC)
                frames += 1
    except video.VideoError as error:
        return str(error)
    except OSError as error:
        return f"cannot be opened ({error.strerror})"
    except MemoryError:
        return "needs too much memory"
    if frames < recipe.frames:
        at = f" at {recipe.fps:g} per second" if recipe.fps else ""
        return f"has {frames} frames{at}, {recipe.frames} are needed"
    return frames


def _begin():
    # Ctrl-C reaches all processes of a terminal, and what it means is said by one.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (WORKER_BYTES, hard))


def _pool(workers):
    # Spawned: a fork of a process with threads can hang.
    context = multiprocessing.get_context("spawn")
    return concurrent.futures.ProcessPoolExecutor(workers, context, _begin)


def in_processes(work, names, workers):
    """(name, work(name)) in order; a file that brings its process down yields a reason instead."""
    waiting = collections.deque(names)
    while waiting:
        running = collections.deque()
        try:
            with _pool(workers) as pool:
                while waiting or running:
                    while waiting and len(running) < 2 * workers:
                        running.append((waiting[0], pool.submit(work, waiting.popleft())))
                    outcome = running[0][1].result()
                    yield running.popleft()[0], outcome
        except concurrent.futures.process.BrokenProcessPool:
            # One of those running is to blame, and each alone shows which.
            for name, _ in running:
                yield name, _alone(work, name)


def _alone(work, name):
    try:
        with _pool(1) as pool:
            return pool.submit(work, name).result()
    except concurrent.futures.process.BrokenProcessPool:
        return "brings the decoder down"


@contextlib.contextmanager
def _as_os_error():
    """The writer reports a full disk and its like as a RuntimeError."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class Shards:
    """The ArrayRecord files of one split, begun anew when they reach SHARD_BYTES.

    records: the number in each file, of those that an earlier process has closed at first.
    """

    def __init__(self, folder, split, records=()):
        self._folder, self._split = folder, split
        self._writer, self.size = None, 0
        self.records = list(records)

    def write(self, record):
        if self._writer is None or self.size >= SHARD_BYTES:
            self.close()
            self.records.append(0)
            # Random access reads groups, and neither H.264 nor latents compress further.
            path = self._folder / f"{self._split}-{len(self.records) - 1:05d}"
            self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        with _as_os_error():
            self._writer.write(record)
        self.size += len(record)
        self.records[-1] += 1

    def close(self):
        """Make the file that is being written whole; the next record begins another."""
        if self._writer is not None:
            with _as_os_error():
                self._writer.close()
            self._writer, self.size = None, 0

    def finish(self):
        """Close, name the files by their number, and return what the manifest says of them."""
        self.close()
        shards = []
        for number, records in enumerate(self.records):
            stem = f"{self._split}-{number:05d}"
            name = f"{stem}-of-{len(self.records):05d}.array_record"
            path = self._folder / name
            if not path.exists():  # a process may have been killed in this loop
                (self._folder / stem).rename(path)
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            size = path.stat().st_size
            shards.append({"file": name, "records": records, "bytes": size, "sha256": digest})
        return shards


def progress(outcomes, total, unit="clips"):
    """Pass (name, outcome) pairs through, drawing a bar on stderr: in place on a terminal."""
    begin = shown = time.monotonic()
    skipped = 0
    for done, (name, outcome) in enumerate(outcomes, 1):
        yield name, outcome
        skipped += isinstance(outcome, str)
        now = time.monotonic()
        if done == total or now - shown > (0.2 if sys.stderr.isatty() else 10.0):
            shown = now
            left = round((now - begin) / done * (total - done))
            bar = "#" * (30 * done // total)
            line = f"[{bar:<30}] {done}/{total} {unit}, {skipped} skipped, {left} s left"
            end = "\r" if sys.stderr.isatty() and done < total else "\n"
            print(f"{line:<75}", end=end, file=sys.stderr, flush=True)


def refuse_empty(src, numbers):
    """UserError where a split holds nothing, {split: number of clips}: nothing trains on that."""
    for split, number in numbers.items():
        if not number:
            raise UserError(
                f"--src={src}: gives no clips for {split}; add videos of other scenes, readable "
                "and long enough (names that differ only in a final _c<number> are one scene)"
            )


def write_set(root, folder, recipe, workers):
    """Cut every clip below `root` into `folder`; returns the manifest, which it also writes."""
    names = clips.find(root, "--src")
    classes, splits = clips.classes_of(names), clips.Splits(names)
    shards = {split: Shards(folder, split) for split in ("train", "validation")}
    clip_count = dict.fromkeys(shards, 0)
    skipped = []
    work = functools.partial(cut, str(root), recipe)
    for name, outcome in progress(in_processes(work, splits.order, workers), len(names)):
        if isinstance(outcome, str):
            skipped.append((name, outcome))
            continue
        split = splits.take(name)
        clip_count[split] += 1
        label = classes.index(clips.class_of(name)) if classes else 0
        for number, chunk in enumerate(outcome):
            header = {"name": name, "chunk": number, "label": label}
            shards[split].write(array_record.pack(header, chunk))
    if len(skipped) == len(names):
        raise UserError(f"--src={root}: {clips.report(skipped, len(names))}")
    refuse_empty(root, clip_count)
    parts = {split: writer.finish() for split, writer in shards.items()}
    manifest = {
        "schema": array_record.SCHEMA,
        "codec": "h264",
        **dataclasses.asdict(recipe),
        "classes": classes,
        "splits": {
            split: {
                "clips": clip_count[split],
                "records": sum(shard["records"] for shard in part),
                "shards": part,
            }
            for split, part in parts.items()
        },
        "skipped": [{"name": name, "reason": reason} for name, reason in skipped],
    }
    (folder / array_record.MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def clear(partial):
    """Remove what a killed run has left in the folder where a set grows.

    Raises UserError where it holds anything that such a run does not write.
    """
    if not os.path.lexists(partial):
        return
    held = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else ["it is a file"]
    foreign = [name for name in held if not _OWN.fullmatch(name)]
    if foreign:
        raise UserError(
            f"--out: {partial} is in the way and not of a run that was killed ({foreign[0]}); "
            "move it, or choose another --out"
        )
    shutil.rmtree(partial)


def vacant(out):
    """The absolute path of --out; UserError where anything but an empty directory is there."""
    out = pathlib.Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out}: exists already; remove it or choose another directory")
    return out


def prepare(src, out, recipe, workers):
    """Write the set to a directory beside `out` and rename it; returns the manifest."""
    out = vacant(out)
    clips.find(src, "--src")  # before anything on disk is touched
    partial = out.with_name(out.name + ".partial")
    clear(partial)
    partial.mkdir(parents=True)
    try:
        manifest = write_set(src, partial, recipe, workers)
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--src", required=True, help="directory of videos")
    parser.add_argument("--out", required=True, help="directory of the new data set")
    parser.add_argument("--size", type=int, default=128, help="pixels along each side")
    parser.add_argument("--frames", type=int, default=16, help="frames in a chunk")
    parser.add_argument("--fps", type=float, default=8.0, help="frames a second; 0: the source's")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="decoding processes")
    return exit_status(_run, parser.parse_args(argv))


def exit_status(work, args):
    """0 after work(args); 2, and a line on stderr, where it met what the user can mend.

    130, as a shell has it for SIGINT, where the user stopped it.
    """
    status = 2
    try:
        work(args)
    except UserError as error:
        message = str(error)
    except OSError as error:
        message = f"--out={args.out}: {error.strerror or error}"
    except KeyboardInterrupt:
        message, status = "interrupted", 130
    else:
        return 0
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return status


def _run(args):
    recipe = Recipe(args.size, args.frames, args.fps)
    if args.workers < 1:
        raise UserError(f"--workers={args.workers}: must be at least 1")
    manifest = prepare(args.src, args.out, recipe, args.workers)
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['clips']} clips, {part['records']} records")
    if manifest["skipped"]:
        print(f"skipped {len(manifest['skipped'])} files:")
    for entry in manifest["skipped"]:
        print(f"  {clips.printable(entry['name'])} {entry['reason']}")


if __name__ == "__main__":
    sys.exit(main())

"""Encode clips once with a trained tokenizer, so that models of its latents need not do it again.

    python -m jaxvid.data.tokenize --workdir=TOKENIZER --src=CLIPS --out=LATENTS
    python -m jaxvid.train --config=configs/ar_diffusion.py:data=latents \\
        --config.data.path=LATENTS --config.task.tokenizer=TOKENIZER

--src is a set that `jaxvid.data.prepare` has made, a directory of videos, or the word sprites. Of
a set and of sprites, the middle --frames frames of every clip are encoded. A video is resampled,
cropped to its central square and cut into clips of --frames frames, and held out or not, as
`prepare` does it; for that it is decoded twice, at first to see whether all of it can be read. Long
clips pass through the tokenizer's stream in pieces, so memory for activations does not grow with
--frames, and of a video nor does that for pixels; the clips of a set and sprites, a batch at a
time, are decoded whole, one byte a colour. Stored are tokens where the tokenizer has codes, else
float32 latents, and for validation the frames too, without loss.

The same command goes on where a killed one stopped, in the middle of a video too. What is lost is
the work since the last save, of SAVE_SECONDS at most, and the clips under way: one whose stream
has begun begins anew. The set appears in one stroke at the end. As an entry point this stands above
the other modules of `jaxvid.data`.
"""

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from jaxvid import config as config_lib
from jaxvid import data, files
from jaxvid.data import array_record, clips, prepare, video
from jaxvid.data.transforms import Window, mirror, normalize
from jaxvid.errors import UserError
from jaxvid.inference import open_tokenizer, pieces

SAVE_SECONDS = 300.0  # from a save of what is encoded to the next, made between clips
JOURNAL = "journal.json"
SPLITS = ("train", "validation")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What becomes of which clips; an fps of 0 keeps the rate of the source."""

    src: str
    tokenizer: str
    size: int
    frames: int
    fps: float
    mirrored: bool

    def __post_init__(self):
        for name in ("size", "frames"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")
        if not 0 <= self.fps <= 1000:
            raise UserError(f"--fps={self.fps:g}: must lie in [0, 1000]; 0 keeps the source's rate")


class Encoder:
    """A frozen tokenizer as what turns clips into the bytes that are stored, `batch` at a time.

    pieces: lengths that a clip is cut into; a clip of several is encoded alone. dtype, shape: of
    what is stored of a clip.
    """

    def __init__(self, frozen, recipe, batch):
        self._params, self._tokenizer = jax.device_put(frozen.params), frozen.tokenizer
        self._mirrored = recipe.mirrored
        try:
            H, W = frozen.grid(recipe.size)
            latents = frozen.latents_for_frames(recipe.frames)
        except UserError as error:
            raise UserError(f"--size={recipe.size}, --frames={recipe.frames}: {error}") from error
        self.group = self._tokenizer.frames_for_latents(2) - 1
        self.pieces = pieces(self._tokenizer, recipe.frames)
        self.batch = batch if len(self.pieces) == 1 else 1
        codes = getattr(self._tokenizer.quantizer, "size", None)
        self.shape = [latents, H * W] + ([] if codes else [frozen.channels])
        self.dtype = ("uint16" if codes <= 2**16 else "int32") if codes else "float32"

    @functools.partial(jax.jit, static_argnums=0)
    def _encode(self, params, video_u8, state):
        as_stored = self._tokenizer.encode if self.dtype == "float32" else self._tokenizer.tokens
        return as_stored(params, normalize(video_u8), state)

    def __call__(self, stream):
        """The pieces of up to `batch` clips, uint8 [b, t, H, W, 3] in turn -> bytes of each."""
        state, stored = None, []
        for piece_BTHWC in stream:
            b = len(piece_BTHWC)
            # Filled up, so that the same program serves the last batch.
            rows_BTHWC = piece_BTHWC[np.arange(self.batch) % b]
            if self._mirrored:
                rows_BTHWC = np.concatenate([rows_BTHWC, [mirror(clip) for clip in rows_BTHWC]])
            z, state = self._encode(self._params, rows_BTHWC, state)
            stored.append(np.asarray(z, self.dtype))
        whole = np.concatenate(stored, axis=1)
        whole = whole.reshape(-1, self.batch, *whole.shape[1:])  # as they are, then mirrored
        return [whole[:, row].tobytes() for row in range(b)]


class Item(NamedTuple):
    """What is encoded between two looks at the list: a batch of clips of a source, or a video.

    count: () -> number of its clips, or the reason, a str, why there are none. load: (first, count)
    -> yields (headers, pieces) of clips first, first + 1 ..., `encoder.batch` at a time.
    """

    name: str
    count: Callable
    load: Callable


class Origin(NamedTuple):
    """Where clips come from; split_of: name of an item that has clips, in order -> its split."""

    items: list
    split_of: Callable
    facts: dict
    unit: str


def from_source(fields, encoder):
    """The Origin of a data source."""
    sources = {split: data.make_source(fields, split) for split in SPLITS}

    def load(source, indices, first, count):
        if first == count:
            return
        examples = [source[index] for index in indices[first:]]
        headers = [
            {"name": source.name(index), "label": example["label"], "caption": example["caption"]}
            for index, example in zip(indices[first:], examples)
        ]
        clips_BTHWC = np.stack([example["video"] for example in examples])
        yield headers, np.split(clips_BTHWC, np.cumsum(encoder.pieces)[:-1], axis=1)

    items = []
    for split, source in sources.items():
        for start in range(0, len(source), encoder.batch):
            indices = range(start, min(start + encoder.batch, len(source)))
            count = functools.partial(len, indices)
            load_these = functools.partial(load, source, indices)
            items.append(Item(f"{split} {start}", count, load_these))
    facts = {"num_classes": sources["train"].num_classes, "captions": sources["train"].captions}
    return Origin(items, lambda name: name.split()[0], facts, "batches")


def from_videos(recipe, encoder):
    """The Origin of a directory of videos."""
    names = clips.find(recipe.src, "--src")
    classes, splits = clips.classes_of(names), clips.Splits(names)
    prepare.refuse_empty(recipe.src, {"validation": splits.count})  # before the work
    crop = functools.partial(Window(1, recipe.size).augment, rng=None)

    def count(name):
        seen = prepare.walk(recipe.src, recipe, name)
        return seen if isinstance(seen, str) else seen // recipe.frames

    def load(name, first, count):
        caption = clips.class_of(name) if classes else ""
        about = {"label": classes.index(caption) if classes else 0, "caption": caption}
        with open(os.path.join(recipe.src, name), "rb") as file:
            pictures = video.resample(file, recipe.size, recipe.fps)
            pictures = itertools.islice(pictures, first * recipe.frames, None)
            frames = (crop(picture_HWC[None]) for picture_HWC in pictures)
            for start in range(first, count, encoder.batch):
                numbers = range(start, min(start + encoder.batch, count))
                # The first pieces of these clips, and then what follows where there is but one.
                heads_BTHWC = np.stack([_exactly(frames, encoder.pieces[0]) for _ in numbers])
                rest = (_exactly(frames, length)[None] for length in encoder.pieces[1:])
                headers = [{"name": f"{name}#{number}", **about} for number in numbers]
                yield headers, itertools.chain([heads_BTHWC], rest)

    items = [
        Item(name, functools.partial(count, name), functools.partial(load, name))
        for name in splits.order
    ]
    facts = {"num_classes": len(classes), "captions": bool(classes)}
    return Origin(items, splits.take, facts, "videos")


def _exactly(frames, number):
    """The next frames [1, H, W, 3] of an iterator as one clip [number, H, W, 3]."""
    taken = list(itertools.islice(frames, number))
    if len(taken) < number:
        raise video.VideoError("ends early")
    return np.concatenate(taken)


# Writing


def encode_item(encoder, recipe, item, split_of, shards, first, saver):
    """Write the records of an item from clip `first` on -> their number, or a str, why none.

    saver: told after every batch how many clips of the item are written.
    """
    count = item.count()
    if isinstance(count, str):
        return count
    writer, written = shards[split_of(item.name)], first
    keeps_frames = writer is shards["validation"]
    try:
        for headers, stream in item.load(first, count):
            frames = []
            if keeps_frames:
                size = (recipe.frames, recipe.size, recipe.size)
                frames = [video.ChunkWriter(*size, lossless=True) for _ in headers]
                stream = _copied(stream, frames)
            for row, (header, content) in enumerate(zip(headers, encoder(stream))):
                content += frames[row].finish() if frames else b""
                writer.write(array_record.pack(header, content))
                written += 1
            saver(written)
    except video.VideoError as error:
        raise UserError(
            f"clip={item.name}: {error}, though all of it was readable a moment ago; restore it "
            "and repeat the command"
        ) from error
    return written


def _copied(stream, writers):
    for piece_BTHWC in stream:
        for writer, clip_THWC in zip(writers, piece_BTHWC):
            writer.write(clip_THWC)
        yield piece_BTHWC


class Journal:
    """What is finished of a set in the folder where it grows; a new process begins where it ends.

    recipe: dict that tells one set from another. done: items. part: clips of the item after them.
    records: of each closed file.
    """

    def __init__(self, folder, recipe):
        self._path = folder / JOURNAL
        self.done, self.part, self.skipped = 0, 0, []
        self._saved = time.monotonic()
        self.records = {split: [] for split in SPLITS}
        self.recipe = recipe
        if self._path.exists():
            found = json.loads(self._path.read_text())
            changed = [name for name in recipe if found["recipe"].get(name) != recipe[name]]
            if changed:
                raise UserError(
                    f"{folder}: holds the beginning of another set (with another "
                    f"{', '.join(changed)}); remove it, or repeat the command that began it"
                )
            # Journals of earlier versions were written between items alone.
            self.done, self.part = found["done"], found.get("part", 0)
            self.skipped = found["skipped"]
            self.records = found["records"]
            for split in SPLITS:  # of an item that was under way
                for path in folder.glob(f"{split}-?????"):
                    if int(path.name[-5:]) >= len(self.records[split]):
                        path.unlink()
        else:
            prepare.clear(folder)
            folder.mkdir(parents=True)

    def save(self, done, part, shards, always=False):
        """Where it is time, close the files of {split: Shards} and note what they hold."""
        if not always and time.monotonic() - self._saved <= SAVE_SECONDS:
            return
        for split, writer in shards.items():
            writer.close()
            self.records[split] = writer.records
        self.done, self.part = done, part
        names = ("recipe", "done", "part", "records", "skipped")
        files.write(self._path, json.dumps({name: getattr(self, name) for name in names}))
        self._saved = time.monotonic()


def write_set(folder, origin, encoder, recipe):
    """Encode all items into `folder`, from where its journal ends; the manifest, also written."""
    items = origin.items
    order = hashlib.sha256(os.fsencode("\n".join(item.name for item in items))).hexdigest()[:16]
    journal = Journal(folder, {**dataclasses.asdict(recipe), "items": order})
    shards = {split: prepare.Shards(folder, split, journal.records[split]) for split in SPLITS}
    done, part = journal.done, journal.part
    if done or part:
        print(f"going on after {done} of {len(items)} {origin.unit}", file=sys.stderr)
    skipped = {entry["name"] for entry in journal.skipped}
    for item in items[:done]:
        if item.name not in skipped:
            origin.split_of(item.name)

    def outcomes():
        for place, item in enumerate(items[done:], done):

            def saver(clips, place=place):
                journal.save(place, clips, shards)

            first = part if place == done else 0
            yield (
                item.name,
                encode_item(encoder, recipe, item, origin.split_of, shards, first, saver),
            )

    shown = prepare.progress(outcomes(), len(items) - done, origin.unit)
    for number, (name, outcome) in enumerate(shown, done + 1):
        if isinstance(outcome, str):
            journal.skipped.append({"name": name, "reason": outcome})
        journal.save(number, 0, shards, always=number == len(items))
    if len(journal.skipped) == len(items):
        skipped = [(entry["name"], entry["reason"]) for entry in journal.skipped]
        raise UserError(f"--src={recipe.src}: {clips.report(skipped, len(items))}")
    prepare.refuse_empty(recipe.src, {split: sum(n) for split, n in journal.records.items()})
    parts = {split: writer.finish() for split, writer in shards.items()}
    manifest = {
        "schema": array_record.SCHEMA,
        "codec": "latents",
        "dtype": encoder.dtype,
        "shape": encoder.shape,
        "frames_per_latent": encoder.group,
        **dataclasses.asdict(recipe),
        **origin.facts,
        "splits": {
            split: {"records": sum(shard["records"] for shard in part), "shards": part}
            for split, part in parts.items()
        },
        "skipped": journal.skipped,
    }
    (folder / array_record.MANIFEST).write_text(json.dumps(manifest, indent=1))
    return manifest


def tokenize(workdir, src, out, *, size=None, frames=None, fps=8.0, mirrored=False, batch=8):
    """Write the set to a directory beside `out` and rename it; the manifest. Raises UserError."""
    out = prepare.vacant(out)
    frozen = open_tokenizer(workdir)
    fields = config_lib.load(pathlib.Path(workdir, "config.json")).data
    size = fields.size if size is None else size
    frames = fields.frames if frames is None else frames
    recipe = Recipe(str(src), frozen.digest, size, frames, fps, mirrored)
    encoder = Encoder(frozen, recipe, batch)
    is_set = pathlib.Path(src, array_record.MANIFEST).is_file()
    if is_set or src == "sprites":
        name = "array_record" if is_set else "sprites"
        fields.update(name=name, path=str(src), size=size, frames=frames, stride=1, crop="center")
        origin = from_source(fields, encoder)
    else:
        origin = from_videos(recipe, encoder)
    partial = out.with_name(out.name + ".partial")
    manifest = write_set(partial, origin, encoder, recipe)
    partial.rename(out)
    (out / JOURNAL).unlink()
    return manifest


def main(argv=None):
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="work folder of the tokenizer's run")
    parser.add_argument("--src", required=True, help="prepared set, folder of videos, or sprites")
    parser.add_argument("--out", required=True, help="directory of the new data set")
    parser.add_argument("--size", type=int, help="pixels along each side; as trained")
    parser.add_argument("--frames", type=int, help="frames in a clip; as trained")
    parser.add_argument("--fps", type=float, default=8.0, help="of videos; 0: the source's")
    parser.add_argument("--flip", action="store_true", help="encode every clip mirrored too")
    parser.add_argument("--batch", type=int, default=8, help="clips encoded at once")
    return prepare.exit_status(_run, parser.parse_args(argv))


def _run(args):
    if args.batch < 1:
        raise UserError(f"--batch={args.batch}: must be at least 1")
    manifest = tokenize(
        args.workdir,
        args.src,
        args.out,
        size=args.size,
        frames=args.frames,
        fps=args.fps,
        mirrored=args.flip,
        batch=args.batch,
    )
    shape = " x ".join(map(str, manifest["shape"]))
    print(f"of each clip {shape} {manifest['dtype']}")
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['records']} clips")
    for entry in manifest["skipped"]:
        print(f"skipped {clips.printable(entry['name'])}: {entry['reason']}")


if __name__ == "__main__":
    sys.exit(main())

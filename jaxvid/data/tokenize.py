"""Encode clips once with a trained tokenizer, so that models of its latents need not do it again.

    python -m jaxvid.data.tokenize --workdir=TOKENIZER --src=CLIPS --out=LATENTS
    python -m jaxvid.train --config=configs/ar_diffusion.py:data=latents \\
        --config.data.path=LATENTS --config.task.tokenizer=TOKENIZER

--src is a set that `jaxvid.data.prepare` has made, a directory of videos, or the word sprites. Of
a set and of sprites, the middle --frames frames of every clip are encoded. A video is resampled,
cropped to its central square and cut into clips of --frames frames, as `prepare` does it. Long
clips pass through the tokenizer's stream in pieces: memory for pixels and activations does not grow
with --frames. Stored are tokens where the tokenizer has codes, else float32 latents, and for
validation the frames too, without loss.

The same command goes on where a killed one stopped, and the set appears in one stroke at the end.
As an entry point this stands above the other modules of `jaxvid.data`.
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

import jax
import numpy as np

from jaxvid import config as config_lib
from jaxvid import data, files
from jaxvid.data import array_record, clips, prepare, video
from jaxvid.data.transforms import Window, mirror, normalize
from jaxvid.errors import UserError
from jaxvid.inference import open_tokenizer

PIECE = 32  # frames, about, that pass through the tokenizer at once
SAVE_SECONDS = 300.0  # of work that a kill may cost
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
        self.pieces = _pieces(recipe.frames, max(PIECE // self.group, 1) * self.group)
        self.batch = batch if len(self.pieces) == 1 else 1
        codes = getattr(self._tokenizer.quantizer, "size", None)
        self.shape = [latents, H * W] + ([] if codes else [frozen.channels])
        self.dtype = ("uint16" if codes <= 2**16 else "int32") if codes else "float32"

    @functools.partial(jax.jit, static_argnums=0)
    def _encode(self, params, video_u8, state):
        as_stored = self._tokenizer.encode if self.dtype == "float32" else self._tokenizer.tokens
        return as_stored(params, normalize(video_u8), state)

    def __call__(self, pieces):
        """The pieces of up to `batch` clips, uint8 [b, t, H, W, 3] in turn -> bytes of each."""
        state, stored = None, []
        for piece_BTHWC in pieces:
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


def _pieces(frames, later):
    """Lengths of a clip's pieces: its first frame and `later`, `later` again and what is left."""
    whole, rest = divmod(frames - 1, later)
    if not whole:
        return [frames]
    return [1 + later, *[later] * (whole - 1), *([rest] if rest else [])]


# Where clips come from. An item is (name, split, load); load() yields (headers, pieces) of clips.


def from_source(fields, encoder):
    """(items, facts of the set) of a data source: an item is a batch of clips."""
    sources = {split: data.make_source(fields, split) for split in SPLITS}

    def load(source, indices):
        examples = [source[index] for index in indices]
        headers = [
            {"name": source.name(index), "label": example["label"], "caption": example["caption"]}
            for index, example in zip(indices, examples)
        ]
        clips_BTHWC = np.stack([example["video"] for example in examples])
        yield headers, np.split(clips_BTHWC, np.cumsum(encoder.pieces)[:-1], axis=1)

    items = []
    for split, source in sources.items():
        for first in range(0, len(source), encoder.batch):
            indices = range(first, min(first + encoder.batch, len(source)))
            items.append((f"{split} {first}", split, functools.partial(load, source, indices)))
    facts = {"num_classes": sources["train"].num_classes, "captions": sources["train"].captions}
    return items, facts


def from_videos(recipe, encoder):
    """(items, facts of the set) of a directory of videos: an item is a video."""
    names = clips.find(recipe.src, "--src")
    classes, split_of = clips.classes_of(names), clips.split_of(names)
    crop = functools.partial(Window(1, recipe.size).augment, rng=None)

    def load(name):
        """Yields (headers, pieces) of the next clips of a video, `encoder.batch` at a time."""
        caption = clips.class_of(name) if classes else ""
        about = {"label": classes.index(caption) if classes else 0, "caption": caption}
        with open(os.path.join(recipe.src, name), "rb") as file:
            pictures = video.resample(file, recipe.size, recipe.fps)
            frames = (crop(picture_HWC[None]) for picture_HWC in pictures)
            count = 0
            # The first pieces of the next clips, and then what follows of the last of them.
            while first := list(itertools.islice(_cut(frames, encoder.pieces[0]), encoder.batch)):
                rest = (_exactly(frames, length)[None] for length in encoder.pieces[1:])
                numbers = range(count, count + len(first))
                headers = [{"name": f"{name}#{number}", **about} for number in numbers]
                yield headers, itertools.chain([np.stack(first)], rest)
                count += len(first)

    items = [(name, split_of[name], functools.partial(load, name)) for name in sorted(names)]
    return items, {"num_classes": len(classes), "captions": bool(classes)}


class _EndError(Exception):
    """A video has no more frames in the middle of a clip."""


def _exactly(frames, number):
    """The next frames [1, H, W, 3] of an iterator as one clip [number, H, W, 3]; else _EndError."""
    taken = list(itertools.islice(frames, number))
    if len(taken) < number:
        raise _EndError
    return np.concatenate(taken)


def _cut(frames, number):
    """Clips of so many frames, until they run out."""
    while True:
        try:
            yield _exactly(frames, number)
        except _EndError:
            return


# Writing


def encode_item(encoder, recipe, load, split, shards):
    """Write the records of an item -> their number, or a str that says what went wrong."""
    written = 0
    try:
        for headers, pieces in load():
            frames = []
            if split == "validation":
                size = (recipe.frames, recipe.size, recipe.size)
                frames = [video.ChunkWriter(*size, lossless=True) for _ in headers]
                pieces = _copied(pieces, frames)
            for row, (header, content) in enumerate(zip(headers, encoder(pieces))):
                content += frames[row].finish() if frames else b""
                shards.write(array_record.pack(header, content))
                written += 1
    except _EndError:
        pass  # the rest of a video is no clip
    except (video.VideoError, OSError) as error:
        if isinstance(error, OSError) and not str(error.filename or "").startswith(recipe.src):
            raise  # the disk that is written to
        reason = error.strerror if isinstance(error, OSError) else error
        return f"{reason} after {written} clips" if written else str(reason)
    return written or f"has fewer than {recipe.frames} frames"


def _copied(pieces, writers):
    for piece_BTHWC in pieces:
        for writer, clip_THWC in zip(writers, piece_BTHWC):
            writer.write(clip_THWC)
        yield piece_BTHWC


class Journal:
    """What is finished of a set in the folder where it grows; a new process begins where it ends.

    recipe: dict that tells one set from another. done: items. records: of each closed file.
    """

    def __init__(self, folder, recipe):
        self._path = folder / JOURNAL
        self.done, self.skipped = 0, []
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
            self.done, self.skipped = found["done"], found["skipped"]
            self.records = found["records"]
            for split in SPLITS:  # of an item that was under way
                for path in folder.glob(f"{split}-?????"):
                    if int(path.name[-5:]) >= len(self.records[split]):
                        path.unlink()
        else:
            prepare.clear(folder)
            folder.mkdir(parents=True)

    def save(self, done, shards):
        """Close the files of {split: Shards} and note that they hold `done` items."""
        for split, writer in shards.items():
            writer.close()
            self.records[split] = writer.records
        self.done = done
        names = ("recipe", "done", "records", "skipped")
        files.write(self._path, json.dumps({name: getattr(self, name) for name in names}))


def write_set(folder, items, encoder, recipe, facts):
    """Encode all items into `folder`, from where its journal ends; the manifest, also written."""
    order = hashlib.sha256("\n".join(name for name, *_ in items).encode()).hexdigest()[:16]
    journal = Journal(folder, {**dataclasses.asdict(recipe), "items": order})
    shards = {split: prepare.Shards(folder, split, journal.records[split]) for split in SPLITS}
    if journal.done:
        print(f"going on after {journal.done} of {len(items)}", file=sys.stderr)
    saved = time.monotonic()

    def outcomes():
        for name, split, load in items[journal.done :]:
            yield name, encode_item(encoder, recipe, load, split, shards[split])

    left = len(items) - journal.done
    for number, (name, outcome) in enumerate(prepare.progress(outcomes(), left), journal.done + 1):
        if isinstance(outcome, str):
            journal.skipped.append({"name": name, "reason": outcome})
        if time.monotonic() - saved > SAVE_SECONDS or number == len(items):
            journal.save(number, shards)
            saved = time.monotonic()
    if len(journal.skipped) == len(items):
        skipped = [(entry["name"], entry["reason"]) for entry in journal.skipped]
        raise UserError(f"--src={recipe.src}: {clips.report(skipped, len(items))}")
    parts = {split: writer.finish() for split, writer in shards.items()}
    manifest = {
        "schema": array_record.SCHEMA,
        "codec": "latents",
        "dtype": encoder.dtype,
        "shape": encoder.shape,
        "frames_per_latent": encoder.group,
        **dataclasses.asdict(recipe),
        **facts,
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
    size, frames = size or fields.size, frames or fields.frames
    recipe = Recipe(str(src), frozen.digest, size, frames, fps, mirrored)
    encoder = Encoder(frozen, recipe, batch)
    is_set = pathlib.Path(src, array_record.MANIFEST).is_file()
    if is_set or src == "sprites":
        name = "array_record" if is_set else "sprites"
        fields.update(name=name, path=str(src), size=size, frames=frames, stride=1, crop="center")
        items, facts = from_source(fields, encoder)
    else:
        items, facts = from_videos(recipe, encoder)
    partial = out.with_name(out.name + ".partial")
    manifest = write_set(partial, items, encoder, recipe, facts)
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
        print(f"skipped {entry['name']}: {entry['reason']}")


if __name__ == "__main__":
    sys.exit(main())

"""Encode clips once with a trained tokenizer, for the training of models of its latents.

    python -m jaxvid.tokenize --workdir=TOKENIZER --src=CLIPS --out=LATENTS
    python -m jaxvid.train --config=configs/ar_diffusion.py:data=latents \\
        --config.data.path=LATENTS --config.task.tokenizer=TOKENIZER

--src is a data set of `jaxvid.prepare`, a directory of videos, or the word sprites. From a data set
and from sprites, the middle --frames frames of each clip are encoded. A video is resampled, cropped
to its central square, cut into clips of --frames frames, and assigned to a split, all as in
`jaxvid.prepare`; it is decoded twice, the first time to check that it can be read to its end. Long
clips pass through the tokenizer's stream in pieces, so memory for activations does not grow with
--frames, nor does memory for the pixels of a video; a batch of clips of a data set or of sprites is
decoded whole, one byte a colour. The set holds tokens if the tokenizer has codes, and otherwise
float32 latents; for validation also the frames, lossless.

The same command resumes after a kill, also in the middle of a video. A kill loses the work
since the last save, five minutes at most, and the clips in progress, which start again. The set
appears at --out only when it is complete.

    python -m jaxvid.tokenize --text=T5 --src=CLIPS --out=TEXT
    python -m jaxvid.train --config=configs/ar_diffusion.py:cond=text,text=stored \\
        --config.data.text_path=TEXT

encodes captions instead, each of them once. T5 is a folder with the weights of T5 1.1 of any size
(*.safetensors) and its tokenizer (tokenizer.json or spiece.model, which need the library tokenizers
or sentencepiece). --src is a data set of `jaxvid.prepare`, of this command or of TensorFlow
Datasets, a directory of videos, whose classes are the captions, or a text file with a caption in
each line.
"""

import dataclasses
import functools
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import numpy as np
from absl import flags

from jaxvid import checks, cli, data, memory
from jaxvid import config as config_lib
from jaxvid.data import clips, progress, shards, video
from jaxvid.data.journal import JOURNAL, Journal
from jaxvid.data.source import SPLITS
from jaxvid.data.transforms import Window, mirror, normalize
from jaxvid.encoding import captions
from jaxvid.errors import UserError, printable
from jaxvid.runs import open_tokenizer

FLAGS = flags.FLAGS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What decides the content of a set; an fps of 0 keeps the rate of the source."""

    src: str
    tokenizer: str
    size: int
    frames: int
    fps: float
    mirrored: bool

    def __post_init__(self):
        clips.check_cut(self.size, self.frames, self.fps)


def main():
    """Entry point."""
    if FLAGS.text:
        _encode_captions()
        return
    checks.require(FLAGS.workdir, "workdir", "", "missing; name the run of a tokenizer, or --text")
    manifest = tokenize(
        FLAGS.workdir,
        FLAGS.src,
        FLAGS.out,
        size=FLAGS.size,
        frames=FLAGS.frames,
        fps=FLAGS.fps,
        mirrored=FLAGS.flip,
        batch=FLAGS.batch,
    )
    shape = " x ".join(map(str, manifest["shape"]))
    print(f"of each clip {shape} {manifest['dtype']}")
    for split, part in manifest["splits"].items():
        print(f"{split}: {part['records']} clips")
    for done in ("cut", "skipped"):
        for entry in manifest[done]:
            print(printable(f"{done} {entry['name']}: {entry['reason']}"))


def _encode_captions():
    """Entry point of --text."""
    for name in ("workdir", "size", "frames", "fps", "flip"):
        if FLAGS[name].present:
            raise UserError(f"{name}={FLAGS[name].value}: is for clips; leave it out with --text")
    options = dict(tokens=FLAGS.text_tokens, batch=FLAGS.batch)
    manifest = captions.encode(FLAGS.text, FLAGS.src, FLAGS.out, **options)
    print(f"{manifest['captions']} captions, of each token {manifest['width']} numbers")


def tokenize(
    workdir: str,
    src: str,
    out: str,
    *,
    size: int | None = None,
    frames: int | None = None,
    fps: float = 8.0,
    mirrored: bool = False,
    batch: int = 8,
) -> dict:
    """Write the encoded clips of `src` to `out` -> the manifest. Raises UserError.

    size, frames: None takes those of the tokenizer's training. mirrored: encode each clip mirrored
    too. batch: clips encoded at once.
    """
    checks.at_least("batch", batch, 1, at_most=data.MAX_CLIPS)
    with shards.writing(out):
        out, partial = shards.reserve(out)
        frozen = open_tokenizer(workdir, "workdir")
        fields = config_lib.load(pathlib.Path(workdir, "config.json")).data
        size = fields.size if size is None else size
        frames = fields.frames if frames is None else frames
        recipe = Recipe(str(src), frozen.digest, size, frames, fps, mirrored)
        is_set = pathlib.Path(src, shards.MANIFEST).is_file()
        if is_set:  # its clips have a rate already, and those of sprites have none
            recipe = dataclasses.replace(recipe, fps=shards.read_manifest(src, "h264")["fps"])
        elif src == "sprites":
            recipe = dataclasses.replace(recipe, fps=0.0)
        encoder = Encoder(frozen, recipe, batch)
        at_once = 3 * encoder.batch * frames * size**2
        memory.require(f"batch={batch}, frames={frames}, size={size}", "clips", at_once)
        if is_set or src == "sprites":
            name = "array_record" if is_set else "sprites"
            fields.update(name=name, path=str(src), size=size, frames=frames)
            fields.update(stride=1, crop="center")
            fields.update({"fps": 0.0} if "fps" in fields else {})
            inputs = from_source(fields, encoder)
        else:
            inputs = from_videos(recipe, encoder)
        manifest = _write_set(partial, inputs, encoder, recipe)
        partial.rename(out)
        (out / JOURNAL).unlink()
    return manifest


class Encoder:
    """Encodes clips with a frozen tokenizer, `batch` at a time, to the bytes of their records.

    lengths: of the pieces into which a clip is cut; with more than one piece, `batch` is 1. dtype,
    shape: of one encoded clip.
    """

    def __init__(self, frozen, recipe: Recipe, batch: int):
        self._params, self._tokenizer = jax.device_put(frozen.params), frozen.tokenizer
        self._mirrored = recipe.mirrored
        try:
            H, W = frozen.grid(recipe.size)
        except UserError as error:
            raise UserError(f"size={recipe.size}: {error}") from error
        latents = frozen.latents_for_frames(recipe.frames)
        self.frames_per_latent = self._tokenizer.frames_for_latents(2) - 1
        self.lengths = self._tokenizer.pieces(recipe.frames)
        self.batch = batch if len(self.lengths) == 1 else 1
        codes = self._tokenizer.quantizer.size
        self.shape = [latents, H * W] + ([] if codes else [frozen.channels])
        self.dtype = ("uint16" if codes <= 2**16 else "int32") if codes else "float32"

    @functools.partial(jax.jit, static_argnames="self")
    def _encode(self, params, video_u8, state):
        encode = self._tokenizer.encode if self.dtype == "float32" else self._tokenizer.tokens
        return encode(params, normalize(video_u8), state)

    def __call__(self, pieces: Iterable[np.ndarray]) -> list[bytes]:
        """Pieces of up to `batch` clips, uint8 [b, t, H, W, 3] in order -> bytes of each clip."""
        state, parts = None, []
        for piece_BTHWC in pieces:
            b = len(piece_BTHWC)
            # Filled up, so that the same program serves the last batch.
            rows_BTHWC = piece_BTHWC[np.arange(self.batch) % b]
            if self._mirrored:
                rows_BTHWC = np.concatenate([rows_BTHWC, [mirror(clip) for clip in rows_BTHWC]])
            z, state = self._encode(self._params, rows_BTHWC, state)
            parts.append(np.asarray(z, self.dtype))
        encoded = np.concatenate(parts, axis=1)
        encoded = encoded.reshape(-1, self.batch, *encoded.shape[1:])  # [mirrored or not, clip]
        return [encoded[:, row].tobytes() for row in range(b)]


# Where clips come from


class Item(NamedTuple):
    """Clips that have one split: a batch of clips of a source, or all clips of a video.

    count: () -> the number of clips, or the reason, a str, to skip the item. load: (first, count)
    -> yields (headers, pieces) for each batch of the clips first .. count - 1.
    """

    name: str
    count: Callable[[], int | str]
    load: Callable[[int, int], Iterator[tuple[list, Iterable]]]


class Inputs(NamedTuple):
    """All items. assign: name of a usable item, in order -> its split. labels: for the manifest.

    parts: name of a counted video -> the lengths of its parts.
    """

    items: list[Item]
    assign: Callable[[str], str]
    labels: dict
    unit: str
    parts: dict[str, list[int]]


def from_source(fields, encoder: Encoder) -> Inputs:
    """The clips of the data source that config.data describes."""
    try:
        sources = {split: data.make_source(fields, split) for split in SPLITS}
    except UserError as error:
        raise UserError(str(error).replace("path=", "src=", 1)) from error

    def load(source, indices, first, count):
        if first == count:
            return
        examples = [source[index] for index in indices[first:]]
        headers = [
            {"name": source.name(index), "label": example["label"], "caption": example["caption"]}
            for index, example in zip(indices[first:], examples)
        ]
        clips_BTHWC = np.stack([example["video"] for example in examples])
        yield headers, np.split(clips_BTHWC, np.cumsum(encoder.lengths)[:-1], axis=1)

    items = []
    for split, source in sources.items():
        for start in range(0, len(source), encoder.batch):
            indices = range(start, min(start + encoder.batch, len(source)))
            count = functools.partial(len, indices)
            load_these = functools.partial(load, source, indices)
            items.append(Item(f"{split} {start}", count, load_these))
    labels = {"num_classes": sources["train"].num_classes, "captions": sources["train"].captions}
    return Inputs(items, lambda name: name.split()[0], labels, "batches", {})


def from_videos(recipe: Recipe, encoder: Encoder) -> Inputs:
    """The clips of the videos below a directory."""
    names = clips.find(recipe.src, "src")
    classes, splits = clips.classes_of(names), clips.Splits(names)
    shards.refuse_empty(recipe.src, {"validation": splits.count})  # before the work
    crop = functools.partial(Window(1, recipe.size).augment, rng=None)
    parts = {}

    def count(name):
        outcome = clips.walk(recipe.src, name, recipe)
        if isinstance(outcome, str):
            return outcome
        parts[name] = outcome
        return sum(length // recipe.frames for length in outcome)

    def whole(name, pictures):
        """The pictures of the whole clips in each part."""
        for length in parts[name]:
            part = itertools.takewhile(lambda picture_HWC: picture_HWC is not None, pictures)
            yield from itertools.islice(part, length - length % recipe.frames)
            for _ in part:
                pass

    def load(name, first, count):
        caption = clips.class_of(name) if classes else ""
        labels = {"label": classes.index(caption) if classes else 0, "caption": caption}
        with video.opened(os.path.join(recipe.src, name)) as file:
            pictures = video.resample(file, recipe.size, recipe.fps)
            pictures = itertools.islice(whole(name, pictures), first * recipe.frames, None)
            frames = (crop(picture_HWC[None]) for picture_HWC in pictures)
            for start in range(first, count, encoder.batch):
                numbers = range(start, min(start + encoder.batch, count))
                # The first piece of all clips of the batch; with later pieces it has one clip.
                heads_BTHWC = np.stack([_next(frames, encoder.lengths[0]) for _ in numbers])
                later = (_next(frames, length)[None] for length in encoder.lengths[1:])
                headers = [{"name": f"{name}#{number}", **labels} for number in numbers]
                yield headers, itertools.chain([heads_BTHWC], later)

    items = [
        Item(name, functools.partial(count, name), functools.partial(load, name))
        for name in splits.order
    ]
    labels = {"num_classes": len(classes), "captions": bool(classes)}
    return Inputs(items, splits.assign, labels, "videos", parts)


def _next(frames, number):
    """The next frames [1, H, W, 3] of an iterator as one clip [number, H, W, 3]."""
    clip = list(itertools.islice(frames, number))
    if len(clip) < number:
        raise video.VideoError("ends early")
    return np.concatenate(clip)


# Writing


def _write_set(folder, inputs, encoder, recipe):
    """Encode all items into `folder`, from where its journal ends -> the manifest."""
    items = inputs.items
    journal = Journal(folder, dataclasses.asdict(recipe), [item.name for item in items])
    writers = {split: shards.Shards(folder, split, journal.records[split]) for split in SPLITS}
    done, first = journal.done, journal.clips
    if done or first:
        print(journal.resuming(inputs.unit), file=sys.stderr)
    for name in journal.used():
        inputs.assign(name)

    def outcomes():
        for number, item in enumerate(items[done:], done):
            start = first if number == done else 0
            save = functools.partial(journal.save, number, writers=writers)
            yield (
                item.name,
                _encode_item(item, start, inputs.assign, encoder, recipe, writers, save),
            )

    shown = progress.shown(outcomes(), len(items) - done, inputs.unit)
    for number, (name, outcome) in enumerate(shown, done + 1):
        if isinstance(outcome, str):
            journal.skipped.append((name, outcome))
        elif clips.cuts_in(inputs.parts.get(name, ())):
            journal.cut.append((name, clips.cuts_in(inputs.parts[name])))
        journal.save(number, 0, writers, always=number == len(items))
    if len(journal.skipped) == len(items):
        report = clips.report(journal.skipped, len(items))
        raise UserError(f"src={recipe.src}: {report}; give readable videos")
    shards.refuse_empty(recipe.src, {split: sum(n) for split, n in journal.records.items()})
    fields = {"dtype": encoder.dtype, "shape": encoder.shape}
    fields["frames_per_latent"] = encoder.frames_per_latent
    fields |= {**dataclasses.asdict(recipe), **inputs.labels}
    parts = {split: writer.finish() for split, writer in writers.items()}
    return shards.write_manifest(folder, "latents", fields, parts, journal.skipped, journal.cut)


def _encode_item(item, first, assign, encoder, recipe, writers, save):
    """Write the records of an item from clip `first` on -> the end, or the reason to skip it.

    save: called after each batch with the number of clips of the item that are written.
    """
    count = item.count()
    if isinstance(count, str):
        return count
    split, written = assign(item.name), first
    try:
        for headers, pieces in item.load(first, count):
            frames = []
            if split == "validation":
                size = (recipe.frames, recipe.size, recipe.size)
                frames = [video.ChunkWriter(*size, lossless=True) for _ in headers]
                pieces = _write_frames(pieces, frames)
            for row, (header, content) in enumerate(zip(headers, encoder(pieces))):
                content += frames[row].finish() if frames else b""
                writers[split].write(shards.pack(header, content))
                written += 1
            save(written)
    except video.VideoError as error:
        raise UserError(
            f"clip={item.name}: {error}, although all of it was readable before; restore it and "
            "repeat the command"
        ) from error
    return written


def _write_frames(pieces, writers):
    """Pass pieces through and write the frames of each row with its ChunkWriter."""
    for piece_BTHWC in pieces:
        for writer, clip_THWC in zip(writers, piece_BTHWC):
            writer.write(clip_THWC)
        yield piece_BTHWC


if __name__ == "__main__":
    cli.define_path("workdir", "Folder of the tokenizer's run.")
    cli.define_path("text", "Folder with the files of T5 1.1: encode captions, not clips.")
    cli.define_path(
        "src",
        "Prepared set, directory of videos, or sprites; of captions also a file or a set of tfds.",
        required=True,
    )
    cli.define_path("out", "Directory of the new data set.", required=True)
    flags.DEFINE_integer("size", None, "Pixels along each side. Default: as trained.")
    flags.DEFINE_integer("frames", None, "Frames of a clip. Default: as trained.")
    flags.DEFINE_float("fps", 8.0, "Frames per second of videos; 0 keeps the rate of the source.")
    flags.DEFINE_boolean("flip", False, "Encode each clip mirrored too.")
    flags.DEFINE_integer("batch", 8, "Clips or captions encoded at once.")
    flags.DEFINE_integer("text_tokens", 128, "Tokens of a caption, of which longer ones are cut.")
    cli.run(main)

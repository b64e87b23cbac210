"""The captions of a data set as embeddings of T5, encoded once; see `jaxvid.tokenize`."""

import sys
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from jaxvid import checks, files
from jaxvid.data import clips, progress, shards, text, tfds
from jaxvid.data.captions import EMBEDDING, KEY, key_of
from jaxvid.data.journal import JOURNAL, Journal
from jaxvid.data.source import SPLITS, digest_of
from jaxvid.encoding import t5
from jaxvid.errors import UserError
from jaxvid.schema import OPEN

MAX_BATCH = 2**12


def encode(folder: str, src: str, out: str, *, tokens: int = 128, batch: int = 8) -> dict:
    """Write the embeddings of the captions of `src` to `out` -> the manifest. Raises UserError.

    folder: of T5 (`encoding.t5`). tokens: a longer caption is cut. batch: captions encoded at once.
    The same command resumes, and the set appears at `out` only when it is complete.
    """
    checks.at_least("batch", batch, 1, at_most=MAX_BATCH)
    checks.at_least("text_tokens", tokens, 1, at_most=text.MAX_TOKENS)
    with shards.writing(out):
        out, partial = shards.reserve(out)
        found = find(src)
        digest = t5.digest_of(folder)
        encoder = t5.open_t5(folder)
        recipe = {"src": digest_of(found), "encoder": digest, "tokens": tokens, "batch": batch}
        starts = range(0, len(found), batch)
        journal = Journal(partial, recipe, [f"caption {start}" for start in starts])
        writers = {split: shards.Shards(partial, split, journal.records[split]) for split in SPLITS}
        if journal.done:
            print(journal.resuming("batches"), file=sys.stderr)

        def outcomes():
            for start in starts[journal.done :]:
                rows = found[start : start + batch]
                padded = [*rows, *[""] * (batch - len(rows))]  # so that one program serves all
                yield f"caption {start}", list(zip(rows, encoder.encode(padded, tokens)))

        shown = progress.shown(outcomes(), len(starts) - journal.done, "batches")
        for number, (_, encoded) in enumerate(shown, journal.done + 1):
            for caption, x_ME in encoded:
                content = x_ME.astype(EMBEDDING).tobytes()
                writers["train"].write(shards.pack({"caption": caption}, content))
            journal.save(number, 0, writers)
        if not journal.records["validation"]:
            keys = np.array([key_of(caption) for caption in found], KEY)
            header = {"captions": len(found)}
            writers["validation"].write(shards.pack(header, keys.tobytes()))
        journal.save(len(starts), 0, writers, always=True)
        fields = {"src": str(src), "encoder": str(Path(folder).resolve()), "encoder_digest": digest}
        fields |= {"captions": len(found), "tokens": tokens, "width": encoder.module.width}
        parts = {split: writer.finish() for split, writer in writers.items()}
        manifest = shards.write_manifest(partial, "text", fields, parts, [], [])
        partial.rename(out)
        (out / JOURNAL).unlink()
    return manifest


def find(src: str) -> list[str]:
    """The distinct captions of `src`, in the order of their keys, without empty ones.

    src: a text file with a caption in each line, a set of `jaxvid.prepare` or `jaxvid.tokenize`, a
    set of TensorFlow Datasets, or a directory of videos, whose classes are the captions. Raises
    UserError.
    """
    path = Path(src)
    try:
        if path.is_file():
            found = _lines(path)
        elif (path / shards.MANIFEST).is_file():
            found = _of_set(src)
        elif (path / "dataset_info.json").is_file():
            found = _of_tfds(src)
        else:
            found = clips.classes_of(clips.find(src, "src"))
    except UserError as error:
        raise UserError(str(error).replace("path=", "src=", 1)) from error
    found = {text.clean(caption) for caption in found} - {""}
    checks.require(found, "src", str(src), "holds no captions; add some, or use a file of captions")
    return sorted(found, key=lambda caption: (key_of(caption), caption))


def _lines(path):
    try:
        return path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "is not UTF-8"
        remedy = "use a text file with a caption in each line, a set, or a directory of videos"
        raise UserError(f"src={path}: {reason}; {remedy}") from error


def _of_set(src):
    """The captions of all clips of a set; those of `jaxvid.prepare` are its classes."""
    codec = "h264"
    try:
        manifest = files.parse_json(Path(src, shards.MANIFEST).read_bytes())
        codec = "latents" if manifest["codec"] == "latents" else "h264"
    except (OSError, ValueError, LookupError, TypeError):
        pass  # the next line says why
    manifest = shards.read_manifest(src, codec)
    if codec == "h264":
        return manifest["classes"]
    form = {"caption": str, OPEN: None}
    splits = [shards.open_split(src, manifest, split) for split in SPLITS]
    return {
        shards.fetch(records, index, form)[0]["caption"]
        for records in splits
        for index in range(len(records))
    }


def _of_tfds(src):
    config = ConfigDict(dict(path=src, frames=1, size=1, stride=1, crop="center", flip=False))
    sources = [tfds.Source(config, split) for split in SPLITS]
    return {source.caption(index) for source in sources for index in range(len(source))}

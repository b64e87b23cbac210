"""The files of a set of clips or captions that `jaxvid.prepare` or `jaxvid.tokenize` writes.

Shards are ArrayRecord files; dataset.json, the manifest, lists them. A record is the length of its
header (4 bytes, little-endian), the header (JSON: name, label, ...) and its content. A set grows in
a folder beside its place and is moved there as a whole.
"""

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import struct
from collections.abc import Iterable, Iterator

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter

from jaxvid import files, schema
from jaxvid.data.source import digest_of
from jaxvid.data.transforms import MAX_FRAMES, MAX_SIZE
from jaxvid.errors import UserError, shown
from jaxvid.schema import Choice, Real, Whole

SCHEMA = 1
MANIFEST = "dataset.json"
COMMANDS = {  # codec -> its command
    "h264": "jaxvid.prepare",
    "latents": "jaxvid.tokenize",
    "text": "jaxvid.tokenize --text",
}
SHARD_BYTES = 2**28
COPY = "copy or prepare the set again"

# The form of dataset.json: what all sets have, and those of each codec. Sets of earlier versions
# have no "cut".
_FILES = [{"name": str, "reason": str}]
_SHARD = {"file": str, "records": Whole(), "bytes": Whole(), "sha256": str}
_SPLIT = {"clips?": Whole(), "records": Whole(), "shards": [_SHARD]}
FORM = {
    **{"schema": int, "codec": str, "splits": {"train": _SPLIT, "validation": _SPLIT}},
    **{"skipped": _FILES, "cut?": _FILES, "digest?": str},
}
_CLIPS = {"size": Whole(1, MAX_SIZE), "frames": Whole(1, MAX_FRAMES), "fps": Real(0, 1000)}
FORMS = {
    "h264": {**_CLIPS, "classes": [str]},
    "text": {
        **{"src": str, "encoder": str, "encoder_digest": str},
        **{"captions": Whole(1), "tokens": Whole(1, 2**12), "width": Whole(1, 2**16)},
    },
    "latents": {
        **_CLIPS,
        **{"dtype": Choice("uint16", "int32", "float32"), "shape": [Whole(1, 2**24)]},
        **{"frames_per_latent": Whole(1, MAX_FRAMES), "mirrored": bool},
        **{"src": str, "tokenizer": str, "num_classes": Whole(), "captions": bool},
    },
}
# Files in the folder where a set grows.
_OWN = re.compile(r"(train|validation)-\d{5}.*|(dataset|journal)\.json(\.tmp\d+)?")


def pack(header: dict, content: bytes) -> bytes:
    """Header and content -> record."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + content


def unpack(record: bytes, form: dict) -> tuple[dict, bytes]:
    """Record -> (header, content); ValueError if it is not a record or its header has no `form`."""
    if len(record) < 4:
        raise ValueError("is too short for a record")
    (length,) = struct.unpack_from("<I", record)
    if length > len(record) - 4:
        raise ValueError(f"is too short for a header of {length} bytes")
    header = files.parse_json(record[4 : 4 + length])
    schema.check("", header, form)
    return header, record[4 + length :]


def fetch(records, index: int, form: dict) -> tuple[dict, bytes]:
    """`unpack` of a record of `open_split`. Raises UserError for a damaged one."""
    try:
        return unpack(records[index], form)
    except (ValueError, RuntimeError) as error:  # the latter is of ArrayRecord
        reason = str(error).partition(" (")[0]
        raise UserError(f"clip=record {index}: {reason}; {COPY}") from error


# Reading


def read_manifest(path: str, codec: str) -> dict:
    """The dataset.json of a directory, without its digest.

    Raises UserError unless it has this schema and codec, and is as it was written.

    codec: of the records, a key of COMMANDS.
    """
    remedy = f"write it with python -m {COMMANDS[codec]}"
    try:
        manifest = files.parse_json(pathlib.Path(path, MANIFEST).read_bytes())
    except FileNotFoundError:
        raise UserError(f"path={str(path)!r}: holds no {MANIFEST}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"path={str(path)!r}: bad {MANIFEST} ({error}); {remedy}") from error
    number = manifest.get("schema") if isinstance(manifest, dict) else None
    if number != SCHEMA:
        raise UserError(
            f"path={str(path)!r}: {MANIFEST} has schema {number}, not {SCHEMA}; {remedy} again"
        )
    found = manifest.get("codec")
    if found != codec:
        raise UserError(f"path={str(path)!r}: holds {found}, not {codec}; {remedy}")
    try:
        schema.check("", manifest, {**FORM, **FORMS[codec]})
    except UserError as error:
        raise UserError(f"path={str(path)!r}: bad {MANIFEST} ({error}); {remedy} again") from error
    digest = manifest.pop("digest", None)  # sets of earlier versions have none
    if digest not in (None, digest_of(manifest)):
        raise UserError(f"path={str(path)!r}: {MANIFEST} differs from what was written; {COPY}")
    return manifest


def open_split(path: str, manifest: dict, split: str):
    """The records of a split, by index.

    Raises UserError for a shard name with a directory in it, for a file of the wrong size, and for
    another number of records. ArrayRecord verifies each record when it is read.
    """
    paths, entry = [], manifest["splits"][split]
    for shard in entry["shards"]:
        file = pathlib.Path(path, shard["file"])
        if file.name != shard["file"] or len(file.name) > 255 or "\0" in file.name:
            raise UserError(
                f"path={str(path)!r}: {MANIFEST} names the shard {shown(shard['file'])}, "
                "which is not a plain file name; do not trust this set"
            )
        size = file.stat().st_size if file.is_file() else "no"
        if size != shard["bytes"]:
            raise UserError(
                f"path={str(path)!r}: shard {file.name} has {size} bytes, "
                f"{MANIFEST} says {shard['bytes']}; {COPY}"
            )
        paths.append(str(file))
    try:
        records = ArrayRecordDataSource(paths) if paths else []
        count = len(records)
    except RuntimeError as error:
        reason = str(error).partition(" (")[0]
        raise UserError(f"path={str(path)!r}: {reason}; {COPY}") from error
    if count != entry["records"]:
        raise UserError(
            f"path={str(path)!r}: the shards of {split} hold {count} records, {MANIFEST} says "
            f"{entry['records']}; {COPY}"
        )
    return records


# Writing


def reserve(out: str) -> tuple[pathlib.Path, pathlib.Path]:
    """(absolute path of the new set, the folder beside it in which it grows).

    Raises UserError unless `out` is free or an empty directory.
    """
    out = pathlib.Path(out).absolute()
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"out={out}: exists already; remove it or choose another directory")
    return out, out.with_name(out.name + ".partial")


def clear(partial: pathlib.Path) -> None:
    """Remove the files of a killed run from the folder in which a set grows.

    Raises UserError if the folder holds any other file.
    """
    if not os.path.lexists(partial):
        return
    found = sorted(path.name for path in partial.iterdir()) if partial.is_dir() else ["is a file"]
    foreign = [name for name in found if not _OWN.fullmatch(name)]
    if foreign:
        raise UserError(
            f"out={partial}: is in the way and not from a killed run ({foreign[0]}); "
            "move it, or choose another directory"
        )
    shutil.rmtree(partial)


@contextlib.contextmanager
def writing(out: str) -> Iterator[None]:
    """Turn an OSError, such as that of a full disk, into a UserError that names `out`."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"out={out}: {reason}; make room, or choose another directory") from error


@contextlib.contextmanager
def _as_os_error():
    """ArrayRecordWriter raises RuntimeError for a full disk and similar failures."""
    try:
        yield
    except RuntimeError as error:
        raise OSError(str(error)) from error


class Shards:
    """Writes the ArrayRecord files of one split, each of SHARD_BYTES or little more.

    records: the number of records in each file, at first of those that an earlier process wrote.
    """

    def __init__(self, folder: pathlib.Path, split: str, records: Iterable[int] = ()):
        self._folder, self._split = folder, split
        self._writer, self._size = None, 0
        self.records = list(records)

    def write(self, record: bytes) -> None:
        if self._writer is None or self._size >= SHARD_BYTES:
            self.close()
            self.records.append(0)
            # Random access reads groups, and neither H.264 nor latents compress further.
            path = self._folder / f"{self._split}-{len(self.records) - 1:05d}"
            self._writer = ArrayRecordWriter(str(path), "group_size:1,uncompressed")
        with _as_os_error():
            self._writer.write(record)
        self._size += len(record)
        self.records[-1] += 1

    def close(self) -> None:
        """Complete the current file; the next record begins another."""
        if self._writer is not None:
            with _as_os_error():
                self._writer.close()
            self._writer, self._size = None, 0

    def finish(self) -> dict:
        """Close, name the files by their number, and return their entry in the manifest."""
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
        return {"records": sum(self.records), "shards": shards}


def write_manifest(
    folder: pathlib.Path,
    codec: str,
    fields: dict,
    splits: dict[str, dict],
    skipped: list[tuple[str, str]],
    cut: list[tuple[str, str]],
) -> dict:
    """Write dataset.json, the last file of a set, and return its content.

    fields: of this codec alone. splits: {split: entry of its Shards}. skipped: (name, reason) of
    files. cut: (name, what was done) of files of several parts.
    """
    manifest = {"schema": SCHEMA, "codec": codec, **fields, "splits": splits}
    manifest["skipped"] = [{"name": name, "reason": reason} for name, reason in skipped]
    manifest["cut"] = [{"name": name, "reason": reason} for name, reason in cut]
    written = {**manifest, "digest": digest_of(manifest)}
    (folder / MANIFEST).write_text(json.dumps(written, indent=1))
    return manifest


def refuse_empty(src: str, clips: dict[str, int]) -> None:
    """Raise UserError if a split has no clips, {split: number}: training needs both."""
    for split, number in clips.items():
        if not number:
            raise UserError(
                f"src={src}: gives no clips for {split}; add videos of other scenes, readable "
                "and long enough (names that differ only in a final _c<number> are one scene)"
            )

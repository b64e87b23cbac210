"""The prepared data set: H.264 chunks in ArrayRecord files beside a dataset.json.

A record is the length of its header (4 bytes, little-endian), the header (JSON: name, chunk, label)
and one group of pictures as `video.encode_chunk` writes it. `jaxvid.data.prepare` makes the set.
"""

import json
import pathlib
import struct

from array_record.python.array_record_data_source import ArrayRecordDataSource

from jaxvid.data import video
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError

SCHEMA = 1
MANIFEST = "dataset.json"
MAKERS = {"h264": "prepare", "latents": "tokenize"}  # codec -> module of jaxvid.data


def pack(header, chunk):
    """Header dict and chunk bytes -> record."""
    text = json.dumps(header).encode()
    return struct.pack("<I", len(text)) + text + chunk


def unpack(record):
    """Record -> (header dict, chunk bytes); ValueError where it is no such record."""
    if len(record) < 4:
        raise ValueError("is too short for a record")
    (length,) = struct.unpack_from("<I", record)
    return json.loads(record[4 : 4 + length]), record[4 + length :]


def read_manifest(path, codec="h264"):
    """dataset.json of a directory -> dict; UserError where there is none of this schema and codec.

    codec: what the records hold, "h264" (`data.prepare`) or "latents" (`data.tokenize`).
    """
    remedy = f"write it with python -m jaxvid.data.{MAKERS[codec]}"
    try:
        manifest = json.loads(pathlib.Path(path, MANIFEST).read_text())
    except FileNotFoundError:
        raise UserError(f"data.path={str(path)!r}: holds no {MANIFEST}; {remedy}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"data.path={str(path)!r}: bad {MANIFEST} ({error}); {remedy}") from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if schema != SCHEMA:
        raise UserError(
            f"data.path={str(path)!r}: {MANIFEST} has schema {schema}, not {SCHEMA}; {remedy} again"
        )
    if manifest["codec"] != codec:
        raise UserError(
            f"data.path={str(path)!r}: holds {manifest['codec']}, not {codec}; {remedy}"
        )
    return manifest


def shard_paths(path, shards):
    """Paths of a split's shards; UserError for a name that leaves the directory or a wrong file."""
    paths = []
    for shard in shards:
        file = pathlib.Path(path, shard["file"])
        if file.name != shard["file"]:
            raise UserError(
                f"data.path={str(path)!r}: {MANIFEST} names the shard {shard['file']!r}, "
                "which is not a plain file name; do not trust this set"
            )
        size = file.stat().st_size if file.is_file() else "no"
        if size != shard["bytes"]:
            raise UserError(
                f"data.path={str(path)!r}: shard {file.name} has {size} bytes, "
                f"{MANIFEST} says {shard['bytes']}; copy or prepare the set again"
            )
        paths.append(str(file))
    return paths


class Source:
    """Windows of the chunks of a prepared set; see `jaxvid.data.make_source`."""

    def __init__(self, config, split):
        self._window = Window.of(config)
        manifest = read_manifest(config.path)
        if self._window.span > manifest["frames"]:
            raise UserError(
                f"data.frames={config.frames}, data.stride={config.stride}: a window spans "
                f"{self._window.span} frames, the set stores {manifest['frames']}; lower them or "
                f"prepare with --frames {self._window.span}"
            )
        if config.size > manifest["size"]:
            raise UserError(
                f"data.size={config.size}: the set stores {manifest['size']} pixels; lower it or "
                f"prepare with --size {config.size}"
            )
        self._frames, self._classes = manifest["frames"], manifest["classes"]
        part = manifest["splits"][split]
        paths = shard_paths(config.path, part["shards"])
        self._records = ArrayRecordDataSource(paths) if paths else []
        self.num_classes = len(self._classes)
        self.captions = bool(self._classes)

    def __len__(self):
        return len(self._records)

    def name(self, index):
        header, _ = unpack(self._records[index])
        return f"{header['name']}#{header['chunk']}"

    def __getitem__(self, index):
        return self.read(index)

    def read(self, index, rng=None):
        """A window of chunk `index`: where `rng` puts it, the middle without one."""
        start = self._window.start(self._frames, rng)
        numbers = range(start, start + self._window.span, self._window.stride)
        header = {"name": f"record {index}"}
        try:
            header, chunk = unpack(self._records[index])
            video_THWC = video.decode_chunk(chunk, numbers, self._window.size)
        except ValueError as error:
            raise UserError(
                f"clip={header['name']}: {error}; copy or prepare the set again"
            ) from error
        return {
            "video": self._window.augment(video_THWC, rng),
            "label": header["label"],
            "caption": self._classes[header["label"]] if self._classes else "",
        }

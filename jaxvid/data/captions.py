"""Captions that a frozen encoder has embedded, as `jaxvid.tokenize --text` stores them.

A record of the split "train" is one caption: its embeddings, float16 [m, E]. The header holds the
caption; see `jaxvid.data.shards`. Records are in the order of their keys, and the only record of
the split "validation" is the index, the keys of all of them.
"""

import hashlib

import numpy as np

from jaxvid.data import shards
from jaxvid.errors import UserError
from jaxvid.schema import Whole

HEADER, INDEX = {"caption": str}, {"captions": Whole(1)}
KEY, EMBEDDING = np.dtype("<u8"), np.dtype("<f2")


def key_of(caption: str) -> int:
    """The place of a caption in the order of a set: the first 64 bits of its SHA-256."""
    return int.from_bytes(hashlib.sha256(caption.encode()).digest()[:8], "little")


class Captions:
    """The embeddings of a set, by caption.

    width: E. tokens: the most that a caption was cut to. encoder, digest: the folder and the digest
    of the encoder. len: the number of captions. Raises UserError, naming `text_path`, for a folder
    that is no such set, and for a damaged one.
    """

    def __init__(self, path: str):
        self.path = path
        try:
            manifest = shards.read_manifest(path, "text")
            self._records = shards.open_split(path, manifest, "train")
            index = shards.open_split(path, manifest, "validation")
            header, keys = shards.fetch(index, 0, INDEX)
        except UserError as error:
            raise _named(error) from error
        self._keys = np.frombuffer(keys, KEY)
        if not header["captions"] == len(self._keys) == len(self._records):
            raise UserError(f"text_path={path}: its index has another length; {shards.COPY}")
        self.width, self.tokens = manifest["width"], manifest["tokens"]
        self.encoder, self.digest = manifest["encoder"], manifest["encoder_digest"]

    def __len__(self):
        return len(self._records)

    def find(self, caption: str) -> np.ndarray | None:
        """The embeddings float16 [m, E] of a caption, m = 0 for the empty one; None if unknown."""
        if not caption:
            return np.zeros((0, self.width), EMBEDDING)
        place = np.searchsorted(self._keys, np.uint64(key_of(caption)))
        for record in range(place, len(self)):
            if self._keys[record] != key_of(caption):
                return None
            try:
                header, content = shards.fetch(self._records, record, HEADER)
                if header["caption"] == caption:
                    return np.frombuffer(content, EMBEDDING).reshape(-1, self.width)
            except UserError as error:
                raise _named(error) from error
            except ValueError as error:
                message = f"text_path={self.path}: bad embeddings of {caption!r}; {shards.COPY}"
                raise UserError(message) from error
        return None


def _named(error):
    """The error of a set, which names the field `path`, by the name that it has here."""
    return UserError(str(error).replace("path=", "text_path=", 1))

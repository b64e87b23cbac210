"""Captions as arrays: bytes for an encoder that is trained, frozen word vectors, or stored ones.

In each of them the rows behind the end of a caption are zeros. Word vectors are text conditioning
without a network or a download. Stored embeddings are those of `data.captions`.
"""

import functools
import hashlib
import re
import unicodedata
from collections.abc import Callable

import numpy as np
from absl import logging

from jaxvid import checks
from jaxvid.data.captions import Captions
from jaxvid.errors import UserError, shown

KINDS = ("bytes", "words", "stored")
MAX_TOKENS = 2**12  # positions of a caption
MAX_WIDTH = 2**16  # of the embedding of a position
_WORD = re.compile(r"[^\W_]+|,")
WARNINGS = 5  # about captions that are cut
_WORD_OF_KINDS = re.compile("om*|w(?:j*[wm])*|,")
_JOINERS = "\u200c\u200d"  # between letters of one word, in Indic and Arabic scripts
# Scripts without spaces between words: Han, Hiragana, Thai and Lao, Myanmar, Khmer.
_ONE_BY_ONE = re.compile(
    "[\u2e80-\u2fdf\u3005-\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
    "\u3041-\u309f\u0e00-\u0eff\u1000-\u109f\ua9e0-\ua9ff\uaa60-\uaa7f\u1780-\u17ff]"
)


def check(config) -> None:
    """Raise UserError for fields of config.data that no text has."""
    checks.at_least("text_tokens", config.text_tokens, 0, at_most=MAX_TOKENS)
    checks.at_least("text_width", config.text_width, 1, at_most=MAX_WIDTH)
    checks.choose("text", kind(config), KINDS)
    if kind(config) == "stored":
        remedy = "missing; name the set that jaxvid.tokenize --text wrote"
        checks.require(config.get("text_path"), "text_path", "", remedy)


def kind(config) -> str:
    """How config.data asks for captions, one of KINDS; runs of earlier versions have words."""
    return config.get("text", "words")


def shape(config) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of a caption in a batch of config.data."""
    if kind(config) == "bytes":
        return (config.text_tokens,), np.dtype(np.uint8)
    return (config.text_tokens, config.text_width), np.dtype(np.float32)


def reader(config) -> Callable[[str], np.ndarray]:
    """The function of a caption to its array, of `shape`, that config.data asks for.

    Captions that are too long are cut, with a warning for the first few of a process. One without
    content is all zeros, which `models.conditioning` takes for no condition.
    """
    if kind(config) == "bytes":
        return functools.partial(spell, tokens=config.text_tokens)
    if kind(config) == "stored":
        return functools.partial(look_up, open_stored(config), tokens=config.text_tokens)
    return functools.partial(embed, tokens=config.text_tokens, width=config.text_width)


def open_stored(config) -> Captions:
    """The set in config.text_path. Raises UserError unless it suits config.data."""
    stored = Captions(config.text_path)
    remedy = f"text_path holds embeddings of the width {stored.width}; use that"
    checks.require(config.text_width == stored.width, "text_width", config.text_width, remedy)
    digest = config.get("text_digest", "")
    remedy = f"text_path holds embeddings of another encoder, {stored.digest}; bring back the old"
    checks.require(digest in ("", stored.digest), "text_digest", digest, f"{remedy} set")
    return stored


def binding(config) -> dict[str, str]:
    """Fields of config.data that bind a run to the encoder of its stored captions."""
    is_bound = config.text_tokens and kind(config) == "stored" and "text_digest" in config
    return {"text_digest": open_stored(config).digest} if is_bound else {}


def look_up(stored: Captions, caption: str, tokens: int) -> np.ndarray:
    """Caption -> its stored embeddings [M, E]. Raises UserError if it has none."""
    found_ME = stored.find(clean(caption))
    if found_ME is None:
        raise UserError(
            f"text='stored': the caption {shown(caption)} is not among the {len(stored)} of "
            f"text_path={stored.path}; encode all captions with python -m jaxvid.tokenize --text"
        )
    return pad(found_ME, tokens)


def pad(text_ME: np.ndarray, tokens: int) -> np.ndarray:
    """Embeddings of a caption, of any length -> float32 [tokens, E]."""
    if len(text_ME) > tokens:
        warn_cut(len(text_ME), "tokens", tokens, f"token {tokens}")
    padding = ((0, max(tokens - len(text_ME), 0)), (0, 0))
    return np.pad(text_ME[:tokens].astype(np.float32), padding)


def clean(caption: str) -> str:
    """A caption as Unicode composes it (NFC), without what is no text.

    Composed and decomposed spellings are equal. NUL and parts of names that are not UTF-8 become
    spaces, and spaces around the caption are dropped.
    """
    caption = unicodedata.normalize("NFC", caption)
    return re.sub("[\0\ud800-\udfff]", " ", caption).strip()


def spell(caption: str, tokens: int) -> np.ndarray:
    """Caption -> its UTF-8 bytes in lower case, uint8 [M], zeros after the last.

    Lower case, so that a prompt may begin with a capital. A letter of several bytes is not cut.
    """
    found = clean(caption.lower()).encode()
    kept = found[:tokens].decode(errors="ignore").encode()
    if len(kept) < len(found):
        warn_cut(len(found), "bytes", tokens, found[len(kept) :][:20].decode(errors="ignore"))
    return np.frombuffer(kept.ljust(tokens, b"\0"), np.uint8)


def warn_cut(length: int, unit: str, tokens: int, rest: str) -> None:
    """Warn of a caption that is cut before `rest`; for the first few captions of a process."""
    logging.log_first_n(
        logging.WARNING,
        "a caption has %d %s and text_tokens=%d: it is cut before %r; shorten it, or train with "
        "more data.text_tokens",
        WARNINGS,
        length,
        unit,
        tokens,
        rest,
    )


def words(caption: str) -> list[str]:
    """Lower-case words of a caption; a comma counts as a word, as it separates phrases.

    A word is letters and digits with the marks that combine with them. In scripts without spaces
    each letter is a word, with its marks. Both are default word boundaries of Unicode (UAX #29).
    Composed and decomposed spellings (NFC and NFD) are equal.
    """
    if caption.isascii():
        return _WORD.findall(caption.lower())
    caption = unicodedata.normalize("NFC", unicodedata.normalize("NFC", caption).lower())
    kinds = "".join(map(_kind, caption))
    return [caption[word.start() : word.end()] for word in _WORD_OF_KINDS.finditer(kinds)]


def _kind(letter):
    """w: part of a word. o: a whole word. m: combining mark. j: joiner. Comma and space: others."""
    if letter in _JOINERS:
        return "j"
    if unicodedata.category(letter).startswith("M"):
        return "m"
    if not letter.isalnum():
        return "," if letter == "," else " "
    return "o" if _ONE_BY_ONE.match(letter) and not letter.isdecimal() else "w"


@functools.lru_cache(maxsize=65536)
def _vector(word, width):
    """The unit vector of a word, seeded by its SHA-256: equal on every machine and in every run."""
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:16], "little")
    vector_E = np.random.default_rng(seed).standard_normal(width)
    return (vector_E / np.linalg.norm(vector_E)).astype(np.float32)


@functools.lru_cache(maxsize=64)
def _positions(tokens, width):
    """A unit vector for each position in the caption, [M, E]."""
    return np.stack([_vector(f"place {position}", width) for position in range(tokens)])


def embed(caption: str, tokens: int, width: int) -> np.ndarray:
    """Caption -> float32 [M, E]: unit rows (word + position, normalised), zeros after the last.

    Positions let attention bind "red" to "square". Words beyond `tokens` are dropped.
    """
    text_ME = np.zeros((tokens, width), np.float32)
    found = words(caption)
    kept, dropped = found[:tokens], found[tokens:]
    if dropped:
        warn_cut(len(found), "words", tokens, dropped[0])
    if kept:
        sum_ME = np.stack([_vector(word, width) for word in kept])
        sum_ME = sum_ME + _positions(tokens, width)[: len(kept)]
        text_ME[: len(kept)] = sum_ME / np.linalg.norm(sum_ME, axis=1, keepdims=True)
    return text_ME

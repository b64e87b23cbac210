"""Frozen word vectors: text conditioning without a network or a download."""

import functools
import hashlib
import re

import numpy as np

_WORD = re.compile(r"[^\W_]+|,")


def words(caption: str) -> list[str]:
    """Lower-case words of a caption; a comma counts as a word, as it separates phrases."""
    return _WORD.findall(caption.lower())


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
    kept = words(caption)[:tokens]
    if kept:
        sum_ME = np.stack([_vector(word, width) for word in kept])
        sum_ME = sum_ME + _positions(tokens, width)[: len(kept)]
        text_ME[: len(kept)] = sum_ME / np.linalg.norm(sum_ME, axis=1, keepdims=True)
    return text_ME

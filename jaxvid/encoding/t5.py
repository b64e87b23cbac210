"""T5 1.1 from the files of a user: weights, tokenizer, and captions as embeddings.

    t5 = open_t5("FOLDER")  # *.safetensors, and spiece.model or tokenizer.json
    [x_ME, ...] = t5.encode(["a red square moves left"], tokens=128)

Both files are those of the Hugging Face hub, as "google/t5-v1_1-xxl" has them; a file of the whole
T5 does as well as one of the encoder alone.
"""

import dataclasses
import functools
import hashlib
import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import numpy as np

from jaxvid import checks, memory, weights
from jaxvid.data import text
from jaxvid.errors import UserError
from jaxvid.models.t5 import T5Encoder

TOKENIZERS = {"tokenizer.json": "tokenizers", "spiece.model": "sentencepiece"}  # file -> library
END, PADDING = 1, 0  # ids of T5

# Arrays of the decoder, and the second name of the embeddings.
_IGNORED = re.compile(r"^decoder\.|^lm_head\.|^encoder\.embed_tokens\.weight$")


@dataclasses.dataclass(frozen=True)
class T5:
    """A frozen text encoder. tokenize: caption -> ids with END as the last one."""

    module: T5Encoder
    params: dict
    tokenize: Callable[[str], list[int]]

    @functools.cached_property
    def _apply(self):
        return jax.jit(self.module.apply)

    def encode(self, captions: Sequence[str], tokens: int) -> list[np.ndarray]:
        """Embeddings of each caption, float16 [m, E] with m <= tokens.

        A longer caption is cut before its END, with a warning. One without content has m = 0.
        Raises UserError for embeddings that are not finite, and for a tokenizer whose ids the
        embeddings do not have.
        """
        rows = [self._ids(text.clean(caption), tokens) for caption in captions]
        longest = max(map(len, rows), default=0)
        if not longest:
            return [np.zeros((0, self.module.width), np.float16) for _ in rows]
        # Few lengths, so that few programs are compiled.
        ids_BM = np.full((len(rows), max(8, 1 << (longest - 1).bit_length())), PADDING, np.int32)
        for row, ids in zip(ids_BM, rows):
            row[: len(ids)] = ids
        x_BME = np.asarray(self._apply({"params": self.params}, ids_BM))
        found = [x_ME[: len(ids)].astype(np.float16) for x_ME, ids in zip(x_BME, rows)]
        for caption, x_ME in zip(captions, found):
            remedy = "its embeddings are not finite; are the weights of T5 damaged?"
            checks.require(np.isfinite(x_ME).all(), "caption", caption, remedy)
        return found

    def _ids(self, caption, tokens):
        if not caption:
            return []
        ids = self.tokenize(caption)
        if len(ids) > tokens:
            text.warn_cut(len(ids), "tokens", tokens, f"token {tokens}")
        if not 0 < max(ids) < self.module.vocabulary or min(ids) <= PADDING:
            raise UserError(
                f"text: the tokenizer gives the ids {min(ids)} to {max(ids)}, and the weights have "
                f"1 to {self.module.vocabulary - 1}; are both files of the same T5?"
            )
        return ids if len(ids) <= tokens else [*ids[: tokens - 1], END]


def files_of(folder: str | Path, field: str = "text") -> list[Path]:
    """The weight files of a folder, and then its tokenizer. Raises UserError, naming `field`."""
    folder = Path(checks.local_path(field, folder))
    if not folder.is_dir():
        raise UserError(f"{field}={folder}: no such folder; name one with the files of T5")
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        raise UserError(f"{field}={folder}: holds no .safetensors; put the weights of T5 1.1 there")
    tokenizers = [folder / name for name in TOKENIZERS if (folder / name).is_file()]
    if not tokenizers:
        names = " or ".join(TOKENIZERS)
        raise UserError(f"{field}={folder}: holds no {names}; put the tokenizer of T5 there")
    return [*found, _usable(tokenizers)]


def digest_of(folder: str | Path, field: str = "text") -> str:
    """A name for the weights in a folder. Raises UserError."""
    try:
        sums = [weights.digest(path) for path in files_of(folder, field)[:-1]]
    except OSError as error:
        raise UserError(f"{field}={folder}: {error.strerror or error}") from error
    return hashlib.sha256(" ".join(sums).encode()).hexdigest()[:16]


def open_t5(folder: str | Path, field: str = "text") -> T5:
    """The encoder in a folder. Raises UserError, naming `field`, for files that are none of T5."""
    *parts, tokenizer = files_of(folder, field)
    size = sum(path.stat().st_size for path in parts)
    memory.require(f"{field}={folder}", "weights", 2 * size, remedy="use a smaller T5")
    arrays = {}
    for path in parts:
        arrays |= weights.read(path, field)
    tokenize = open_tokenizer(tokenizer, field)
    module, params = import_t5(arrays, f"{field}={folder}")
    return T5(module, jax.device_put(params), tokenize)


def import_t5(arrays: Mapping[str, np.ndarray], source: str = "t5") -> tuple[T5Encoder, dict]:
    """{name: array} of a state dict of PyTorch -> (`T5Encoder`, its params).

    Sizes follow from the shapes. Raises UserError, beginning with `source`, for arrays that are
    missing, have other shapes, or belong to no layer.
    """
    file = _File(arrays, source)
    block, attention = "encoder.block.{}.layer", "0.SelfAttention"
    first = block.format(0)
    if f"{first}.1.DenseReluDense.wi.weight" in arrays:
        raise UserError(f"{source}: is T5 1.0, whose MLP has no gate; use weights of T5 1.1")
    table_RA = file.take(f"{first}.{attention}.relative_attention_bias.weight", None, None)
    name = "shared.weight" if "shared.weight" in arrays else "encoder.embed_tokens.weight"
    embed_VD = file.take(name, None, None)
    (V, D), (R, A) = embed_VD.shape, table_RA.shape
    numbers = (re.match(r"encoder\.block\.(\d+)\.", name) for name in arrays)
    depth = 1 + max((int(match[1]) for match in numbers if match), default=-1)
    inner = len(file.take(f"{first}.{attention}.q.weight", None, D))
    hidden = len(file.take(f"{first}.1.DenseReluDense.wi_0.weight", None, D))
    if not A or inner % A or R < 4 or R % 4:
        raise UserError(f"{source}: {A} heads of {inner} channels, {R} buckets: not those of T5")
    params = {"embed": {"embedding": embed_VD}, "bias": table_RA}
    for layer in range(depth):
        own = block.format(layer)
        attend, mlp = f"{own}.{attention}", f"{own}.1.DenseReluDense"
        for ours, theirs, shape in (
            *((f"layer_{layer}_{part}", f"{attend}.{part}", (inner, D)) for part in "qkv"),
            (f"layer_{layer}_out", f"{attend}.o", (D, inner)),
            (f"mlp_{layer}_gate", f"{mlp}.wi_0", (hidden, D)),
            (f"mlp_{layer}_up", f"{mlp}.wi_1", (hidden, D)),
            (f"mlp_{layer}_down", f"{mlp}.wo", (D, hidden)),
        ):
            params[ours] = {"kernel": file.take(f"{theirs}.weight", *shape).T}
        params[f"norm_{layer}"] = {"scale": file.take(f"{own}.0.layer_norm.weight", D)}
        params[f"mlp_norm_{layer}"] = {"scale": file.take(f"{own}.1.layer_norm.weight", D)}
    params["norm"] = {"scale": file.take("encoder.final_layer_norm.weight", D)}
    file.check_all_taken()
    module = T5Encoder(V, D, depth, A, inner // A, hidden, buckets=R)
    return module, params


class _File:
    """Arrays of a state dict, taken by name; keeps track of the rest."""

    def __init__(self, arrays, source):
        self._arrays, self._source = arrays, source
        self._untaken = {name for name in arrays if not _IGNORED.search(name)}

    def take(self, name, *shape):
        """The array as float32; a size of None may be any. UserError if it does not fit."""
        self._untaken.discard(name)
        found = np.shape(self._arrays.get(name, ()))
        if len(found) == len(shape):
            shape = tuple(have if want is None else want for have, want in zip(found, shape))
        return weights.take(self._arrays, name, shape, self._source)

    def check_all_taken(self):
        names = sorted(self._untaken)
        if names:
            more = f" and {len(names) - 4} more" if len(names) > 4 else ""
            raise UserError(
                f"{self._source}: no layer takes {', '.join(names[:4])}{more}; "
                "is it of another network?"
            )


# Tokenizers


def _usable(paths):
    """The first tokenizer whose library is installed, else the first."""
    return next((p for p in paths if importlib.util.find_spec(TOKENIZERS[p.name])), paths[0])


def open_tokenizer(path: str | Path, field: str = "text") -> Callable[[str], list[int]]:
    """A file of the library tokenizers (.json) or sentencepiece -> caption to ids, END at the end.

    Raises UserError, naming `field`, without the library and for a file that is none of T5.
    """
    path = Path(path)
    library, load = ("tokenizers", _json) if path.suffix == ".json" else ("sentencepiece", _pieces)
    try:
        tokenize, ids = load(path)
    except ImportError:
        raise UserError(
            f"{field}={path}: needs the library {library}; pip install {library}"
        ) from None
    except Exception as error:  # of a broken file, which may be any
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UserError(f"{field}={path}: is no file of {library} ({reason[:120]})") from error
    if ids != (PADDING, END):
        raise UserError(
            f"{field}={path}: <pad> and </s> have the ids {ids[0]} and {ids[1]}, not {PADDING} and "
            f"{END}; use the tokenizer of T5"
        )
    return tokenize


def _json(path):
    import tokenizers  # optional

    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    tokenizer.no_padding()
    tokenizer.no_truncation()

    def tokenize(caption):
        ids = tokenizer.encode(caption).ids
        return ids if ids[-1:] == [END] else [*ids, END]

    return tokenize, (tokenizer.token_to_id("<pad>"), tokenizer.token_to_id("</s>"))


def _pieces(path):
    import sentencepiece  # optional

    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(path.read_bytes())

    def tokenize(caption):
        return [*processor.EncodeAsIds(caption), END]

    return tokenize, (processor.pad_id(), processor.eos_id())

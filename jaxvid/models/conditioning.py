"""The condition of a video as a short sequence of context embeddings, with a learned null."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxvid.checks import at_least, choose, require
from jaxvid.errors import UserError
from jaxvid.mixers import check_depth, check_heads
from jaxvid.models.text import ByteEncoder, TextReader

KINDS = ("none", "class", "text")
ENCODERS = ("none", "bytes")
MAX_TOKENS, MAX_WIDTH = 2**12, 2**16


class Conditioner(nn.Module):
    """Conditions -> context_BME float32, or None for kind "none".

    kind "class": label_B int32 looks up `tokens` learned embeddings of `width`. kind "text": the
    text has `tokens` positions. With encoder "bytes" it is ids_BM, bytes with 0 as padding, and a
    `models.text.ByteEncoder` with `depth`, `heads` and `width` embeds them. With encoder "none" it
    is x_BME, embeddings of a frozen encoder, whose padding are rows of zeros. `queries` learned
    queries read the positions that are no padding (`models.text.TextReader`), so the context is
    [B, queries, width] and needs no mask. queries=0 is for encoder "none" alone: its embeddings, of
    `width`, are the context [B, tokens, width], with the zeros of the padding.

    Where `drop_B` is true, one learned null context replaces the context of the sample, as guidance
    needs (Ho and Salimans 2022). It also replaces a text that is all padding, that of a caption
    without words. Raises UserError for values that cannot work.
    """

    kind: str
    tokens: int
    width: int
    num_classes: int = 0
    encoder: str = "none"
    queries: int = 0
    depth: int = 2
    heads: int = 4

    def __post_init__(self):
        choose("kind", self.kind, KINDS)
        choose("encoder", self.encoder, ENCODERS)
        at_least("tokens", self.tokens, 1, at_most=MAX_TOKENS)
        at_least("width", self.width, 1, at_most=MAX_WIDTH)
        least = 1 if self.kind == "class" else 0
        at_least("num_classes", self.num_classes, least, at_most=2**31 - 1)  # labels are int32
        at_least("queries", self.queries, 0, at_most=MAX_TOKENS)
        remedy = "the padding behind bytes would be read; use 8, or encoder=none"
        require(self.encoder == "none" or self.queries, "queries", self.queries, remedy)
        if self.queries:
            check_heads(self.width, self.heads)
            check_depth("depth", self.depth)
        super().__post_init__()

    @nn.compact
    def __call__(self, drop_B, label_B=None, text=None):
        if self.kind == "none":
            return None
        init = nn.initializers.normal(1.0)
        is_read = self.kind == "text" and self.queries
        shape = (self.queries if is_read else self.tokens, self.width)
        null_ME = self.param("null", init, shape)
        if self.kind == "class":
            table_VME = self.param("classes", init, (self.num_classes, *shape))
            context_BME = table_VME[label_B]
        else:
            context_BME, valid_BM = self._encode(text)
            drop_B = drop_B | ~valid_BM.any(1)
            if is_read:
                reader = TextReader(self.queries, self.width, self.heads, name="reader")
                context_BME = reader(context_BME, valid_BM)
        return jnp.where(drop_B[:, None, None], null_ME, context_BME)

    def _encode(self, text):
        """(x_BME float32, valid_BM) of the text of a batch."""
        has_bytes = jnp.issubdtype(text.dtype, jnp.integer)
        remedy = "are bytes; use bytes" if has_bytes else "are embedded already; use none"
        wanted = "bytes" if has_bytes else "none"
        remedy = f"the captions of the data (data.text) {remedy}, or another data.text"
        require(self.encoder == wanted, "encoder", self.encoder, remedy)
        if has_bytes:
            encoder = ByteEncoder(self.width, self.depth, self.heads, name="encoder")
            return encoder(text), text > 0
        if not self.queries:  # the text is the context
            for field, size in zip(("tokens", "width"), text.shape[1:]):
                remedy = f"the text of the data has {size}; use {size}, or queries=8"
                require(getattr(self, field) == size, field, getattr(self, field), remedy)
        return text.astype(jnp.float32), text.any(-1)

    def arguments(self, batch: Mapping[str, jax.Array], size: int) -> dict[str, jax.Array]:
        """The arguments that a batch of `size` clips, or a sampling condition, has for a call.

        A condition without a label has class 0. Raises UserError if there is no text.
        """
        if self.kind == "class":
            return {"label_B": batch["label"] if "label" in batch else jnp.zeros(size, jnp.int32)}
        if self.kind == "text":
            if "text" not in batch:
                raise UserError(
                    "kind='text': the data has no captions; set data.text_tokens, or "
                    "task.condition.kind=none"
                )
            return {"text": batch["text"]}
        return {}

"""The condition of a video as a short sequence of context embeddings, with a learned null."""

import flax.linen as nn
import jax.numpy as jnp

from jaxvid.checks import at_least, choose

KINDS = ("none", "class", "text")
MAX_TOKENS, MAX_WIDTH = 2**12, 2**16


class Conditioner(nn.Module):
    """Conditions -> context_BME float32, or None for kind "none".

    kind "class": label_B int32 looks up `tokens` learned embeddings of `width`. kind "text":
    text_BME, embeddings of a frozen text encoder, [B, tokens, width], pass through. Where `drop_B`
    is true, one learned null context replaces the context of the sample, as guidance needs (Ho and
    Salimans 2022). It also replaces a text of zeros, that of a caption without words. Raises
    UserError for an unknown kind.
    """

    kind: str
    tokens: int
    width: int
    num_classes: int = 0

    def __post_init__(self):
        choose("kind", self.kind, KINDS)
        at_least("tokens", self.tokens, 1, at_most=MAX_TOKENS)
        at_least("width", self.width, 1, at_most=MAX_WIDTH)
        least = 1 if self.kind == "class" else 0
        at_least("num_classes", self.num_classes, least, at_most=2**31 - 1)  # labels are int32
        super().__post_init__()

    @nn.compact
    def __call__(self, drop_B, label_B=None, text_BME=None):
        if self.kind == "none":
            return None
        init = nn.initializers.normal(1.0)
        shape = (self.tokens, self.width)
        null_ME = self.param("null", init, shape)
        if self.kind == "class":
            table_VME = self.param("classes", init, (self.num_classes, *shape))
            context_BME = table_VME[label_B]
        else:
            context_BME = text_BME.astype(jnp.float32)
            drop_B = drop_B | ~context_BME.any((1, 2))
        return jnp.where(drop_B[:, None, None], null_ME, context_BME)

"""What a video is conditioned on, as a short sequence of context embeddings with a real null."""

import flax.linen as nn
import jax.numpy as jnp

KINDS = ("none", "class", "text")


class Conditioner(nn.Module):
    """Conditions -> context_BME float32, or None for kind "none".

    kind "class": label_B int32 looks up `tokens` learned embeddings of `width`. kind "text":
    text_BME, embeddings of a frozen text encoder, [B, tokens, width], pass through. Where `drop_B`
    is true the sample's context becomes one learned null context, which guidance needs (Ho and
    Salimans 2022).
    """

    kind: str
    tokens: int
    width: int
    num_classes: int = 0

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
        return jnp.where(drop_B[:, None, None], null_ME, context_BME)

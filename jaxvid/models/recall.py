"""A small model of symbol streams that tests how much a temporal mixer recalls."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jaxvid.checks import at_least
from jaxvid.errors import within
from jaxvid.layers.conv import CausalConv
from jaxvid.layers.linear import Linear
from jaxvid.mixers import check_depth, check_heads, check_options, kinds, make_mixer
from jaxvid.parallel.sharding import shard

CONV = 3  # frames that the convolution reads


class Recall(nn.Module):
    """Layers of a short convolution and a temporal mixer, without MLPs (Arora et al. 2023).

    ids_BT int32 -> (logits_BTV float32, state); the state None starts a stream. The convolution
    shows a layer the symbols just before; mixers without positions could not otherwise join a value
    to its key. state: (past of the convolution, memory of the mixer) for every layer. mixer: the
    name in `mixers.MIXERS` and the options of that mixer; with `every`, each such layer is softmax
    instead (`jaxvid.mixers`). Raises UserError for values that cannot work.
    """

    vocabulary: int
    width: int
    depth: int
    heads: int
    mixer: Mapping[str, Any]
    dtype: Any = jnp.float32

    def __post_init__(self):
        at_least("vocabulary", self.vocabulary, 1)
        check_heads(self.width, self.heads)
        with within("mixer"):
            check_options(self.mixer, self.heads)
        check_depth("depth", self.depth, self.mixer.get("every", 0))
        super().__post_init__()

    @nn.compact
    def __call__(self, ids_BT, state=None):
        shared = dict(width=self.width, heads=self.heads, dtype=self.dtype)
        norm = dict(dtype=self.dtype)
        x_BTD = nn.Embed(self.vocabulary, self.width, dtype=self.dtype, name="embed")(ids_BT)
        x_BTND, states = shard(x_BTD[:, :, None], "BTND"), []
        mixers = kinds(self.mixer)
        for i, (past, memory) in enumerate(state or ((None, None),) * self.depth):
            h_BTND = nn.RMSNorm(**norm, name=f"norm_{i}")(x_BTND)
            y_BTND, past = CausalConv(CONV, self.dtype, name=f"conv_{i}")(h_BTND, past)
            mixer = make_mixer(mixers[i % len(mixers)], name=f"mixer_{i}", **shared)
            y_BTND, memory = mixer(h_BTND + y_BTND, memory)
            x_BTND = shard(x_BTND + y_BTND, "BTND")
            states.append((past, memory))
        x_BTD = nn.RMSNorm(**norm, name="norm")(x_BTND[:, :, 0])
        return Linear(self.vocabulary, dtype=jnp.float32, name="head")(x_BTD), tuple(states)

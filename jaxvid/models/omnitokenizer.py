"""OmniTokenizer: windows in space, causal attention in time (Wang et al. 2024)."""

from collections.abc import Mapping
from typing import Any

from flax.core import FrozenDict

from jaxvid.models.cvivit import CViViT


class OmniTokenizer(CViViT):
    """`CViViT` with window attention at the end of the encoder and rotary positions in space.

    The mixer "softmax" rotates by frame as well. It takes the place of the linear bias that the
    released code computes and then drops.
    """

    t_patch: int = 4
    encode_blocks: str = "ttww"
    position: str = "rope"
    mixer: Mapping[str, Any] = FrozenDict(name="softmax")

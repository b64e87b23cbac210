"""The interface of a data source."""

import hashlib
import json

import numpy as np

SPLITS = ("train", "validation")
VALIDATION_CLIPS = 1024  # of a generated set


def digest_of(description) -> str:
    """A `Source.digest` from a description in JSON of the clips."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


class Source:
    """The clips of one split, by index. `data.make_source` calls the class with (config, split).

    num_classes: labels lie in [0, num_classes), or are all 0. captions: whether there are any.
    tokenizer: digest of the tokenizer that encoded the clips; "" for a source of video. digest: a
    name for the clips of both splits, wherever they lie; "" if config.data alone names them. fps:
    frames per second of the source; 0 if files have rates of their own, or none.
    """

    num_classes: int = 0
    captions: bool = False
    tokenizer: str = ""
    digest: str = ""
    fps: float = 0.0

    def __len__(self) -> int:
        raise NotImplementedError

    def listing(self) -> str:
        """A text that differs between lists of clips; all hosts must have the same."""
        return str(len(self))

    def name(self, index: int) -> str:
        """The name of a clip in messages."""
        raise NotImplementedError

    def read(self, index: int, rng: np.random.Generator | None = None) -> dict:
        """An example of clip `index`; `rng` makes the random choices, None takes the default.

        "video" uint8 [T, H, W, 3], "label" and "caption" ("" if there is none). A source of encoded
        clips has "latents" float32 [T, N, Z] or "tokens" int32 [T, N]; its "video" is present for
        validation only.
        """
        raise NotImplementedError

    def caption(self, index: int) -> str:
        """The caption of clip `index` alone."""
        return self.read(index)["caption"]

    def __getitem__(self, index: int) -> dict:
        return self.read(index)

"""Prompts as the network reads captions, also where a frozen encoder has embedded these."""

from collections.abc import Sequence

import numpy as np

from jaxvid.data import text
from jaxvid.encoding import t5
from jaxvid.errors import UserError, shown


def read(config, prompts: Sequence[str], field: str = "prompt") -> np.ndarray:
    """Prompts -> rows of the "text" of a batch of config.data, [n, M] or [n, M, E].

    With stored embeddings, a prompt that is not among them is encoded by the encoder of the set,
    whose files must still be in their folder. Raises UserError, naming `field`.
    """
    for prompt in prompts:
        if any("\ud800" <= letter <= "\udfff" for letter in prompt):
            raise UserError(f"{field}={shown(prompt)}: is not UTF-8; write it in UTF-8")
    if text.kind(config) != "stored":
        return np.stack(list(map(text.reader(config), prompts)))
    stored = text.open_stored(config)
    found = [stored.find(text.clean(prompt)) for prompt in prompts]
    unknown = [number for number, x_ME in enumerate(found) if x_ME is None]
    if unknown:
        encoded = _encode(stored, [prompts[number] for number in unknown], field)
        for number, x_ME in zip(unknown, encoded):
            found[number] = x_ME
    return np.stack([text.pad(x_ME, config.text_tokens) for x_ME in found])


def _encode(stored, prompts, field):
    """Embeddings of prompts by the encoder of a `Captions`."""
    place = f"{field}={shown(prompts[0])}: is not among the {len(stored)} captions of {stored.path}"
    try:
        digest = t5.digest_of(stored.encoder, "encoder")
        if digest != stored.digest:
            raise UserError(f"encoder={stored.encoder}: has other weights, {digest}")
        encoder = t5.open_t5(stored.encoder, "encoder")
    except UserError as error:
        raise UserError(
            f"{place}, and its encoder cannot be used: {error}; bring its files back, or use a "
            "caption of the set"
        ) from error
    return encoder.encode(prompts, stored.tokens)

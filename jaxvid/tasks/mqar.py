"""Multi-query associative recall: how many pairs a temporal mixer keeps apart in its state."""

import functools
import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import optax

from jaxvid import schema
from jaxvid.checks import at_least, choose
from jaxvid.data.mqar import BLANK, MAX_VOCABULARY
from jaxvid.data.transforms import normalize
from jaxvid.errors import UserError, within
from jaxvid.models.recall import Recall
from jaxvid.tasks import base

DTYPES = ("float32", "bfloat16")


class Task(base.Task):
    """Answer with the value of every key that a stream asks for again (`data.mqar`).

    vocabulary, pairs: of the data. model: options of `models.recall.Recall`.
    """

    def __init__(self, *, vocabulary: int, pairs: tuple[int, ...], model: Mapping):
        at_least("vocabulary", vocabulary, 4, at_most=MAX_VOCABULARY)
        self.vocabulary, self.pairs = vocabulary, tuple(pairs)
        with within("model"):
            choose("dtype", model.get("dtype"), DTYPES)
            options = {**model, "dtype": jnp.dtype(model["dtype"])}
            self.model = schema.build(Recall, options, vocabulary=vocabulary)

    def check(self, source):
        """Raise UserError for a source of anything but symbols."""
        if not source.name(0).startswith("mqar"):
            raise UserError("name=mqar: reads symbols; use data.name=mqar")

    def split_frames(self, frames):
        """The frames, each a symbol; see `tasks.base.Task`."""
        return frames

    def init(self, rng, batch):
        """(params, {}) for a batch of arrays or of their shapes."""
        ids_BT = jnp.zeros(batch["video"].shape[:2], jnp.int32)
        return self.model.init(rng, ids_BT)["params"], {}

    def loss(self, params, batch, rng, *, step, frozen, extra):
        """Cross-entropy of the answers, over all queries of the batch."""
        del rng, step, frozen
        ids_BT = read(batch["video"])
        answer_BT, is_query_BT = answers(ids_BT, self.vocabulary)
        logits_BTV, _ = self.model.apply({"params": params}, ids_BT)
        loss_BT = optax.softmax_cross_entropy_with_integer_labels(logits_BTV, answer_BT)
        weight = is_query_BT.sum()
        queries = jnp.maximum(weight, 1)
        right_BT = (logits_BTV.argmax(-1) == answer_BT) & is_query_BT
        loss = (loss_BT * is_query_BT).sum() / queries
        return loss, ({"accuracy": right_BT.sum() / queries}, extra, weight)

    def evaluate(self, params, batch, rng, *, frozen):
        """accuracy [B]: share of right answers; accuracy_<P>, the same of streams with P pairs.

        state [B]: numbers in the states of the mixers for one stream, the same for all streams.
        """
        del rng, frozen
        ids_BT = read(batch["video"])
        answer_BT, is_query_BT = answers(ids_BT, self.vocabulary)
        logits_BTV, state = self.model.apply({"params": params}, ids_BT)
        right_BT = (logits_BTV.argmax(-1) == answer_BT) & is_query_BT
        pairs_B = is_query_BT.sum(axis=1)
        accuracy_B = right_BT.sum(axis=1) / pairs_B
        memories = jax.tree.leaves([memory for _, memory in state])
        B = ids_BT.shape[0]
        numbers = sum(math.prod(x.shape) for x in memories if x.ndim > 1) // B
        return {
            "accuracy": accuracy_B,
            **{f"accuracy_{P}": jnp.where(pairs_B == P, accuracy_B, jnp.nan) for P in self.pairs},
            "state": jnp.full(B, numbers),
        }

    def sample(self, params, rng, cond, *, frozen, frames=None):
        """The streams `cond["video"]` with every query replaced by the answer."""
        del rng, frozen, frames
        return self._answered(params, cond["video"])

    @functools.partial(jax.jit, static_argnames="self")
    def _answered(self, params, video_u8):
        ids_BT = read(video_u8)
        _, is_query_BT = answers(ids_BT, self.vocabulary)
        logits_BTV, _ = self.model.apply({"params": params}, ids_BT)
        shown_BT = jnp.where(is_query_BT, logits_BTV.argmax(-1), ids_BT)
        colour = jnp.stack([shown_BT % 256, shown_BT // 256, jnp.zeros_like(shown_BT)], axis=-1)
        colour_BTHWC = colour[:, :, None, None].astype(jnp.uint8)
        return normalize(jnp.broadcast_to(colour_BTHWC, video_u8.shape))


def read(video_BTHWC):
    """The symbols int32 [B, T] of frames that `data.mqar.paint` made."""
    red_BT, green_BT = (video_BTHWC[:, :, 0, 0, i].astype(jnp.int32) for i in (0, 1))
    return red_BT + 256 * green_BT


def answers(ids_BT, vocabulary):
    """(value of the queried key int32 [B, T], whether a frame is a query bool [B, T]).

    A key followed by a value is given, any other key is a query. The answer is 0 where there is no
    query.
    """
    half = vocabulary // 2
    next_BT = jnp.pad(ids_BT[:, 1:], ((0, 0), (0, 1)), constant_values=BLANK)
    is_key_BT = (ids_BT > BLANK) & (ids_BT < half)
    is_given_BT = is_key_BT & (next_BT >= half)
    is_query_BT = is_key_BT & ~is_given_BT
    same_BTM = (ids_BT[:, :, None] == ids_BT[:, None]) & is_given_BT[:, None]
    return (same_BTM * next_BT[:, None]).sum(-1) * is_query_BT, is_query_BT

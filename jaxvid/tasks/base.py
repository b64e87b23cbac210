"""The interface between what is trained and what trains, evaluates and samples it."""

import abc
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from jaxvid.errors import UserError
from jaxvid.models.tokenizer import Tokenizer

Tree = Any  # a pytree of arrays
Batch = dict[str, jax.Array]


class Task(abc.ABC):
    """What is trained: a class `Task` in the module `jaxvid.tasks.<config.task.name>`.

    It is built from the other fields of `config.task`. `init`, `loss` and `evaluate` are pure and
    traceable. Settings that cannot work raise UserError in `__init__`, named relative to
    `config.task`.

    batch: {"video": uint8 [B, T, H, W, 3], "id": int32 [B], "label": int32 [B]}, with "text"
    (bytes uint8 [B, M] or embeddings float32 [B, M, E]) if captions are read, and "latents" or
    "tokens" if the data set caches those of a tokenizer. params, extra, frozen: trees of arrays.
    """

    given = 0
    """Clean frames at the start of the clips that `evaluate` continues."""

    baselines: tuple[str, ...] = ()
    """Guesses without a network: a metric `psnr` of theirs is called `psnr_<baseline>`."""

    reads_average = False
    """Whether `loss` takes the averaged weights too, as `average`."""

    def binding(self) -> dict[str, Any]:
        """Fields of config.task that bind a run to weights other than its own."""
        return {}

    def check(self, source) -> None:
        """Raise UserError if a data source (`data.make_source`) lacks what the task needs."""
        del source

    def split_frames(self, frames: int) -> int | None:
        """Frames of a clip that the model sees, which mesh.seq splits over devices.

        None: the task cannot split them and runs with mesh.seq=1 alone.
        """
        del frames
        return None

    @abc.abstractmethod
    def init(self, rng, batch: Batch) -> tuple[Tree, Tree]:
        """(params, extra) for a batch of arrays or shapes.

        extra is state that persists but is not trained by gradient; {} if there is none.
        """

    def frozen(self) -> Tree:
        """Weights of frozen networks, the argument `frozen` of other methods; {} without any."""
        return {}

    def inflate(self, weights: Tree, fields) -> Tree:
        """Weights of another run, as this task starts from them. fields: its config.task."""
        del fields
        return weights

    @abc.abstractmethod
    def loss(self, params, batch: Batch, rng, *, step, frozen, extra) -> tuple[Any, tuple]:
        """(scalar loss, (scalar metrics, extra, weight)) of a training batch.

        weight: the number of targets that the loss is a mean over, float or int []. Gradients and
        metrics of the parts of a batch are averaged by it.
        """

    @abc.abstractmethod
    def evaluate(self, params, batch: Batch, rng, *, frozen) -> dict[str, jax.Array]:
        """Held-out metrics per example: {name: [B] or [B, F]}, NaN if a metric is not defined."""

    def pool(self, scores: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """Scores {name: [clips, ...]} of all clips together, from those of `evaluate`; traceable.

        For metrics that are of a set of clips and no mean over them: they are the same in each row.
        """
        return scores

    @abc.abstractmethod
    def sample(self, params, rng, cond: dict, *, frozen, frames: int | None = None) -> jax.Array:
        """Video float32 [B, frames, H, W, 3] in [-1, 1].

        cond: {"num": B} and optionally label int32 [B], text float32 [B, M, E] and first_frames
        uint8 [B, P, H, W, 3], with which the video begins. negative_text float32 [B, M, E] is what
        classifier-free guidance leads away from, in place of no condition. video uint8
        [B, T, H, W, 3], a real clip with these conditions, is for tasks that reconstruct; tasks
        that generate ignore it.
        """


class Generator(Task):
    """A task whose samples are streams: frames come out one after another, for any length."""

    @abc.abstractmethod
    def stream(
        self, params, rng, cond: dict, *, frozen, frames: int | None = None, carry: Tree = None
    ) -> Iterator[jax.Array]:
        """The latents [B, t, N, C] of a video, or their ids [B, t, N], iterated as frames finish.

        `first_frames` come first. Its attribute `carry` is what a stream of the same arguments goes
        on from, after the frames that the iterator has yielded, to this or another number of
        frames. Its method `switch(cond)` changes the conditions between two pieces, `first_frames`
        aside: later frames read the new ones. Frames yielded before do not depend on it, and
        `carry` holds what it needs.
        """

    def check_switch(self, frame: int, *, given: int, frames: int) -> None:
        """Raise UserError unless a stream of `frames` video frames can switch before `frame`.

        It can if a piece of the stream ends there: the frames before are finished and those from
        there on are not. given: of `first_frames`; given < frame < frames.
        """
        del given, frames
        raise UserError(f"frame={frame}: streams of this task cannot change their conditions")

    @abc.abstractmethod
    def decode(self, frozen, z_BTNC, state=None) -> tuple[jax.Array, Tree]:
        """The next latents of a stream -> (video float32 [B, t, H, W, 3] in [-1, 1], state)."""


class Autoencoder(Task):
    """A task that trains a tokenizer: its samples are reconstructions."""

    tokenizer: Tokenizer


class Run(NamedTuple):
    """A trained task as its work folder describes it. params: the averaged weights at `step`."""

    config: ConfigDict
    task: Task
    params: Tree
    frozen: Tree
    step: int
    mesh: jax.sharding.Mesh

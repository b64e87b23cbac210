"""The interface between what is trained and what trains it."""

from typing import Any, Protocol


class Task(Protocol):
    """What is trained. Methods are pure and traceable; bad settings raise UserError in __init__.

    A task is the class `Task` of the module `jaxvid.tasks.<config.task.name>`, built from the
    other fields of `config.task`. batch: {"video": uint8 [B, T, H, W, 3], "id": int32 [B],
    "label": int32 [B], "text": float32 [B, M, E] if the data set embeds captions}. params, extra,
    frozen: trees of arrays.
    """

    sharding_rules: tuple[tuple[str, tuple], ...]
    """(regular expression on a parameter's path, mesh axes of its trailing dimensions)."""

    def check(self, source) -> None:
        """Raise UserError where a data source (`data.make_source`) lacks what the task needs."""

    def split_frames(self, frames) -> int:
        """How many the model sees of a clip of `frames`, which mesh.seq splits over devices.

        A task that has no such method holds them whole, and runs with mesh.seq=1 alone.
        """

    def init(self, rng, batch) -> tuple[Any, Any]:
        """(params, extra); extra persists but is not trained by gradient, {} if nothing does."""

    def frozen(self) -> Any:
        """Weights of frozen networks, an argument of every other method; {} if there are none."""

    def loss(self, params, batch, rng, *, step, frozen, extra) -> tuple[Any, tuple[dict, Any]]:
        """(scalar loss, (scalar metrics, extra)) of a training batch."""

    def evaluate(self, params, batch, rng, *, frozen) -> dict[str, Any]:
        """Held-out metrics per example: {name: [B, ...]}, NaN where a metric is not defined."""

    def sample(self, params, rng, cond, *, frozen, frames=None) -> Any:
        """Video float32 [B, frames, H, W, 3] in [-1, 1].

        cond: {"num": B} and optionally label int32 [B], text float32 [B, M, E] and first_frames
        uint8 [B, P, H, W, 3], which begin the video. video uint8 [B, T, H, W, 3], a true clip with
        these conditions, is for tasks that reconstruct; those that generate leave it alone.
        """

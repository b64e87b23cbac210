"""Scores and samples on held-out clips, for training and for `evaluate` alike."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import data
from jaxvid.data.transforms import to_uint8
from jaxvid.errors import UserError, within
from jaxvid.parallel.multihost import to_global, to_host
from jaxvid.parallel.sharding import batch_sharding, replicated
from jaxvid.tasks.base import Run
from jaxvid.training import memory
from jaxvid.training.state import EVALUATE, SAMPLE, step_rng

MAX_FRAMES = 10**6  # of a video, whose pixels are held in host memory


def frames_of(lengths: Sequence[str], flag: str = "frames") -> list[int]:
    """Numbers of frames from a flag of the command line; UserError for what is no such number."""
    for text in lengths:
        if not text.isdecimal() or len(text) > 9 or not 0 < int(text) <= MAX_FRAMES:
            raise UserError(
                f"--{flag}={text[:20]}: write numbers of frames, such as 17,65,257, up to "
                f"{MAX_FRAMES}"
            )
    return [int(text) for text in lengths]


class HeldOut:
    """Held-out clips of a task: every clip counts once, and the noise is the same every time.

    iterator: yields this host's rows of the held-out batches. It is read from its current place.
    """

    def __init__(self, task, config, mesh, iterator):
        self.task, self.config, self.mesh = task, config, mesh
        self.iterator, self.start = iterator, iterator.get_state()
        whole = replicated(mesh)
        parts = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = whole if config.data.batch_size % parts else batch_sharding(mesh)
        self._score = jax.jit(task.evaluate, out_shardings=whole)
        self._sample = jax.jit(self._clips, out_shardings=whole)

    def trace(self, weights, frozen, batch) -> list[str]:
        """Names of the metrics, from arrays or shapes.

        Nothing runs. Settings that cannot work raise UserError now and not at the first evaluation.
        """
        rng = jax.random.key(0)
        with within("task"):
            sample = self._sample.trace(weights, frozen, batch)
            score = self._score.trace(weights, batch, rng, frozen=frozen)
            metrics = jax.eval_shape(self.task.pool, score.out_info)
        num, size = self.config.sample.num, self.config.data.batch_size
        memory.check_program(f"sample.num={num}", weights, sample.jaxpr, self.mesh)
        memory.check_program(f"data.batch_size={size}", weights, score.jaxpr, self.mesh)
        return list(self._without_baselines(metrics))

    def batches(self, limit: int) -> Iterator[tuple[Any, dict, list[int]]]:
        """Yield (rng, global batch, its rows with new clips), at most `limit`, while any is new."""
        self.iterator.set_state(self.start)
        seen = set()
        for index in range(limit):
            batch = to_global(next(self.iterator), self.rows)
            new = _new_rows(to_host(batch["id"]), seen)
            if not new:
                return
            yield jax.random.fold_in(step_rng(self.config.seed, EVALUATE), index), batch, new

    def scores(self, weights, frozen, limit: int) -> dict[str, np.ndarray]:
        """{metric: values [clips, ...]} of all clips in the first `limit` batches."""
        found = []
        for rng, batch, new in self.batches(limit):
            scores = jax.device_get(self._score(weights, batch, rng, frozen=frozen))
            found.append({name: values[new] for name, values in scores.items()})
        whole = {name: np.concatenate([scores[name] for scores in found]) for name in found[0]}
        return jax.device_get(self.task.pool(whole))

    def evaluate(self, weights, frozen) -> dict[str, float]:
        """{metric: mean over clips and frames} of config.evaluate.batches; counts stay whole.

        Of the baselines of a metric, the strongest alone.
        """
        scores = self.scores(weights, frozen, self.config.evaluate.batches)
        kept = self._without_baselines(scores)
        best = strongest(scores, self.task.baselines)
        kept |= {name: scores[name] for name in (f"{n}_{b}" for n, b in best.items())}
        return {name: mean(np.ravel(values)).item() for name, values in kept.items()}

    def _without_baselines(self, scores):
        endings = tuple(f"_{baseline}" for baseline in self.task.baselines)
        return {name: x for name, x in scores.items() if not name.endswith(endings)}

    def sample(self, weights, frozen) -> np.ndarray:
        """uint8 clips [num, T, H, W, 3] under the conditions of the first held-out clips."""
        self.iterator.set_state(self.start)
        batch = to_global(next(self.iterator), self.rows)
        return np.asarray(self._sample(weights, frozen, batch))

    def _clips(self, weights, frozen, batch):
        num = self.config.sample.num
        rows = jnp.arange(num) % self.config.data.batch_size
        cond = {name: batch[name][rows] for name in ("label", "text", "video") if name in batch}
        rng = step_rng(self.config.seed, SAMPLE)
        return to_uint8(self.task.sample(weights, rng, {**cond, "num": num}, frozen=frozen))


@contextlib.contextmanager
def open_held_out(run: Run) -> Iterator[HeldOut]:
    """The HeldOut clips of a run, on this process alone; a context manager that ends the loader."""
    fields = run.config.data
    with within("data"):
        iterator = data.make_iterator(
            fields,
            split="validation",
            seed=run.config.seed,
            batch_size=fields.batch_size,
            process_index=0,
            process_count=1,
        )
    with contextlib.closing(iterator):
        yield HeldOut(run.task, run.config, run.mesh, iterator)


def samples(run: Run, batch, rng) -> jax.Array:
    """Clips that the run generates or reconstructs for those of a batch, float32 in [-1, 1].

    A task that continues clips is given their first frames.
    """
    real = batch["video"]
    cond = {name: batch[name] for name in ("label", "text") if name in batch}
    cond |= {"num": len(real), "video": real}
    if run.task.given:
        cond["first_frames"] = real[:, : run.task.given]
    return run.task.sample(run.params, rng, cond, frozen=run.frozen, frames=real.shape[1])


def strongest(scores: dict[str, np.ndarray], baselines: Sequence[str]) -> dict[str, str]:
    """{metric: the baseline with its highest mean}, of the metrics that have baselines."""
    best = {}
    for name in scores:
        means = {b: np.nanmean(scores[f"{name}_{b}"]) for b in baselines if f"{name}_{b}" in scores}
        if means:
            best[name] = max(means, key=means.get)
    return best


def mean(values: np.ndarray) -> np.ndarray:
    """Mean over the first axis of the values that are not NaN; NaN if there are none.

    A whole number that all rows share stays whole.
    """
    if np.issubdtype(values.dtype, np.integer) and (values == values[:1]).all():
        return values[0]
    count = np.sum(~np.isnan(values), axis=0)
    return np.where(count, np.nansum(values, axis=0) / np.maximum(count, 1), np.nan)


def _new_rows(ids: np.ndarray, seen: set[int]) -> list[int]:
    """Rows whose clip is not in `seen`; adds them to it."""
    new = []
    for row, clip in enumerate(ids.tolist()):
        if clip not in seen:
            seen.add(clip)
            new.append(row)
    return new

"""Data: a config becomes an endless, exactly resumable stream of numpy batches.

A source is any object with `len(source)`, `read(index, rng)` (and `source[index]`, the same without
chance), `name(index)`, `num_classes` and `captions`; `read` returns one example, a dict of "video"
uint8 [T, H, W, 3], "label" (0 where there are no classes) and "caption" ("" where there are none).
A source of cached latents has their `tokenizer`, its digest, too, and "latents" or "tokens" in its
examples; "video" is then in those for validation alone. The module jaxvid.data.<name> holds the
source called <name>.
"""

import importlib
import time

import grain
import numpy as np

from jaxvid.data import text
from jaxvid.errors import UserError

SOURCES = ("sprites", "folder", "array_record", "tfds", "latents", "mqar")
ARRAYS = ("video", "latents", "tokens")  # what an example may show of its clip


def make_source(config, split):
    """The random-access source of config.name for split "train" or "validation"."""
    if config.name not in SOURCES:
        raise UserError(f"data.name={config.name!r}: choose one of {', '.join(SOURCES)}")
    if split not in ("train", "validation"):
        raise UserError(f"split={split!r}: choose train or validation")
    source = importlib.import_module(f"jaxvid.data.{config.name}").Source(config, split)
    if not len(source):
        raise UserError(f"data.name={config.name!r}: no clips in the {split} split")
    return source


class _Load:
    """Index -> example of the batch; the rng is keyed by the place in the global order."""

    def __init__(self, source, config):
        self._source = source
        self._tokens, self._width = config.text_tokens, config.text_width

    def __call__(self, index, rng=None):
        clip = self._source.read(index, rng)
        example = {name: clip[name] for name in ARRAYS if name in clip}
        example |= {"id": np.int32(index), "label": np.int32(clip["label"])}
        if self._tokens > 0:
            example["text"] = text.embed(clip["caption"], self._tokens, self._width)
        return example


class _ContiguousRows(grain.MapDataset):
    """Reorders within each global batch so that ElasticIterator's strided hosts get whole blocks.

    Host h of n reads positions h, h + n, ... of a batch; they become rows h * B/n, h * B/n + 1, ...
    The hosts' parts put one after another are then the same global batch for every n.
    """

    def __init__(self, parent, batch_size, hosts):
        super().__init__(parent)
        self._batch_size, self._hosts = batch_size, hosts

    def __len__(self):
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, place = divmod(index, self._batch_size)
        row, host = divmod(place, self._hosts)
        rows_per_host = self._batch_size // self._hosts
        return self._parent[batch * self._batch_size + host * rows_per_host + row]


def make_iterator(config, *, split, seed, batch_size, process_index=None, process_count=None):
    """Checkpointable grain iterator over this host's rows of the global batches; never ends.

    A batch: video uint8 [b, T, H, W, 3] (of cached clips latents float32 [b, T, N, Z] or tokens
    int32 [b, T, N]), id int32 [b], label int32 [b] and, where text_tokens > 0, text float32
    [b, M, E]; b = batch_size / process_count. Train is shuffled anew every epoch,
    validation comes in order. Content depends on (seed, place in the global order) alone: any
    number of hosts, workers and threads sees the same global batches, and get_state / set_state
    resumes exactly. Raises UserError for settings that cannot be met.
    """
    if process_index is None:
        import jax  # only a multi-host run needs to ask

        process_index, process_count = jax.process_index(), jax.process_count()
    if batch_size < 1 or batch_size % process_count:
        raise UserError(
            f"data.batch_size={batch_size}: must be a multiple of the {process_count} hosts"
        )
    source = make_source(config, split)
    load = _Load(source, config)
    order = grain.MapDataset.range(len(source)).seed(seed)
    if split == "train":
        examples = order.shuffle().repeat().random_map(load)
    else:
        examples = order.repeat().map(load)
    workers = grain.MultiprocessingOptions(num_workers=config.workers) if config.workers else None
    return iter(
        grain.experimental.ElasticIterator(
            _ContiguousRows(examples, batch_size, process_count),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            # The buffer counts batches; two for each thread keep it busy at little memory.
            read_options=grain.ReadOptions(
                num_threads=config.threads, prefetch_buffer_size=2 * config.threads
            ),
            multiprocessing_options=workers,
        )
    )


def throughput(config, seconds):
    """Frames per second that the training iterator delivers to one host.

    The first `seconds` do not count: caches fill, and what was read ahead is used up.
    """
    iterator = make_iterator(
        config,
        split="train",
        seed=0,
        batch_size=config.batch_size,
        process_index=0,
        process_count=1,
    )
    _count(iterator, seconds)
    begin = time.perf_counter()
    clips = _count(iterator, seconds)
    rate = clips * config.frames / (time.perf_counter() - begin)
    iterator.close()
    return rate


def _count(iterator, seconds):
    """Clips taken from an iterator in a time, at least one batch."""
    clips, end = 0, time.perf_counter() + seconds
    while not clips or time.perf_counter() < end:
        clips += len(next(iterator)["id"])
    return clips

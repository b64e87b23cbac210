"""The grain pipeline from a source to batches. Importing it imports grain and jax."""

import grain
import numpy as np

from jaxvid.data import text

ARRAYS = ("video", "latents", "tokens")  # fields of an example that go into the batch as they are


class Load:
    """Index -> one row of a batch. The rng depends on the position in the global order alone."""

    def __init__(self, source, config):
        self._source = source
        self._read_caption = text.reader(config) if config.text_tokens else None

    def __call__(self, index, rng=None):
        example = self._source.read(index, rng)
        row = {name: example[name] for name in ARRAYS if name in example}
        row |= {"id": np.int32(index), "label": np.int32(example["label"])}
        if self._read_caption:
            row["text"] = self._read_caption(example["caption"])
        return row


class _ContiguousRows(grain.MapDataset):
    """Reorders each global batch so that ElasticIterator's strided hosts get contiguous rows.

    Host h of n reads positions h, h + n, ... of a batch; they become rows h * B/n, h * B/n + 1, ...
    The parts of all hosts in order are then the same global batch for every n.
    """

    def __init__(self, parent, batch_size, hosts):
        super().__init__(parent)
        self._batch_size, self._hosts = batch_size, hosts

    def __len__(self):
        return len(self._parent)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return self.slice(index)
        batch, position = divmod(index, self._batch_size)
        row, host = divmod(position, self._hosts)
        rows_per_host = self._batch_size // self._hosts
        return self._parent[batch * self._batch_size + host * rows_per_host + row]


def iterate(source, config, *, split, seed, batch_size, process_index, process_count, waiting):
    """The iterator of `data.make_iterator` over a source; `waiting` batches are read ahead."""
    load = Load(source, config)
    order = grain.MapDataset.range(len(source)).seed(seed)
    if split == "train":
        rows = order.shuffle().repeat().random_map(load)
    else:
        rows = order.repeat().map(load)
    workers = grain.MultiprocessingOptions(num_workers=config.workers) if config.workers else None
    return iter(
        grain.experimental.ElasticIterator(
            _ContiguousRows(rows, batch_size, process_count),
            batch_size,
            grain.sharding.ShardOptions(process_index, process_count),
            read_options=grain.ReadOptions(
                num_threads=config.threads, prefetch_buffer_size=waiting
            ),
            multiprocessing_options=workers,
        )
    )

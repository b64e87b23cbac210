"""Data: a config becomes an endless, exactly resumable stream of numpy batches.

The module jaxvid.data.<name> holds the source called <name>, a class `Source` with the interface of
`jaxvid.data.source`. Errors name the fields of config.data without the section.
"""

import math
import time

import numpy as np

from jaxvid import checks, memory, modules
from jaxvid.data import source as source_lib
from jaxvid.data import text
from jaxvid.data.transforms import Window
from jaxvid.errors import UserError

MAX_CLIPS = 2**20  # of a batch or of samples
MAX_TRAINED = 2**13  # frames of a clip; tables of frames by frames are made for them
MAX_LOADERS = 1024  # processes, and threads in each


def check(config) -> None:
    """Raise UserError for fields of config.data that no source accepts."""
    Window.of(config)  # frames, size, stride and crop
    checks.at_least("frames", config.frames, 1, at_most=MAX_TRAINED)
    checks.at_least("batch_size", config.batch_size, 1, at_most=MAX_CLIPS)
    checks.at_least("workers", config.workers, 0, at_most=MAX_LOADERS)
    checks.at_least("threads", config.threads, 1, at_most=MAX_LOADERS)
    text.check(config)
    if "fps" in config:
        checks.between("fps", config.fps, 0, 1000)
    if "difficulty" in config:  # also if another source than sprites leaves it unused
        checks.between("difficulty", config.difficulty, 0, 1)
    if "num_clips" in config:
        checks.between("num_clips", config.num_clips, 1, 2**31 - 1)


def make_source(config, split: str) -> source_lib.Source:
    """The source of config.name for split "train" or "validation". Raises UserError."""
    checks.choose("split", split, source_lib.SPLITS)
    source = modules.find(__name__, config.name, source_lib.Source)(config, split)
    remedy = f"the source {config.name} has a rate of its own; use 0, or prepare with another --fps"
    asked = config.get("fps", 0.0)
    checks.require(asked in (0, source.fps), "fps", asked, remedy)
    if not len(source):
        raise UserError(
            f"name={config.name!r}: no clips in the {split} split; use data with more clips"
        )
    return source


def clip_rate(config) -> float:
    """Frames per second of the clips of config.data; 0.0 if they have the rates of their files."""
    return config.get("fps", 0.0) / config.stride


def make_iterator(
    config,
    *,
    split: str,
    seed: int,
    batch_size: int,
    process_index: int | None = None,
    process_count: int | None = None,
):
    """Checkpointable grain iterator over this host's rows of the global batches; never ends.

    A batch: video uint8 [b, T, H, W, 3] (for encoded clips latents float32 [b, T, N, Z] or tokens
    int32 [b, T, N]), id int32 [b], label int32 [b] and, with text_tokens > 0, text (bytes uint8
    [b, M], or embeddings float32 [b, M, E]); b = batch_size / process_count. Training clips are
    shuffled again in every epoch; validation clips come in order. The content depends on (seed,
    position in the global order) alone: any number of hosts, workers and threads sees the same
    global batches, and get_state and set_state resume exactly. Raises UserError.
    """
    # Imported here, because processes that only decode video start faster without grain and jax.
    from jaxvid.data import pipeline

    if process_index is None:
        import jax

        process_index, process_count = jax.process_index(), jax.process_count()
    checks.at_least("batch_size", batch_size, 1)
    if batch_size % process_count:
        raise UserError(f"batch_size={batch_size}: must be a multiple of the {process_count} hosts")
    check_memory(config, batch_size // process_count)
    return pipeline.iterate(
        make_source(config, split),
        config,
        split=split,
        seed=seed,
        batch_size=batch_size,
        process_index=process_index,
        process_count=process_count,
        waiting=waiting_batches(config),
    )


def row(source, config, index: int = 0) -> dict:
    """The row of a clip in the validation batches of a source, as `make_iterator` yields them."""
    from jaxvid.data import pipeline  # here for the reason above

    return pipeline.Load(source, config)(index)


def batch_shapes(config, size: int) -> dict:
    """The batch of `size` clips of video that `make_iterator` yields, as shapes."""
    import jax  # here for the reason above

    shape = (size, config.frames, config.size, config.size, 3)
    batch = {
        "video": jax.ShapeDtypeStruct(shape, np.uint8),
        "id": jax.ShapeDtypeStruct((size,), np.int32),
        "label": jax.ShapeDtypeStruct((size,), np.int32),
    }
    if config.text_tokens:
        shape, dtype = text.shape(config)
        batch["text"] = jax.ShapeDtypeStruct((size, *shape), dtype)
    return batch


def check_memory(config, rows: int) -> None:
    """Raise UserError unless the batches of `rows` clips of video that wait in memory fit there."""
    shape, dtype = text.shape(config)
    clip = 3 * config.frames * config.size**2 + dtype.itemsize * math.prod(shape)
    fields = f"batch_size={config.batch_size}, frames={config.frames}, size={config.size}"
    batches = waiting_batches(config)
    memory.require(fields, f"{batches} batches that are read ahead", batches * rows * clip)


def waiting_batches(config) -> int:
    """Batches that are read ahead: two for each thread keep it busy at little memory."""
    return 2 * config.threads


def throughput(config, seconds: float) -> float:
    """Frames per second that the training iterator delivers to one host.

    The first `seconds` do not count: caches fill, and prefetched batches are used up.
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
    """Clips that an iterator yields in `seconds`, one batch or more."""
    clips, end = 0, time.perf_counter() + seconds
    while not clips or time.perf_counter() < end:
        clips += len(next(iterator)["id"])
    return clips

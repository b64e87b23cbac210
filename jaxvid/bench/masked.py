"""Parallel decoding by a masked transformer: tokens and clips per second."""

import statistics
import time

import jax
from ml_collections import ConfigDict

from jaxvid.bench import timing
from jaxvid.bench.runs import random_batch
from jaxvid.errors import UserError, within
from jaxvid.parallel.mesh import make_mesh
from jaxvid.runs import make_task
from jaxvid.tasks.base import Run
from jaxvid.tasks.streaming import Decoded

STEPS = (12, 18, 24)


def sample(config, tokenizer) -> dict:
    """One clip as long as in training, by random weights, which are as fast as trained ones.

    by_steps: for STEPS evaluations of the network per window, of one clip, or of two under
    guidance; `windows` are filled in one after another. No time but `first_call` has compilation in
    it. tokens_per_s is without decoding to pixels; clip_s is with it. Raises UserError for a
    stand-in in the place of a tokenizer, which has no codes.
    """
    if tokenizer:
        raise UserError("latents: have no codes; leave it out, and set task.tokenizer")
    frames, rows = config.data.frames, {}
    for steps in STEPS:
        run = _random_run(config, {"steps": steps})
        times = []

        def clip(run=run, times=times):
            cond, decoding = {**random_batch(config, 1), "num": 1}, 0.0
            begin = time.perf_counter()
            for _, _, decode in Decoded(run, cond, frames, jax.random.key(1)):
                decoding += decode
            times.append((time.perf_counter() - begin, decoding))

        timing.take_turns(clip)
        (first_call, _), *later = times
        whole, decoding = (statistics.median(column) for column in zip(*later))
        task = run.task
        windows = -(-(task.latents - task.keep) // (task.window - task.keep))
        tokens = task.latents * task.grid[0] * task.grid[1]
        rows[steps] = {
            "windows": windows,
            "evaluations": windows * steps * (1 if task.guidance == 1 else 2),
            "tokens_per_s": tokens / (whole - decoding),
            "clip_s": whole,
            "first_call_s": first_call,
        }
    return {"frames": frames, "guidance": config.task.sampler.guidance, "by_steps": rows}


def _random_run(config, sampler):
    """A run with random weights and these values in the place of those of its sampler."""
    fields = ConfigDict(config.task.to_dict())
    fields.sampler.update(sampler)
    task = make_task(fields)
    with within("task"):
        frozen = task.frozen()
        params, _ = jax.jit(task.init)(jax.random.key(0), random_batch(config, 1))
    return Run(config, task, params, frozen, 0, make_mesh(config.mesh))

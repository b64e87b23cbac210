"""Work folders of tiny tokenizers, and sets of their clips: made once per process, then removed."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp

from configs import tokenizer
from jaxvid import config as config_lib
from jaxvid import data, tokenize
from jaxvid.data.transforms import normalize
from jaxvid.models.tokenizer import update_moments
from jaxvid.runs import make_task
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.state import TrainState
from tests.videos import prepare_here, write_clip

_PROGRAMS = {}
FAST = {
    "steps": 2,
    "data.frames": 5,
    "data.size": 12,
    "data.batch_size": 8,
    "data.num_clips": 16,
    "data.threads": 1,
    "evaluate.batches": 1,
    "sample.num": 1,
    "log.tensorboard": False,
    "optim.warmup": 1,
}


def tokenizer_config(options="", **changes):
    """A tokenizer of 3 x 3 tokens; dotted fields, with __ for the dot."""
    config = tokenizer.get_config(options)
    network = dict(width=16, heads=2, patch=4, temporal_depth=1, encode_blocks="t")
    network["decode_blocks"] = "t"
    config.update_from_flattened_dict(
        FAST
        | {f"task.network.{name}": value for name, value in network.items()}
        | {name.replace("__", "."): value for name, value in changes.items()}
    )
    return config.lock()


def write_run(workdir, config):
    """Write the files of a run to `workdir`: weights, moments of the latents of 16 clips, config.

    Training would need a minute of compilation. The latents have a mean other than zero.
    """
    task = make_task(config.task)
    batch = next(data.make_iterator(config.data, split="train", seed=1, batch_size=16))
    init, measure = _compiled(config.task.to_json(), task)
    params, extra = init(jax.random.key(config.seed), batch)
    params["network"]["to_latent"]["kernel"] *= 0.3
    params["network"]["to_latent"]["bias"] += jnp.linspace(-1, 2, task.tokenizer.quantizer.features)
    extra = {**extra, "latents": measure({**params, **extra}, batch["video"])}
    state = TrainState(*[jnp.zeros((), jnp.int32)] * 2, params, {}, params, extra)
    with Checkpoints(str(workdir), config) as checkpoints:
        checkpoints.save(1, state, SimpleNamespace(get_state=dict))
    config_lib.save(config, workdir / "config.json")


def _compiled(fields, task):
    """(init, measure) of a task; runs with the same fields share the compiled programs."""

    @jax.jit
    def measure(weights, video):
        z_BTNZ, _ = task.tokenizer.encode(weights, normalize(video))
        return update_moments(weights["latents"], z_BTNZ)

    return _PROGRAMS.setdefault(fields, (jax.jit(task.init), measure))


def _folder():
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)


@functools.cache
def gaussian():
    """Work folder of a tokenizer with 8 channels of Gaussian latents."""
    workdir = _folder()
    write_run(workdir, tokenizer_config("quantizer=kl"))
    return workdir


@functools.cache
def coded():
    """Work folder of a tokenizer with 16 codes."""
    workdir = _folder()
    write_run(workdir, tokenizer_config("quantizer=vq", task__quantizer__codes=16))
    return workdir


@functools.cache
def videos():
    """Four videos of 6 .. 9 frames in the classes a and b."""
    folder = _folder()
    for number in range(4):
        write_clip(folder / "ab"[number % 2] / f"{number}.mp4", 6 + number, height=12, width=16)
    return folder


@functools.cache
def prepared():
    """A prepared set of `videos` in clips of 5 frames: 3 for training, 1 for validation."""
    folder = _folder() / "set"
    prepare_here(videos(), folder, size=12, frames=5)
    return folder


@functools.cache
def encoded(workdir, **options):
    """The set of `prepared` in the latents of a tokenizer."""
    folder = _folder() / "set"
    tokenize.tokenize(workdir, prepared(), folder, **options)
    return folder

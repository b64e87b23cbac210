"""A task and a data source small enough to train in a second, for tests of the trainer.

python tests/training/toy.py WORKDIR '{"steps": 8}'     a run as a process of its own
"""

import json
import os
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from ml_collections import ConfigDict

from jaxvid.data import source
from jaxvid.errors import UserError
from jaxvid.parallel.sharding import path_name, shard
from jaxvid.tasks import base


class Task(base.Task):
    """Two-layer regression of the last frame from the first; optional noise, NaN and state."""

    def __init__(self, width=16, noise=0.1, nan_from=-1, nan_until=10**9, refuse_to_sample=False):
        self.width, self.noise, self.refuse_to_sample = width, noise, refuse_to_sample
        self.nan_from, self.nan_until = nan_from, nan_until

    def init(self, rng, batch):
        size = batch["video"][0, 0].size
        up, out = jax.random.split(rng)
        params = {
            "up": {
                "kernel": jax.random.normal(up, (size, self.width)) / size**0.5,
                "bias": jnp.zeros(self.width),
            },
            "out": {"kernel": jax.random.normal(out, (self.width, size)) / self.width**0.5},
        }
        return params, {"seen": jnp.zeros(())}

    def frozen(self):
        return {"scale": jnp.full((), 2.0)}

    def predict(self, params, batch, frozen):
        video_BTX = batch["video"].reshape(*batch["video"].shape[:2], -1) / 255.0
        hidden_BA = jnp.tanh(video_BTX[:, 0] @ params["up"]["kernel"])
        hidden_BA = shard(hidden_BA + params["up"]["bias"], "BA")
        return frozen["scale"] * hidden_BA @ params["out"]["kernel"], video_BTX[:, -1]

    def loss(self, params, batch, rng, *, step, frozen, extra):
        guess_BX, truth_BX = self.predict(params, batch, frozen)
        noise_BX = jax.random.normal(rng, truth_BX.shape)
        loss = jnp.mean((guess_BX - truth_BX - self.noise * noise_BX) ** 2)
        bad = (step >= self.nan_from) & (step < self.nan_until) & (self.nan_from >= 0)
        loss = jnp.where(bad, jnp.nan, 1.0) * loss
        extra = {"seen": extra["seen"] + batch["id"].shape[0] * jnp.where(bad, jnp.nan, 1.0)}
        return loss, ({"guess": guess_BX.mean()}, extra, guess_BX.size)

    def evaluate(self, params, batch, rng, *, frozen):
        guess_BX, truth_BX = self.predict(params, batch, frozen)
        return {"mse": jnp.mean((guess_BX - truth_BX) ** 2, axis=1)}

    def sample(self, params, rng, cond, *, frozen, frames=None):
        if self.refuse_to_sample:
            raise UserError("refuse_to_sample=True: ask for something else")
        B, T, size = cond["num"], frames or 4, int((params["out"]["kernel"].shape[1] / 3) ** 0.5)
        noise_BX = jax.random.normal(rng, (B, self.width))
        frame_BHWC = (noise_BX @ params["out"]["kernel"]).reshape(B, 1, size, size, 3)
        return jnp.clip(jnp.repeat(frame_BHWC, T, axis=1), -1, 1)


class Source(source.Source):
    """Clip i is a function of i: random frames, label i % 7."""

    num_classes = 7

    def __init__(self, config, split):
        self.config, self.length = config, 64 if split == "train" else 16
        self.digest = Path(config.path).read_text() if config.get("path") else ""

    def __len__(self):
        return self.length

    def read(self, index, rng):
        shape = (self.config.frames, self.config.size, self.config.size, 3)
        time.sleep(float(os.environ.get("TOY_DELAY", 0)))  # not a field: it changes no result
        video_THWC = np.random.default_rng(int(index)).integers(0, 256, shape, dtype=np.uint8)
        return {"video": video_THWC, "label": index % 7, "caption": ""}

    def name(self, index):
        return f"clip-{index}"


def install():
    """Make `task.name = "toy"` and `data.name = "toy"` what the trainer finds."""
    sys.modules["jaxvid.tasks.toy"] = sys.modules["jaxvid.data.toy"] = sys.modules[__name__]


def config(**changes):
    """A tiny complete config; dotted fields with `__` for the dot: config(optim__lr=1.0)."""
    tree = ConfigDict(json.loads(CONFIG))
    for field, value in changes.items():
        section, _, name = field.rpartition("__")
        (tree[section] if section else tree)[name] = value
    return tree


def damage(workdir, step, name):
    """Flip a bit of an array in a checkpoint, as a disk does: unseen by the files around it.

    name: path of the array in the TrainState, "params.up.kernel".
    """
    folder = Path(workdir, "ckpt", str(step), "state")
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{folder.absolute()}", "path": name},
    }
    array = ts.open(spec).result()
    values = array.read().result()
    values.view(np.uint32).flat[0] ^= 1 << 20
    array.write(values).result()


CONFIG = """{
  "seed": 0, "steps": 8,
  "task": {"name": "toy", "width": 16, "noise": 0.1, "nan_from": -1, "nan_until": 1000},
  "data": {"name": "toy", "frames": 3, "size": 4, "batch_size": 8, "workers": 0, "threads": 1,
           "stride": 1, "crop": "center", "flip": false, "text_tokens": 0, "text_width": 4},
  "optim": {"name": "adamw", "lr": 0.01, "muon_lr": 0.02, "warmup": 1, "schedule": "constant",
            "b1": 0.9, "b2": 0.99, "weight_decay": 0.01, "clip": 1.0, "ema": 0.9,
            "accumulate": 1, "skip_nonfinite": 2},
  "mesh": {"data": -1, "fsdp": 1, "tensor": 1},
  "checkpoint": {"every": 3, "keep": 2, "best": ""},
  "log": {"every": 1, "tensorboard": false},
  "evaluate": {"every": 0, "batches": 1},
  "sample": {"every": 0, "num": 2},
  "init_from": "", "compile_cache": ""
}"""


def main():
    """Trains the toy and writes the final state to <workdir>/final.npz; UserErrors as the CLI."""
    from jax.experimental.multihost_utils import process_allgather

    from jaxvid.parallel import multihost
    from jaxvid.train import train
    from jaxvid.training import interrupt

    workdir, changes = sys.argv[1], json.loads(sys.argv[2])
    multihost.initialize()
    with multihost.failing_alone(), interrupt.saves():
        state = process_allgather(train(config(**changes), workdir), tiled=True)
    leaves = {path_name(path): leaf for path, leaf in jax.tree.leaves_with_path(state)}
    if jax.process_index() == 0:
        np.savez(Path(workdir, "final.npz"), **leaves)


if __name__ == "__main__":
    from absl import flags, logging

    flags.FLAGS(sys.argv[:1])  # which grain reads in processes that load data
    logging.set_verbosity(logging.WARNING)
    install()
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")

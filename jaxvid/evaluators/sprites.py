"""Samples of a run on sprites, read by the oracle of the data."""

import numpy as np
from ml_collections import ConfigDict

from jaxvid import data
from jaxvid.data.sprite_oracle import steady_sprites
from jaxvid.evaluators.held_out import open_held_out
from jaxvid.tasks.base import Run

CLIPS = 64


def steady(run: Run) -> dict:
    """Shares of clips whose sprites keep colour and shape, of samples and of the data itself.

    {"clips", "samples", "data"}: of that many samples without given frames, and of that many
    held-out clips, which a perfect model would reach. See `sprite_oracle.steady_sprites`.
    """
    config = ConfigDict(run.config.to_dict())
    config.sample.num = CLIPS
    with open_held_out(run._replace(config=config)) as clips:
        samples = clips.sample(run.params, run.frozen)
    source = data.make_source(config.data, "validation")
    real = (source.read(index)["video"] for index in range(CLIPS))
    shares = {
        name: float(np.mean([bool(steady_sprites(clip)) for clip in videos]))
        for name, videos in (("samples", samples), ("data", real))
    }
    return {"clips": CLIPS, **shares}

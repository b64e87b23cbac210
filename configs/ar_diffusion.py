"""AR-Diffusion: a causal video diffusion transformer with one timestep per frame.

    python -m jaxvid.train --config=configs/ar_diffusion.py
    python -m jaxvid.train --config=configs/ar_diffusion.py:size=b,data=array_record \\
        --config.data.path=DIR

Options: size=tiny|s|b|l|xl (tiny is made for two CPU cores, xl is the paper's 672 M parameters),
data=sprites|folder|array_record|tfds, cond=none|class|text.
"""

from ml_collections import ConfigDict

from configs import common

# size -> width, depth, heads
SIZES = {
    "tiny": (128, 4, 4),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}


def get_config(options=""):
    """The experiment, as the options after the config's colon choose it."""
    chosen = common.parse(
        options,
        size=tuple(SIZES),
        data=("sprites", "folder", "array_record", "tfds"),
        cond=("none", "class", "text"),
    )
    width, depth, heads = SIZES[chosen.size]

    config = common.get_config()
    config.task = ConfigDict(
        dict(
            name="ar_diffusion",  # module of jaxvid.tasks
            width=width,  # channels of a token
            depth=depth,  # transformer blocks
            heads=heads,  # attention heads; must divide the width
            patch=4,  # pixels along each side of a token; must divide data.size
            attention="factorised",  # factorised (within frames, then over time) or joint
        )
    )
    config.data.name = chosen.data
    if chosen.size != "tiny":
        config.task.attention = "joint"
        config.data.size = 64
        config.data.batch_size = 64
        config.steps = 100_000
        config.optim.lr = 1e-4
        config.optim.warmup = 1000
        config.optim.ema = 0.9999
        config.checkpoint.every = 1000
        config.evaluate.every = 5000
        config.sample.every = 5000
    if chosen.cond == "text":
        config.data.text_tokens = 16
    return config

"""The masked transformer: text to video on the tokens of a causal tokenizer (Phenaki, MAGVIT).

    C=configs/masked_transformer.py
    python -m jaxvid.train --config=$C:stage=tokenizer --workdir=runs/codes
    python -m jaxvid.train --config=$C --config.task.tokenizer=runs/codes

Options: size=tiny|s|b|l|xl (tiny is for two CPU cores, xl has the width and depth of Phenaki),
data=sprites|folder|array_record|tfds|latents, cond=text|class|none,
text=bytes|words|stored (how captions are read, as in configs/ar_diffusion.py),
decoding=maskgit|magvit|phenaki (the settings of one sampler, in task.sampler), critic=none|self|
network, stage=model|tokenizer (the tokenizer that the first command trains, on the same clips).
"""

from configs import common, tokenizer
from configs.common import field

# size -> width, depth, heads
SIZES = {
    "tiny": (128, 4, 4),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (2048, 24, 32),
}
# Settings of task.sampler: steps, rounding, temperature, cooling, noise, top_k, top_p.
# MAGVIT decodes as MaskGIT does and may cut the distribution; this top_p is our choice.
DECODING = {
    "maskgit": (12, "floor", 1.0, False, 4.5, 0, 1.0),
    "magvit": (12, "floor", 1.0, False, 4.5, 0, 0.95),
    "phenaki": (18, "nearest", 0.9, True, 0.0, 0, 1.0),
}
FRAMES, WINDOW = 17, 9  # of a clip, and those that the network sees at once


def get_config(options=""):
    """The experiment, with the options after the colon of the config."""
    chosen = common.parse(
        options,
        size=tuple(SIZES),
        data=("sprites", "folder", "array_record", "tfds", "latents"),
        cond=("text", "class", "none"),
        text=("bytes", "words", "stored"),
        decoding=tuple(DECODING),
        critic=("none", "self", "network"),
        stage=("model", "tokenizer"),
    )
    tiny = chosen.size == "tiny"
    if chosen.stage == "tokenizer":
        return _tokenizer(chosen, tiny, options)
    config = common.get_config()
    config.data.name = chosen.data
    if chosen.data == "latents":
        config.data.crop = "center"  # the crop of cached clips
    _data(config, tiny)
    config.data.frames = FRAMES
    width, depth, heads = SIZES[chosen.size]
    config.task = dict(
        name=field("masked_transformer", "module of jaxvid.tasks"),
        size=config.data.get_ref("size"),
        frames=config.data.get_ref("frames"),
        window=field(WINDOW, "frames that the network sees at once, at most data.frames"),
        given=field(5, "clean frames before the continuation that evaluate scores"),
        tokenizer=field("", "work folder of a trained tokenizer with codes"),
        tokenizer_digest=field("", "digest that the tokenizer must have; '' = any"),
        critic=field(chosen.critic, "ranks tokens in sampling: none, self or network"),
    )
    config.task.model = dict(
        width=field(width, "channels of a token"),
        depth=field(depth, "layers"),
        heads=field(heads, "attention heads; must divide the width"),
        mlp_ratio=field(8 / 3, "hidden units of the gated MLP, in widths"),
        parts=field(1, "digits of an id, predicted side by side; 2 for 2^18 codes"),
        dtype=field("float32" if tiny else "bfloat16", "computation: float32 or bfloat16"),
        remat=field(not tiny, "recompute activations in the backward pass, to save memory"),
        scan=field(not tiny, "compile one layer for all; False is faster on CPU"),
    )
    config.task.condition = common.condition(config, chosen.cond, chosen.text, tiny)
    config.task.mask = dict(
        schedule=field(
            "cosine", "share of masked tokens: cosine, uniform, square, cubic, sqrt, log or exp"
        ),
        loss=field("masked", "tokens that are targets: masked or all"),
        smoothing=field(0.0, "label smoothing"),
        prefix=field(0.3, "share of clips whose first latents are known"),
        images=field(0.0, "share of steps on first frames alone, as images"),
        commit=field(0.0, "share of clips with a condition of pixels (COMMIT)"),
    )
    names = ("steps", "rounding", "temperature", "cooling", "noise", "top_k", "top_p")
    preset = dict(zip(names, DECODING[chosen.decoding]))
    config.task.sampler = dict(
        schedule=field("cosine", "share of masked tokens by step, as in task.mask"),
        guidance=field(1.0 if chosen.cond == "none" else 3.0, "classifier-free guidance; 1 = none"),
        keep=field(2, "latents of a window that the next one is given"),
        **{
            name: field(value, meaning) for (name, value), meaning in zip(preset.items(), _MEANINGS)
        },
    )
    return config


_MEANINGS = (
    "evaluations of the network per window",
    "of the counts of masked tokens: floor (MaskGIT, MAGVIT) or nearest (Phenaki)",
    "temperature of drawn tokens",
    "lower the temperature linearly to 0",
    "noise on the confidence of drawn tokens, which falls linearly to 0",
    "draw from that many likeliest tokens; 0 = all",
    "draw from the likeliest tokens of this probability; 1 = all",
)


def _data(config, tiny):
    """Clips and optimizer; for two CPU cores, clips of one large upright sprite."""
    if tiny:
        config.steps = 6000
        config.data.max_sprites = 1
        config.data.sizes = 1
        config.data.turning = False
        config.data.num_clips = 100_000
        config.evaluate.every = 2000
        return
    config.steps = 500_000
    config.data.size = 128
    config.data.batch_size = 64
    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.warmup = 5000
    config.optim.ema = 0.9999
    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    config.sample.every = 5000


def _tokenizer(chosen, tiny, options):
    """The tokenizer's own experiment, on the clips of this one."""
    for name in ("cond", "text", "decoding", "critic"):
        if f"{name}=" in options:
            raise ValueError(f"stage=tokenizer: has no {name}; leave {name} out")
    size = "tiny" if tiny else "b"
    config = tokenizer.get_config(f"quantizer=fsq,size={size},data={chosen.data}")
    if tiny:
        _data(config, tiny)
        config.steps = 1800
        config.task.quantizer.levels = (8, 5, 5, 5)
    return config

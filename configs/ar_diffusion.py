"""AR-Diffusion: a causal video diffusion transformer with one noise level per frame.

    python -m jaxvid.train --config=configs/ar_diffusion.py
    python -m jaxvid.train --config=configs/ar_diffusion.py:size=b,data=array_record \\
        --config.data.path=DIR

Options: size=tiny|s|b|l|xl (tiny is for two CPU cores, xl has the 672 M parameters of the paper),
data=sprites|folder|array_record|tfds|latents, cond=none|class|text, text=bytes|words|stored (how
cond=text reads captions: by a trained encoder, as frozen word vectors, or as embeddings of T5 that
`jaxvid.tokenize --text` has stored), noise=diffusion|flow,
layout=mixed|diffusion_forcing|clean_prefix|teacher_forced|images (what noisy frames read in
training),
steps=many|few (few: shortcut forcing, which samples with 1, 2, 4 .. steps per frame),
mixer=softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing (softmax sees a window of the
past, all others keep a state of constant size).

Score of the first command: by `python -m jaxvid.evaluate`, continuations of 4 held-out frames have
a mean PSNR of 20.1 dB and lead the best guess without a network (20.5 dB) for five frames. Of the
frames sampled without given ones, 73 % show one sprite (BENCHMARKS.md).
"""

from configs import common
from configs.common import field

# size -> width, depth, heads
SIZES = {
    "tiny": (128, 4, 4),
    "s": (384, 12, 6),
    "b": (768, 12, 12),
    "l": (1024, 24, 16),
    "xl": (1152, 28, 16),
}


def get_config(options=""):
    """The experiment, with the options after the colon of the config."""
    chosen = common.parse(
        options,
        size=tuple(SIZES),
        data=("sprites", "folder", "array_record", "tfds", "latents"),
        cond=("none", "class", "text"),
        text=("bytes", "words", "stored"),
        noise=("diffusion", "flow"),
        steps=("many", "few"),
        layout=("mixed", "diffusion_forcing", "clean_prefix", "teacher_forced", "images"),
        mixer=tuple(common.MIXERS),
    )
    config = common.get_config()
    config.data.name = chosen.data
    if chosen.data == "latents":
        config.data.crop = "center"  # the crop of cached clips
    tiny = chosen.size == "tiny"
    (_tiny if tiny else _large)(config)
    frames = config.data.get_ref("frames")
    # A step on a part of the clips spends more of its work on first frames, the hardest ones.
    is_part = tiny and chosen.data != "latents"
    train_frames = field(6, "most frames of a clip that a step trains on") if is_part else frames
    width, depth, heads = SIZES[chosen.size]
    few = chosen.steps == "few"
    flow = chosen.noise == "flow" or few
    config.task = dict(
        name=field("ar_diffusion", "module of jaxvid.tasks"),
        size=config.data.get_ref("size"),
        frames=config.data.get_ref("frames"),
        patch=field(4, "pixels along each side of a token; must divide the size"),
        tokenizer=field("", "work folder of a trained tokenizer; '' = patches of pixels"),
        tokenizer_digest=field("", "digest that the tokenizer must have; '' = any"),
        prediction=field("v" if flow and not few else "x0", "target of the network: x0, eps or v"),
        weight=field(
            "ramp" if few else "v" if tiny else "uniform",
            "loss weight: uniform, x0, v, ramp, min_snr or fused_snr",
        ),
        snr_clip=field(5.0, "v, min_snr and fused_snr: maximum SNR in the weight"),
        timesteps=field(
            "iid" if tiny else "fopp",
            "noise levels of a training clip: fopp, iid, uniform or full_sequence",
        ),
        layout=field(
            chosen.layout if chosen.layout != "mixed" else _mixed(0.3 if tiny else 0.5),
            "what noisy frames read: one of the layouts behind the colon, or shares of several",
        ),
        train_frames=train_frames,
        history_dropout=field(
            0.0, "probability that training drops the past, and the order of noise levels, of clips"
        ),
        given=field(4, "clean frames before the continuation that evaluate scores"),
    )
    config.task.model = dict(
        width=field(width, "channels of a token"),
        depth=field(depth, "transformer blocks"),
        heads=field(heads, "attention heads; must divide the width"),
        mlp_ratio=field(4.0, "hidden units of the MLP, in widths"),
        arrangement=field("joint", "mixing of space and time: joint or factorised"),
        qk_norm=field(True, "normalise queries and keys"),
        input_skip=field(tiny, "add the input to the output, in a share by noise level"),
        conv=field(
            3 if tiny else 1, "frames that a convolution of the embedded tokens spans; 1 = none"
        ),
        dtype=field("float32" if tiny else "bfloat16", "computation: float32, bfloat16 or float16"),
        remat=field(not tiny, "recompute activations in the backward pass, to save memory"),
        scan=field(not tiny, "compile one layer for all; False compiles longer, is faster on CPU"),
        mixer=common.mixer(chosen.mixer, train_frames),
    )
    config.task.noise = dict(
        name=field(
            "flow" if flow else "linear",
            "noise schedule: linear, linear_baseline, cosine, sigmoid or flow",
        ),
        num_steps=field(1025 if few else 1000, "noise levels"),
        shift=field(1.0, "flow: above 1, more of the levels are of strong noise"),
        zero_terminal_snr=field(tiny, "make the last level pure noise (flow always does)"),
    )
    config.task.shortcut = dict(
        finest=field(64 if few else 0, "the most steps per frame that the network knows; 0 = none"),
        share=field(0.25, "share of the clips of a batch that learn steps of other sizes"),
        after=field(0, "training steps before they do"),
    )
    config.task.resampling = dict(
        share=field(0.0, "share of teacher-forced steps that read the network's own frames"),
        after=field(0, "training steps before they do"),
        shift=field(0.6, "below 1, these frames are made of weaker noise"),
    )
    config.task.condition = common.condition(config, chosen.cond, chosen.text, tiny)
    config.task.sampler = dict(
        steps=field(4 if few else 50, "denoising steps per frame"),
        schedule=field(
            "autoregressive" if few or chosen.layout == "teacher_forced" else "ad",
            "ad, synchronous, autoregressive, pyramid or block_causal",
        ),
        s=field(
            50.0 if tiny else 5.0,
            "iterations between the starts of frames (block_causal: of blocks; pyramid: or parts)",
        ),
        block=field(1, "block_causal: frames per block"),
        guidance=field(1.0, "scale of classifier-free guidance; 1 = none"),
        eta=field(
            1.0 if tiny and not few else 0.0, "0 = deterministic DDIM, 1 = ancestral sampling"
        ),
        end=field("clean", "last step: clean (predicted x0) or noisy (as released, at timestep 0)"),
        memory=field("cache", "cache (exact), none, or window (recompute within a moving window)"),
    )
    config.task.sampler.history = dict(
        guidance=field(1.0, "scale of history guidance, needs task.history_dropout; 1 = none"),
        level=field(0.0, "share of the noise levels that the guiding past is noised to; 0 = clean"),
        window=field(0, "frames that the guiding past has, its reader included; 0 = all of them"),
    )
    return config


def _mixed(clean_prefix):
    """Clips with and without a prefix of clean frames."""
    return f"clean_prefix={clean_prefix:g},diffusion_forcing={1 - clean_prefix:g}"


def _tiny(config):
    """Settings of the preset for two CPU cores: clips of one large upright sprite."""
    config.steps = 4500
    config.data.max_sprites = 1
    config.data.sizes = 1
    config.data.turning = False
    config.data.num_clips = 100_000
    config.optim.lr = 4e-3
    config.optim.muon_lr = 4e-2
    config.evaluate.every = 1000


def _large(config):
    """Settings of the presets for accelerators."""
    config.steps = 100_000
    config.data.size = 64
    config.data.batch_size = 64
    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.warmup = 1000
    config.optim.ema = 0.9999
    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    config.sample.every = 5000

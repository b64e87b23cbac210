"""AR-Diffusion: a causal video diffusion transformer with one timestep per frame.

    python -m jaxvid.train --config=configs/ar_diffusion.py
    python -m jaxvid.train --config=configs/ar_diffusion.py:size=b,data=array_record \\
        --config.data.path=DIR

The first takes 10 minutes on two CPU cores; `python -m jaxvid.evaluate` then gives a mean PSNR of
19.4 dB for continuations of 4 held-out frames, where repeating the last gives 17.3 (BENCHMARKS.md).

Options: size=tiny|s|b|l|xl (tiny is made for two CPU cores, xl is the paper's 672 M parameters),
data=sprites|folder|array_record|tfds|latents, cond=none|class|text, noise=diffusion|flow,
mixer=softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing (all but softmax remember a
stream of any length in a state of constant size; softmax does what its window holds).
"""

from ml_collections import ConfigDict, FieldReference

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
        data=("sprites", "folder", "array_record", "tfds", "latents"),
        cond=("none", "class", "text"),
        noise=("diffusion", "flow"),
        mixer=common.MIXERS,
    )
    config = common.get_config()
    config.data.name = chosen.data
    if chosen.data == "latents":
        # Cached clips show the centre. (No comment behind the field: it would be its help.)
        config.data.crop = "center"
    if chosen.size != "tiny":
        _large(config)
    # One value for the data and the task: a change of data.frames, say, reaches both.
    config.data.frames = frames = FieldReference(config.data.frames)
    config.data.size = size = FieldReference(config.data.size)
    width, depth, heads = SIZES[chosen.size]
    tiny = chosen.size == "tiny"
    flow = chosen.noise == "flow"
    config.task = ConfigDict(
        dict(
            name="ar_diffusion",  # module of jaxvid.tasks
            size=size,  # pixels along each side of a frame (follows data.size)
            frames=frames,  # frames of a training clip (follows data.frames)
            patch=6 if tiny else 4,  # pixels along each side of a token; must divide the size
            tokenizer="",  # work folder of a trained tokenizer to use instead of patches
            tokenizer_digest="",  # which weights that must have; "" takes them as they are
            prediction="v" if flow else "x0",  # what the network predicts: x0, eps or v
            weight="fused_snr" if tiny else "uniform",  # loss: uniform, x0, min_snr or fused_snr
            snr_clip=20.0 if tiny else 5.0,  # min_snr, fused_snr: the SNR that counts most
            timesteps="fopp",  # noise of a training clip: fopp, iid, uniform or full_sequence
            clean_prefix=0.7
            if tiny
            else 0.5,  # probability that a training clip begins with clean frames
            given=4,  # clean frames before the continuation that evaluate scores
        )
    )
    config.task.model = ConfigDict(
        dict(
            width=width,  # channels of a token
            depth=depth,  # transformer blocks
            heads=heads,  # attention heads; must divide the width
            mlp_ratio=4.0,  # hidden units of the MLP, in widths
            arrangement="factorised" if tiny else "joint",  # joint or factorised space and time
            qk_norm=True,  # normalise queries and keys
            input_skip=tiny,  # lead the input past the network, by a share that time decides
            dtype="float32" if tiny else "bfloat16",  # of the computation; parameters are float32
            remat=not tiny,  # compute the layers again in the backward pass, to save memory
            scan=not tiny,  # one program for all layers; False compiles longer, runs faster on CPU
        )
    )
    common.add_mixer(config, chosen.mixer, frames)
    config.task.noise = ConfigDict(
        dict(
            name="flow" if flow else "linear",  # linear, linear_baseline, cosine, sigmoid or flow
            num_steps=1000,  # noise levels
            shift=1.0,  # flow: above 1 spends more of the levels on strong noise
            zero_terminal_snr=False,  # make the last level pure noise (flow always is)
        )
    )
    _condition(config, chosen.cond)
    config.task.sampler = ConfigDict(
        dict(
            steps=10 if tiny else 50,  # noise levels that a frame is walked through
            schedule="ad",  # ad, synchronous, autoregressive, pyramid or block_causal
            s=1 if tiny else 5,  # iterations from the start of one frame to that of the next
            block=1,  # block_causal: frames that share a step
            guidance=1.0,  # classifier-free guidance; 1 is none
            eta=0.0,  # 0 is deterministic DDIM, 1 is ancestral
            memory="cache",  # cache (exact), none, or window (recomputed inside a moved window)
        )
    )
    return config


def _condition(config, kind):
    """What the network is told beside the clip."""
    tokens, width = 1, 64
    if kind == "text":
        config.data.text_tokens = tokens = FieldReference(20)  # the longest sprite caption has 19
        config.data.text_width = width = FieldReference(config.data.text_width)
    config.task.condition = ConfigDict(
        dict(
            kind=kind,  # none, class or text
            tokens=tokens,  # context tokens (text: follows data.text_tokens)
            width=width,  # numbers in a context token (text: follows data.text_width)
            num_classes=101,  # rows of the class table
            drop=0.1,  # probability that training hides the condition
        )
    )


def _large(config):
    """Settings of the presets that want an accelerator."""
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

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
SPRITE_CLASSES = 24  # a shape and a colour


def get_config(options=""):
    """The experiment, as the options after the config's colon choose it."""
    chosen = common.parse(
        options,
        size=tuple(SIZES),
        data=("sprites", "folder", "array_record", "tfds"),
        cond=("none", "class", "text"),
    )
    config = common.get_config()
    config.data.name = chosen.data
    config.task = ConfigDict(
        dict(
            name="ar_diffusion",  # module of jaxvid.tasks
            size=config.data.get_ref("size"),  # the same field as data.size
            frames=config.data.get_ref("frames"),  # the same field as data.frames
            patch=4,  # pixels along each side of a token; must divide data.size
            given=4,  # clean frames before the continuation that evaluate scores
            noise=dict(
                name="linear",  # linear, linear_baseline, cosine, sigmoid or flow
                num_steps=1000,  # noise levels
                shift=1.0,  # flow: above 1 dwells longer on high noise
                zero_terminal_snr=False,  # end in pure noise (flow always does)
            ),
            prediction="x0",  # the network's output: x0, eps or v (flow: the velocity)
            weight="uniform",  # of a frame's loss: uniform, min_snr or fused_snr
            timesteps="fopp",  # training levels: fopp, iid, uniform or full_sequence
            clean_prefix=0.25,  # probability that a clip begins with clean frames
            condition=dict(
                kind=chosen.cond,  # none, class or text
                tokens=1,  # context embeddings; for text those of data.text_tokens
                width=64,  # of a context embedding; for text that of data.text_width
                num_classes=SPRITE_CLASSES,  # classes of the data set
                drop=0.1,  # probability of the null condition, which guidance needs
            ),
            sampler=dict(
                steps=50,  # denoising steps of a frame
                schedule="ad",  # synchronous, ad, autoregressive, pyramid or block_causal
                s=5.0,  # steps by which each frame lags the frame before it
                block=1,  # block_causal: frames in a block
                guidance=1.0,  # scale of classifier-free guidance; 1 is none
                eta=0.0,  # fresh noise in a step: 0 is DDIM, 1 is ancestral
                memory="cache",  # cache (exact), none (recompute all) or window (recompute some)
            ),
        )
    )
    _add_model(config, *SIZES[chosen.size])
    if chosen.cond == "text":
        config.data.text_tokens = 16
        config.task.condition.tokens = config.data.get_ref("text_tokens")
        config.task.condition.width = config.data.get_ref("text_width")
    if chosen.size != "tiny":
        _for_accelerators(config)
    return config


def _add_model(config, width, depth, heads):
    config.task.model = ConfigDict(
        dict(
            width=width,  # channels of a token
            depth=depth,  # transformer blocks
            heads=heads,  # attention heads; must divide the width
            mlp_ratio=4.0,  # hidden units of the MLP over the width
            arrangement="factorised",  # joint, or factorised: within frames, then over time
            mixer=dict(
                name="softmax",  # temporal mixer
                window=16,  # frames that a frame sees, itself included
                sinks=0,  # first frames that stay visible beyond the window
                mask="causal",  # causal; full and leaky are baselines that cannot stream
            ),
            qk_norm=True,  # normalise queries and keys
            dtype="float32",  # of activations; bfloat16 on accelerators
            remat=False,  # recompute activations in the backward pass, to save memory
            unroll=1,  # blocks compiled as one; more is faster and compiles longer
        )
    )


def _for_accelerators(config):
    config.steps = 100_000
    config.data.size = 64
    config.data.batch_size = 64
    config.data.threads = 16
    config.task.model.arrangement = "joint"
    config.task.model.dtype = "bfloat16"
    config.optim.lr = 1e-4
    config.optim.warmup = 1000
    config.optim.ema = 0.9999
    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    config.sample.every = 5000

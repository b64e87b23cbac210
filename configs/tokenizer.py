"""Causal tokenizers: video to a few tokens per frame and back, as streams.

    python -m jaxvid.train --config=configs/tokenizer.py
    python -m jaxvid.train --config=configs/tokenizer.py:arch=omnitokenizer,quantizer=vq,size=b,\\
        data=array_record --config.data.path=DIR

Options: arch=cvivit|omnitokenizer|ar_vae, quantizer=fsq|vq|lfq|bsq|kl, size=tiny|b (tiny is for two
CPU cores, b has the width and depth of the papers), data=sprites|folder|array_record|tfds,
gan=none|patch|stylegan, stage=none|image|joint|kl,
mixer=paper|alibi|softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing (over time, not
for ar_vae; paper is alibi for cvivit and softmax for omnitokenizer).

A stage is one of the three in which OmniTokenizer is trained (Wang et al. 2024). Each starts from
the weights of the one before. A stage decides frames, sizes, quantizer, discriminators, learning
rates and the weights of losses:

    C=configs/tokenizer.py:arch=omnitokenizer,size=b,data=array_record
    python -m jaxvid.train --config=$C,stage=image --workdir=IMAGE --config.data.path=DIR
    python -m jaxvid.train --config=$C,stage=joint --workdir=JOINT --config.data.path=DIR \\
        --config.init_from=IMAGE
    python -m jaxvid.train --config=$C,stage=kl --workdir=KL --config.data.path=DIR \\
        --config.init_from=JOINT

Differences from their script, beside the network:
- the images of the joint stage are frames of its clips, in the same step and not in turns
- the cosine ends at 0 and not at 5e-5
- Adam has the betas of their paper, (0.9, 0.99)
- codes have unit length
- discriminators have GroupNorm, see no blurred or noisy images and skip no step
- positions are rotary and frame groups hold 4 frames from the first stage on
With size=tiny the stages keep the optimizer and the code restarts of size=tiny.

Scores of the first command on held-out sprites, in 9 minutes on two CPU cores:

    step        500   1000   1500   1800
    PSNR, dB   25.4   27.4   28.0   28.2
    SSIM       0.81   0.87   0.88   0.88

Scores of the other quantizers after 600 steps; usage is the share of the codes that 16 clips use
(0.013 with fsq, whose 64,000 codes outnumber the tokens of these clips):

                vq    lfq    bsq     kl
    codes      512   1024   1024      -
    PSNR, dB  25.2   20.1   22.6   26.5
    usage     0.55   0.82   0.73      -
"""

from configs import common
from configs.common import field

# size -> width, heads, layers of space and of time on each side, pixels of a patch
SIZES = {
    "tiny": (96, 3, 2, 1, 4),
    "b": (512, 8, 4, 4, 8),
}


def get_config(options=""):
    """The experiment, with the options after the colon of the config."""
    chosen = common.parse(
        options,
        arch=("cvivit", "omnitokenizer", "ar_vae"),
        quantizer=("fsq", "vq", "lfq", "bsq", "kl"),
        size=tuple(SIZES),
        data=("sprites", "folder", "array_record", "tfds"),
        gan=("none", "patch", "stylegan"),
        mixer=("paper", "alibi", *common.MIXERS),
        stage=("none", "image", "joint", "kl"),
    )
    if chosen.arch == "ar_vae" and chosen.mixer != "paper":
        raise ValueError(f"mixer={chosen.mixer}: arch=ar_vae attends to a window; leave mixer out")
    is_staged = chosen.stage != "none"
    if is_staged:
        _stage_options(chosen, options)
    config = common.get_config()
    config.data.name = chosen.data
    config.steps = 1800
    config.data.frames = 17
    tiny = chosen.size == "tiny"
    if not tiny:
        _large(config)
    if is_staged:
        _stage_run(config, chosen.stage, tiny)
    config.task = dict(
        name=field("tokenizer", "module of jaxvid.tasks"),
        size=config.data.get_ref("size"),
        frames=config.data.get_ref("frames"),
        arch=field(chosen.arch, "cvivit, omnitokenizer or ar_vae; set it by the config's option"),
        error=field("l2", "reconstruction error of pixels: l1 or l2"),
        images=field(0.125, "frames also reconstructed as images, as a share of the clip's frames"),
        sizes=field((), "resolutions, one drawn per step, at most data.size; () = data.size alone"),
        inflation=field(
            "average", "of init_from's image weights to frame groups: average, first or none"
        ),
    )
    width, heads, space, time, patch = SIZES[chosen.size]
    config.task.network = dict(
        width=field(width, "channels of a token"),
        heads=field(heads, "attention heads; must divide the width"),
        patch=field(patch, "pixels along each side of a token; must divide the size"),
        mlp_ratio=field(8 / 3, "hidden units of the gated MLP, in widths"),
        dtype=field("float32" if tiny else "bfloat16", "computation: float32 or bfloat16"),
        remat=field(not tiny, "recompute activations in the backward pass, to save memory"),
    )
    if chosen.arch == "ar_vae":
        config.task.network.update(
            tokens=field(32, "latent tokens per frame"),
            depth=field(space + time, "layers of the encoder, and of the decoder"),
            window=field(16, "frames that a frame sees, its own included"),
            unit=field(False, "normalise latents before decoding"),
        )
    else:
        _cvivit(config, chosen, 2 if tiny else 4, space, time)
    config.task.quantizer = _quantizer(chosen.quantizer, tiny)
    config.task.perceptual = dict(
        lpips=field("", ".npz or .safetensors with VGG-16 and the heads of LPIPS; '' = no LPIPS"),
        lpips_weight=field(0.1, "loss weight of LPIPS, on a frame of each clip and image"),
        i3d=field("", ".npz or .safetensors with I3D; '' = no I3D loss"),
        i3d_weight=field(1.0, "loss weight of the squared distance of clips in I3D features"),
    )
    if chosen.gan != "none":
        _gan(config, chosen.gan, tiny)
    if is_staged:
        _stage_losses(config, chosen.stage, tiny)
    return config


def _stage_options(chosen, options):
    """Set the options that a stage decides; ValueError if the command line sets them too."""
    if chosen.arch != "omnitokenizer":
        raise ValueError(f"stage={chosen.stage}: stages are of arch=omnitokenizer; name it too")
    for name in ("quantizer", "gan"):
        if f"{name}=" in options:
            raise ValueError(f"stage={chosen.stage}: decides the {name}; leave {name} out")
    chosen.quantizer, chosen.gan = "kl" if chosen.stage == "kl" else "vq", "patch"


def _stage_run(config, stage, tiny):
    """Clips and optimizer of a stage."""
    if stage == "image":
        config.data.frames = 1
    if tiny:
        return
    config.data.size = 256 if stage == "image" else 384
    if stage == "image":
        config.data.batch_size = 256
        config.optim.lr = 1e-3
        config.optim.warmup = 50_000
    else:
        config.optim.lr = 5e-5
        config.optim.schedule = "constant"


def _stage_losses(config, stage, tiny):
    """Resolutions and loss weights of a stage."""
    config.task.error = "l1"
    if stage == "image":
        config.task.images = 0.0
    else:
        config.task.sizes = (16, 24) if tiny else (128, 192, 256, 320, 384)
    if stage != "kl":
        config.task.quantizer.kmeans = 1
        if not tiny:
            config.task.quantizer.restart = 0.0
    config.task.perceptual.lpips_weight = 4.0
    config.task.perceptual.i3d_weight = 0.0
    # The first stage has a discriminator of images, the others a new one of clips.
    config.task.gan.image = 0.01 if stage == "image" else 0.0
    config.task.gan.video = 0.0 if stage == "image" else 0.01
    # Their weight is 4, of the sum over 4 layers; ours is of the mean.
    config.task.gan.feature_matching = 16.0
    warmup = field(config.get_ref("steps"), "steps of linear warm-up (follows steps)")
    config.optim.discriminator.warmup = warmup


def _gan(config, kind, tiny):
    """Discriminators of images and clips, trained in the same step as the tokenizer."""
    width = {"patch": 16 if tiny else 64, "stylegan": 32 if tiny else 512}[kind]
    config.task.gan = dict(
        kind=field(kind, "discriminator: patch or stylegan"),
        width=field(width, "channels of the discriminators"),
        loss=field("hinge", "hinge or non_saturating"),
        image=field(0.1, "generator loss weight on images; 0 = no image discriminator"),
        video=field(0.1, "generator loss weight on clips; 0 = no video discriminator"),
        start=field(500 if tiny else 50_000, "first step with discriminators"),
        adaptive=field(False, "also scale image and video by the ratio of gradient norms (VQGAN)"),
        r1=field(0.0, "weight of the R1 gradient penalty"),
        lecam=field(0.0, "weight of the LeCam regularizer"),
        feature_matching=field(0.0, "generator loss weight of feature matching"),
    )
    # All other fields of the discriminators' optimizer are those of optim.
    config.optim.discriminator = dict(
        name=field("adamw", "adamw or muon"),
        lr=field(0.1 * config.optim.lr, "peak learning rate"),
        b1=field(0.5, "AdamW beta1"),
        weight_decay=field(0.0, "decoupled weight decay of matrices, from step 0 on"),
    )


def _cvivit(config, chosen, t_patch, space, time):
    """Fields of the network that only C-ViViT and OmniTokenizer have."""
    omni = chosen.arch == "omnitokenizer"
    encoder = "t" * (space - space // 2) + "w" * (space // 2) if omni else "t" * space
    mixer = chosen.mixer
    if mixer == "paper":
        mixer = "softmax" if omni else "alibi"
    config.task.network.update(
        t_patch=field(t_patch, "frames per latent after the first"),
        encode_blocks=field(encoder, "spatial layers of the encoder: t global, w in windows"),
        decode_blocks=field("t" * space, "spatial layers of the decoder: t global, w in windows"),
        window=field(8, "tokens along each side of a window of the w layers"),
        position=field("rope" if omni else "rel", "spatial positions: rope, or rel (learned bias)"),
        temporal_depth=field(time, "temporal layers of the encoder, and of the decoder"),
        peg=field(True, "causal convolution before the temporal mixer (PEG)"),
        stem=field("split", "first frame: split (its own weights) or shared (repeated)"),
        patchify=field("linear", "linear or haar"),
        patch_norm=field(False, "normalise patches, which hides the brightness of flat ones"),
        mixer=_mixer(mixer),
    )


def _mixer(name):
    """The section of a temporal mixer. Attention has a window of latent frames."""
    if name not in ("softmax", "alibi"):
        return common.mixer(name, None)
    meaning = "latent frames that a latent frame sees, its own included"
    return dict(
        name=field(name, "temporal mixer; set it by the config's option"), window=field(8, meaning)
    )


def _quantizer(name, tiny):
    """The section of a quantizer, with its options in `jaxvid.layers.quantize`."""
    section = dict(name=field(name, "fsq, vq, lfq, bsq or kl; set it by the config's option"))
    if name == "fsq":
        levels = field((8, 8, 8, 5, 5, 5), "levels per channel; their product is the vocabulary")
        return section | dict(levels=levels)
    if name == "vq":
        return section | dict(
            codes=field(512 if tiny else 8192, "vocabulary"),
            channels=field(8, "channels of a latent"),
            ema=field(0.99, "EMA decay of the codebook; 0 = codes trained by gradient"),
            commitment=field(0.25, "weight of the commitment loss"),
            normalize=field(True, "compare latents and codes by direction"),
            restart=field(
                0.1 if tiny else 0.01, "restart codes with fewer tokens per batch; 0 = never"
            ),
            kmeans=field(4, "k-means iterations on the first batch; 0 = random codes"),
            estimator=field("straight_through", "gradient: straight_through or rotation"),
        )
    if name == "kl":
        return section | dict(
            channels=field(8, "channels of a latent"),
            weight=field(1e-6, "weight of the KL divergence, summed over a clip"),
        )
    return section | dict(
        channels=field(10 if tiny else 18, "channels of a latent; the vocabulary is 2^channels"),
        entropy=field(0.1, "weight of the entropy loss"),
        diversity=field(1.0, "weight of the batch's entropy against that of single tokens"),
        commitment=field(0.25, "weight of the commitment loss"),
        sharpness=field(10.0 if tiny else 100.0, "inverse temperature of the entropies"),
        group=field(10 if tiny else 9, "bits per group, whose joint entropy is computed"),
    )


def _large(config):
    """Settings of the preset for accelerators."""
    config.steps = 500_000
    config.data.size = 128
    config.data.batch_size = 64
    config.optim.name = "adamw"
    config.optim.lr = 1e-4
    config.optim.warmup = 5000
    config.optim.ema = 0.999
    config.checkpoint.every = 1000
    config.evaluate.every = 5000
    config.sample.every = 5000

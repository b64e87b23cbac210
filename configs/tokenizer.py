"""Causal tokenizers: video to a few tokens per frame and back, as streams.

    python -m jaxvid.train --config=configs/tokenizer.py
    python -m jaxvid.train --config=configs/tokenizer.py:arch=omnitokenizer,quantizer=vq,size=b,\\
        data=array_record --config.data.path=DIR

Options: arch=cvivit|omnitokenizer|ar_vae, quantizer=fsq|vq|lfq|bsq|kl, size=tiny|b (tiny is made
for two CPU cores, b has the papers' width and depth), data=sprites|folder|array_record|tfds,
gan=none|patch|stylegan,
mixer=paper|alibi|softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing (over time, not of
ar_vae; paper is alibi for cvivit and softmax for omnitokenizer), stage=none|image|joint|kl.

The stages of OmniTokenizer (Wang et al. 2024), each from the weights of the one before; they decide
frames, sizes, quantizer, discriminators, learning rates and weights of losses:

    C=configs/tokenizer.py:arch=omnitokenizer,size=b,data=array_record
    python -m jaxvid.train --config=$C,stage=image --workdir=IMAGE --config.data.path=DIR
    python -m jaxvid.train --config=$C,stage=joint --workdir=JOINT --config.data.path=DIR \\
        --config.init_from=IMAGE
    python -m jaxvid.train --config=$C,stage=kl --workdir=KL --config.data.path=DIR \\
        --config.init_from=JOINT

What differs from their script, beside the network itself: images of the joint stage are frames of
its clips and come in the same step, not by turns; the cosine ends at 0, not 5e-5; Adam as in their
paper, (0.9, 0.99); codes are of unit length; discriminators have GroupNorm and see no blurred or
noisy pictures, and no step of theirs is skipped; positions are rotations and groups hold 4 frames
from the first stage on. With size=tiny the stages keep the optimiser, the restarts of codes and the
size of tiny.

Measured on held-out sprites, two cores of an AMD EPYC, jax 0.10.2. The first command, at one go, in
8 minutes 45 seconds on a machine shared with other work, on 2026-11-25:

    step        500   1000   1500   1800
    PSNR, dB   25.4   27.4   28.0   28.2
    SSIM       0.81   0.87   0.88   0.88

The other quantizers in runs of 600 steps (on 2026-11-22 and the night after, kl on 2026-11-25), and
the share of their codes that 16 clips use:

                vq    lfq    bsq     kl
    codes      512   1024   1024      -
    PSNR, dB  25.2   20.1   22.6   26.5
    use       0.55   0.82   0.73      -

(FSQ has 64,000 codes, more than these clips have tokens, and they use 0.013 of them.)
"""

from ml_collections import ConfigDict, FieldReference

from configs import common

# size -> width, heads, layers of space and of time on each side, pixels of a patch
SIZES = {
    "tiny": (96, 3, 2, 1, 4),
    "b": (512, 8, 4, 4, 8),
}


def get_config(options=""):
    """The experiment, as the options after the config's colon choose it."""
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
    # One value for the data and the task: a change of data.frames, say, reaches both.
    config.data.frames = frames = FieldReference(config.data.frames)
    config.data.size = size = FieldReference(config.data.size)
    config.task = ConfigDict(
        dict(
            name="tokenizer",  # module of jaxvid.tasks
            size=size,  # pixels along each side of a frame (follows data.size)
            frames=frames,  # frames of a training clip (follows data.frames)
            arch=chosen.arch,  # cvivit, omnitokenizer or ar_vae
            error="l2",  # of the pixels: l1 or l2
            images=0.125,  # frames also rebuilt as images, as a share of the clip's
            sizes=(),  # pixels of which every step draws one, up to data.size; () for that alone
            inflation="average",  # of the weights of an init_from of images: average, first or none
        )
    )
    width, heads, space, time, patch = SIZES[chosen.size]
    config.task.network = ConfigDict(
        dict(
            width=width,  # channels of a token
            heads=heads,  # attention heads; must divide the width
            patch=patch,  # pixels along each side of a token; must divide the size
            mlp_ratio=8 / 3,  # hidden units of the gated MLP, in widths
            dtype="float32" if tiny else "bfloat16",  # of the computation; parameters are float32
            remat=not tiny,  # compute the layers again in the backward pass, to save memory
        )
    )
    if chosen.arch == "ar_vae":
        config.task.network.tokens = 32  # latent tokens of a frame
        config.task.network.depth = space + time  # layers of encoder and of decoder
        config.task.network.window = 16  # ar_vae: frames that one sees; else: cells of a window
        config.task.network.unit = False  # read latents as directions
    else:
        _cvivit(config, chosen.arch == "omnitokenizer", 2 if tiny else 4, space, time)
        if chosen.mixer == "paper":
            chosen.mixer = "softmax" if chosen.arch == "omnitokenizer" else "alibi"
        config.task.network.mixer = ConfigDict()
        config.task.network.mixer.name = chosen.mixer  # temporal mixer, a name in jaxvid.mixers
        if chosen.mixer in ("softmax", "alibi"):
            config.task.network.mixer.window = 8  # latent frames that one sees, its own included
    _quantizer(config, chosen.quantizer, tiny)
    # Weights of others, .npz or .safetensors; without them these losses are off.
    config.task.perceptual = ConfigDict(
        dict(
            lpips="",  # file of VGG-16 with the heads of LPIPS
            lpips_weight=0.1,  # of the distance of a frame of every clip and image
            i3d="",  # file of I3D
            i3d_weight=1.0,  # of the squared distance of clips in its features
        )
    )
    if chosen.gan != "none":
        _gan(config, chosen.gan, tiny)
    if is_staged:
        _stage_losses(config, chosen.stage, tiny)
    return config


def _stage_options(chosen, options):
    """What a stage of OmniTokenizer decides of the options; ValueError if they say it too."""
    if chosen.arch != "omnitokenizer":
        raise ValueError(f"stage={chosen.stage}: stages are of arch=omnitokenizer; name it too")
    for name in ("quantizer", "gan"):
        if f"{name}=" in options:
            raise ValueError(f"stage={chosen.stage}: decides the {name}; leave {name} out")
    chosen.quantizer, chosen.gan = "kl" if chosen.stage == "kl" else "vq", "patch"


def _stage_run(config, stage, tiny):
    """Clips and optimiser of a stage."""
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
    """Sizes and weights of a stage."""
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
    # Pictures are judged in the first stage alone, and clips, by a new discriminator, after it.
    config.task.gan.image = 0.01 if stage == "image" else 0.0
    config.task.gan.video = 0.0 if stage == "image" else 0.01
    # Theirs weighs the sum of 4 layers by 4, ours is of the mean.
    config.task.gan.feature_matching = 16.0
    config.steps = steps = FieldReference(config.steps)
    config.optim.discriminator.warmup = steps  # steps of linear rise, here all (follows steps)


def _gan(config, kind, tiny):
    """Discriminators of images and clips, trained in the same step as the tokenizer."""
    config.task.gan = ConfigDict(
        dict(
            kind=kind,  # patch or stylegan
            width=(16 if tiny else 64) if kind == "patch" else (32 if tiny else 512),  # channels
            loss="hinge",  # hinge or non_saturating
            image=0.1,  # weight of the verdict on images; 0 has no discriminator of these
            video=0.1,  # weight of the verdict on clips; 0 has no discriminator of these
            start=500 if tiny else 50_000,  # first step with discriminators
            adaptive=False,  # also multiply image and video by a quotient of gradients
            r1=0.0,  # weight of the discriminators' squared gradient at true samples
            lecam=0.0,  # weight of keeping verdicts near the running mean of the other side's
            feature_matching=0.0,  # weight of the mean distance in the discriminators' layers
        )
    )
    # What the discriminators' optimiser has for itself; the other fields are those of optim.
    config.optim.discriminator = ConfigDict(
        dict(
            name="adamw",  # adamw or muon
            lr=0.1 * config.optim.lr,  # peak learning rate
            b1=0.5,  # memory of the mean gradient
            weight_decay=0.0,  # decay would shrink them before task.gan.start too
        )
    )


def _cvivit(config, omni, t_patch, space, time):
    """What C-ViViT and OmniTokenizer have in common beside the rest."""
    encoder = "t" * (space - space // 2) + "w" * (space // 2) if omni else "t" * space
    config.task.network.t_patch = t_patch  # frames in a latent after the first
    config.task.network.encode_blocks = encoder  # layers in space: t for all cells, w for windows
    config.task.network.decode_blocks = "t" * space  # the same of the decoder
    config.task.network.window = 8  # ar_vae: frames that one sees; else: cells of a window
    config.task.network.position = "rope" if omni else "rel"  # in space: rope or rel(ative bias)
    config.task.network.temporal_depth = time  # layers over time, of encoder and of decoder
    config.task.network.peg = True  # causal convolution before the temporal mixer
    config.task.network.stem = "split"  # first frame: split has its own weights, shared repeats it
    config.task.network.patchify = "linear"  # linear or haar
    config.task.network.patch_norm = False  # as peers have it; hides how bright a flat patch is


def _quantizer(config, name, tiny):
    """Options of the quantizers of `jaxvid.layers.quantize`."""
    if name == "fsq":
        config.task.quantizer = ConfigDict(
            dict(
                name=name,  # fsq, vq, lfq, bsq or kl: choose by the config's option
                levels=(8, 8, 8, 5, 5, 5),  # of each channel; the product is the vocabulary
            )
        )
    elif name == "vq":
        config.task.quantizer = ConfigDict(
            dict(
                name=name,  # fsq, vq, lfq, bsq or kl: choose by the config's option
                codes=512 if tiny else 8192,  # vocabulary
                channels=8,  # numbers in a latent
                ema=0.99,  # memory of the means that codes follow; 0 trains them by gradient
                commitment=0.25,  # weight of pulling tokens to their codes
                normalize=True,  # compare directions
                restart=0.1 if tiny else 0.01,  # fewer tokens a batch restart a code; 0 never
                kmeans=4,  # iterations of k-means on the first batch; 0 for none
                estimator="straight_through",  # of the gradient: straight_through or rotation
            )
        )
    elif name == "kl":
        config.task.quantizer = ConfigDict(
            dict(
                name=name,  # fsq, vq, lfq, bsq or kl: choose by the config's option
                channels=8,  # numbers in a latent
                weight=1e-6,  # of the divergence from a standard Gaussian, summed over a clip
            )
        )
    else:
        config.task.quantizer = ConfigDict(
            dict(
                name=name,  # fsq, vq, lfq, bsq or kl: choose by the config's option
                channels=10 if tiny else 18,  # numbers in a latent; 2^channels is the vocabulary
                entropy=0.1,  # weight of the entropies
                diversity=1.0,  # of the batch's entropy, beside the token's
                commitment=0.25,  # weight of pulling tokens to their codes
                sharpness=10.0 if tiny else 100.0,  # inverse temperature of the entropies
                group=10 if tiny else 9,  # bits whose joint entropy is taken
            )
        )


def _large(config):
    """Settings of the preset that wants an accelerator."""
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

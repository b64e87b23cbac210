"""What every experiment shares: the sections of a config, and the options after its colon.

Configs are plain data. The comment beside a field is its help: `--config_help` prints it.
"""

from ml_collections import ConfigDict

MIXERS = ("softmax", "linear", "lightning", "gla", "gated_delta", "lightnet", "aaren", "routing")


def parse(options: str, **choices: tuple[str, ...]) -> ConfigDict:
    """ "size=s,data=folder" -> {size: "s", data: "folder"}; a key not given has its first choice.

    Raises ValueError naming the choices for an unknown key or value.
    """
    chosen = {key: values[0] for key, values in choices.items()}
    for option in filter(None, options.split(",")):
        key, _, value = option.partition("=")
        if key not in choices:
            raise ValueError(f"no option {key!r}; the options are {', '.join(choices)}")
        if value not in choices[key]:
            raise ValueError(f"{key}={value}: choose one of {', '.join(choices[key])}")
        chosen[key] = value
    return ConfigDict(chosen)


def get_config() -> ConfigDict:
    """The sections that every task has, at sizes for two CPU cores."""
    config = ConfigDict()
    config.seed = 0  # of parameters, data order, noise and dropout
    config.steps = 2500  # optimiser steps in all

    config.data = ConfigDict(
        dict(
            name="sprites",  # source: sprites, folder, array_record, tfds or latents
            path="",  # where the clips are (not for sprites)
            frames=16,  # frames in a training window
            size=24,  # pixels along each side of the square frames
            stride=1,  # source frames from one frame of the window to the next
            batch_size=8,  # clips in a step, over all hosts
            flip=False,  # mirror half of the clips left to right
            crop="random",  # square cut out of a frame: random or center
            difficulty=0.0,  # sprites: 0 is a plain grey ground, 1 a strongly textured one
            num_clips=4096,  # sprites: clips in the training split
            workers=0,  # processes that decode; 0 decodes in threads of this one
            threads=2,  # threads that decode, in each process
            text_tokens=0,  # words of the caption given to the model; 0 leaves text out
            text_width=64,  # width of a word's embedding
        )
    )
    config.optim = ConfigDict(
        dict(
            name="muon",  # adamw; or muon for the matrices of layers, and AdamW for the rest
            lr=2e-3,  # peak learning rate
            muon_lr=2e-2,  # the same for the matrices that Muon updates
            warmup=100,  # steps of linear rise from 0 to the peak
            schedule="cosine",  # after the rise: constant, or cosine down to 0
            b1=0.9,  # AdamW: memory of the mean gradient
            b2=0.99,  # AdamW: memory of the squared gradient
            weight_decay=0.0,  # decoupled, of matrices (muon: of its own only)
            clip=1.0,  # largest global norm of the gradient; 0 does not clip
            ema=0.999,  # memory of the weights that evaluate and sample use
            accumulate=1,  # parts that a batch is worked through in, to save memory
            skip_nonfinite=3,  # NaN steps in a row that are skipped before the run stops
        )
    )
    # Devices along each axis; -1 takes those that are left.
    config.mesh = ConfigDict(
        dict(
            data=-1,  # devices holding copies of the parameters, each with its clips
            fsdp=1,  # devices over which parameters and clips are both split
            tensor=1,  # devices over which heads and hidden units are split
            seq=1,  # devices over which the frames of a clip are split; must divide them
        )
    )
    config.checkpoint = ConfigDict(
        dict(
            every=500,  # steps between checkpoints
            keep=2,  # newest checkpoints kept
            best="",  # metric of evaluate whose best checkpoint is kept too; "" for none
        )
    )
    config.log = ConfigDict(
        dict(
            every=50,  # steps between lines on the console and in metrics.jsonl
            tensorboard=True,  # also write TensorBoard event files
        )
    )
    config.evaluate = ConfigDict(
        dict(
            every=500,  # steps between evaluations; 0 leaves only the one at the end
            batches=2,  # validation batches in an evaluation
        )
    )
    config.sample = ConfigDict(
        dict(
            every=0,  # steps between sampled clips; 0 leaves only those at the end
            num=8,  # clips sampled each time
        )
    )
    config.init_from = ""  # work folder of a run whose weights to start from; "" starts anew
    config.compile_cache = ""  # folder of compiled programs; "" is <workdir>/../jax_cache
    return config


def add_mixer(config, name, frames):
    """Fill in config.task.model.mixer: a name of MIXERS and its options, for clips of `frames`."""
    config.task.model.mixer = ConfigDict()
    config.task.model.mixer.name = name  # temporal mixer, a name in jaxvid.mixers
    if name == "softmax":
        # A value of its own, so that setting the window leaves the clips alone.
        window = frames + 0
        config.task.model.mixer.window = window  # frames it sees, its own too (follows data.frames)
        config.task.model.mixer.sinks = 0  # first frames that stay visible beyond the window
        config.task.model.mixer.mask = "causal"  # or full or leaky, which cannot stream
    if name == "lightning":
        config.task.model.mixer.slopes = "lightning"  # or fla or sglang, or one per head: 0.5,0.1
        config.task.model.mixer.layer = 0  # layer whose decays of that law all layers have
        config.task.model.mixer.layers = 1  # layers that the law is told of
    if name == "gla":
        config.task.model.mixer.feature = "none"  # of queries and keys: none (the paper's) or silu
    if name == "gated_delta":
        config.task.model.mixer.conv = 4  # frames that the convolutions before the rule read
    if name == "lightnet":
        config.task.model.mixer.lrpe = True  # positions by the cosine of distances over (t, h, w)
        config.task.model.mixer.tpe = 2  # decaying exponentials at the input, per channel; or 0
    if name == "routing":
        config.task.model.mixer.clusters = 4  # clusters of a head
        config.task.model.mixer.members = 32  # past tokens of a cluster that can be read

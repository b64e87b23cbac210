"""What every experiment shares: sections of a config, mixers, and the options after the colon.

Configs are plain data and import nothing of jaxvid. A field is a value with its meaning, which
`--config_help` prints; a preset that assigns another value keeps the meaning.
"""

from ml_collections import ConfigDict, FieldReference


def field(value, meaning: str) -> FieldReference:
    """A value and its meaning.

    value: a plain value, or the reference to another field (`config.data.get_ref("frames")`), which
    this field then follows until it is set. To give one value two names, put the reference itself
    in both places.
    """
    reference = FieldReference(value)
    reference.meaning = meaning
    return reference


def memory(chunk: bool = True, attention: bool = False, local: int | None = None) -> dict:
    """The options of a mixer whose state is a network.

    chunk: whether it has chunks of several frames. attention: whether it has attention. local:
    frames that this sees, if that is an option.
    """
    options = dict(
        conv=field(4, "frames in the short convolutions of queries, keys and values"),
        depth=field(2, "layers of the network that is the memory of a head"),
        expansion=field(4, "its hidden width, in widths of a head"),
    )
    if chunk:
        options["chunk"] = field(1, "frames whose gradients are taken at the same weights")
    if attention:
        options["persistent"] = field(4, "learned tokens that attention sees before every stream")
    if local is not None:
        options["local"] = field(local, "frames that attention sees, its own included")
        meaning = "when a frame enters the memory: committed, or evicted from those frames"
        options["write"] = field("committed", meaning)
    return options


def softmax(frames) -> dict:
    """The options of softmax attention that streams. frames: of its window."""
    return dict(
        window=field(frames, "frames that a frame sees, its own included"),
        sinks=field(0, "first frames that stay visible beyond the window"),
        positions=field(
            "absolute",
            "absolute, anchored (sinks stay just before the window) or cyclic (distances repeat "
            "after window + sinks frames)",
        ),
    )


# Temporal mixers: name -> options, given the frames of a training clip.
MIXERS = {
    "softmax": lambda frames: dict(
        **softmax(frames),
        mask=field("causal", "causal, or full, which cannot stream"),
    ),
    "linear": lambda frames: {},
    "lightning": lambda frames: dict(
        slopes=field("lightning", "decay slopes: lightning, fla, sglang, or one per head: 0.5,0.1"),
        layer=field(0, "index of the layer whose slopes all layers use"),
        layers=field(1, "number of layers in the formula of the slopes"),
    ),
    "gla": lambda frames: dict(
        feature=field("none", "activation of queries and keys: none (as in the paper) or silu"),
    ),
    "gated_delta": lambda frames: dict(
        conv=field(4, "frames in the short convolutions of queries, keys and values"),
    ),
    "lightnet": lambda frames: dict(
        lrpe=field(True, "relative positions by cosines of distances over (t, h, w) (MD-LRPE)"),
        tpe=field(2, "decaying exponentials per channel at the input (MD-TPE); 0 = none"),
    ),
    "aaren": lambda frames: {},
    "routing": lambda frames: dict(
        clusters=field(4, "clusters per head"),
        members=field(32, "newest past tokens of a cluster that a query sees"),
    ),
    "titans_lmm": lambda frames: memory(),
    "titans_mac": lambda frames: memory(chunk=False, attention=True),
    "titans_mag": lambda frames: memory(attention=True, local=4),
    "titans_mal": lambda frames: memory(attention=True, local=4),
    "moneta": lambda frames: memory(),
    "yaad": lambda frames: memory(),
    "memora": lambda frames: memory(chunk=False),
    "lact": lambda frames: dict(
        expansion=field(2, "hidden width of the memory of a head, in widths of a head"),
        local=field(4, "frames that attention sees, its own included"),
    ),
}


def mixer(name: str, frames) -> dict:
    """The section of a temporal mixer. frames: of a training clip, a number or a reference."""
    meaning = "temporal mixer, a name in jaxvid.mixers; set it by the config's option"
    options = dict(name=field(name, meaning), **MIXERS[name](frames))
    if name == "softmax":
        return options
    meaning = "each layer of this number is softmax attention instead, by mixer.attention; 0 = none"
    return options | dict(every=field(0, meaning), attention=softmax(4))


def condition(config, kind: str, text: str, tiny: bool) -> dict:
    """The section of the condition of a generator; sets fields of config.data and config.optim.

    kind: none, class or text. text: how captions come, bytes, words or stored.
    """
    drop = field(0.1, "probability that training drops the condition")
    classes = field(101, "rows of the class table")
    kind_field = field(kind, "none, class or text")
    if kind != "text":
        tokens, width = field(1, "context tokens"), field(64, "width of a context token")
        return dict(kind=kind_field, tokens=tokens, width=width, num_classes=classes, drop=drop)
    config.data.text = text
    # The longest caption of sprites has 19 words and 103 bytes.
    config.data.text_tokens = 20 if text == "words" else 128 if tiny else 256
    if text == "stored":
        config.data.text_width = 768  # of the base encoder of T5
    if tiny and text == "bytes":
        # At the rates of the generator the encoder loses the words before they are of use.
        config.optim.conditioner = dict(
            name=field("adamw", "adamw or muon"), lr=field(3e-4, "peak learning rate")
        )
    return dict(
        kind=kind_field,
        encoder=field("bytes" if text == "bytes" else "none", "of captions: bytes, or none"),
        tokens=config.data.get_ref("text_tokens"),
        queries=field(8 if tiny else 16, "context tokens, which read the text; 0 = the text as is"),
        width=field(64 if tiny else 512, "width of a context token"),
        depth=field(2 if tiny else 4, "bytes: layers of the encoder"),
        heads=field(4 if tiny else 8, "heads of the encoder and of the queries"),
        num_classes=classes,
        drop=drop,
    )


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
    config.seed = field(0, "random seed of parameters, data order, noise and dropout")
    config.steps = field(2500, "optimizer steps of the run")
    config.data = dict(
        name=field(
            "sprites",
            "source: sprites, folder, array_record, tfds, latents, sprites_recall, needle or mqar",
        ),
        path=field("", "folder of the clips (not for those that are generated)"),
        frames=field(16, "frames in a training clip"),
        size=field(24, "pixels along each side of the square frames"),
        fps=field(
            0.0, "folder: frames per second of the source, by the times of each video; 0 = all"
        ),
        stride=field(1, "source frames from one frame of a clip to the next"),
        batch_size=field(8, "clips per step, over all hosts"),
        flip=field(False, "mirror half of the clips left to right"),
        crop=field("random", "position of the square crop: random or center"),
        difficulty=field(
            0.0, "sprites, sprites_recall: from 0, a plain grey background, to 1, a strong texture"
        ),
        max_sprites=field(3, "sprites: most of them in a clip; each has a size of its own"),
        sizes=field(3, "sprites: 1 = all are large, 2 = large or medium, 3 = any size"),
        turning=field(True, "sprites: half of them turn; False = all stand upright"),
        num_clips=field(4096, "generated clips in the training split"),
        workers=field(0, "decoding processes; 0 decodes in threads of the main process"),
        threads=field(2, "decoding threads per process"),
        text=field(
            "words",
            "captions: bytes (for a trained encoder), words (frozen vectors) or stored (of T5)",
        ),
        text_tokens=field(0, "bytes, words or tokens of a caption that are read; 0 = no text"),
        text_width=field(64, "width of the embeddings of words, or of stored ones"),
        text_path=field("", "stored: the set of jaxvid.tokenize --text"),
        text_digest=field("", "stored: digest that the encoder must have; '' = any"),
    )
    config.optim = dict(
        name=field("muon", "adamw, or muon: Muon for the matrices of layers, AdamW for the rest"),
        lr=field(2e-3, "peak learning rate"),
        muon_lr=field(2e-2, "peak learning rate of the matrices that Muon updates"),
        warmup=field(100, "steps of linear warm-up from 0 to the peak"),
        schedule=field("cosine", "after warm-up: constant, or cosine decay to 0"),
        b1=field(0.9, "AdamW beta1"),
        b2=field(0.99, "AdamW beta2"),
        weight_decay=field(0.0, "decoupled weight decay of matrices (muon: only of Muon's)"),
        clip=field(1.0, "maximum global norm of the gradient; 0 = no clipping"),
        ema=field(0.999, "decay of the averaged weights, which evaluate and sample use"),
        accumulate=field(1, "gradient accumulation: parts of a batch, computed in turn"),
        skip_nonfinite=field(3, "NaN steps in a row that are skipped before the run stops"),
    )
    config.mesh = dict(
        data=field(-1, "devices with a copy of the parameters and their own clips; -1 = the rest"),
        fsdp=field(1, "devices that split both parameters and clips; -1 = the rest"),
        tensor=field(1, "devices that split heads and hidden units; -1 = the rest"),
        seq=field(1, "devices that split the frames of a clip; must divide them"),
    )
    config.checkpoint = dict(
        every=field(500, "steps between checkpoints"),
        keep=field(2, "newest checkpoints to keep"),
        best=field("", "also keep the best checkpoint by this metric of evaluate; '' = none"),
    )
    config.log = dict(
        every=field(50, "steps between lines on the console and in metrics.jsonl"),
        parameters=field(
            2, "parts of a path that name a module in the table of parameters; 0 = every array"
        ),
        tensorboard=field(True, "also write TensorBoard event files"),
    )
    config.evaluate = dict(
        every=field(500, "steps between evaluations; 0 = only at the end"),
        batches=field(2, "validation batches per evaluation"),
    )
    config.sample = dict(
        every=field(0, "steps between sampled clips; 0 = only at the end"),
        num=field(8, "clips sampled each time"),
    )
    config.init_from = field("", "work folder of a run to start from; '' = random weights")
    config.compile_cache = field("", "folder of compiled programs; '' = <workdir>/../jax_cache")
    return config

"""Multi-query associative recall: how many pairs a temporal mixer keeps apart in its state.

    python -m jaxvid.train --config=configs/mqar.py:mixer=gla

trains a model of two layers, small enough for two CPU cores, and ends with the share of right
answers for streams of each number of pairs. task.model.width over task.model.heads sets the size of
a state, which evaluation reports.

Options: mixer=softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing.
"""

from ml_collections import ConfigDict, FieldReference

from configs import common


def get_config(options=""):
    """The experiment, as the options after the config's colon choose it."""
    chosen = common.parse(options, mixer=common.MIXERS)
    config = common.get_config()
    config.steps = 3000
    config.data.name = "mqar"  # source: mqar alone has symbols
    config.data.frames = frames = FieldReference(64)
    config.data.size = 2  # pixels along each side of a frame, which has one colour
    config.data.batch_size = 32
    config.data.num_clips = 100_000  # streams in the training split
    config.data.vocabulary = vocabulary = FieldReference(64)  # symbols: blank, keys and values
    config.data.pairs = pairs = FieldReference((4, 8, 16))  # how many pairs streams have
    config.optim.name = "adamw"
    config.optim.lr = 5e-3
    config.optim.weight_decay = 0.1
    config.evaluate.batches = 16
    config.task = ConfigDict(
        dict(
            name="mqar",  # module of jaxvid.tasks
            vocabulary=vocabulary,  # symbols (follows data.vocabulary)
            pairs=pairs,  # how many pairs streams have (follows data.pairs)
        )
    )
    config.task.model = ConfigDict(
        dict(
            width=16,  # channels of a symbol
            depth=2,  # layers of convolution and mixer
            heads=1,  # heads of a mixer; must divide the width
            dtype="float32",  # of the computation
        )
    )
    common.add_mixer(config, chosen.mixer, frames)
    if chosen.mixer == "gla":
        config.task.model.mixer.feature = "silu"  # learns to recall sooner
    return config

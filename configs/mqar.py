"""Multi-query associative recall: how many pairs a temporal mixer can recall from its state.

    python -m jaxvid.train --config=configs/mqar.py:mixer=gla

The model has two layers and trains on two CPU cores. The run ends with the share of right answers
for streams of each number of pairs. Evaluation also reports the size of a state, which
task.model.width and task.model.heads decide.

Options: mixer=softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing.

Scores with 16 pairs, by mixer (BENCHMARKS.md): softmax and gated_delta 1.00, routing 0.93,
lightnet 0.70, linear 0.57.
"""

from configs import common
from configs.common import field


def get_config(options=""):
    """The experiment, with the options after the colon of the config."""
    chosen = common.parse(options, mixer=tuple(common.MIXERS))
    config = common.get_config()
    config.steps = 3000
    config.data.name = "mqar"
    config.data.frames = 64
    config.data.size = 2
    config.data.batch_size = 32
    config.data.num_clips = 100_000
    config.data.vocabulary = field(64, "symbols: the blank, keys and values")
    config.data.pairs = field((4, 8, 16), "numbers of pairs in a stream")
    config.optim.name = "adamw"
    config.optim.lr = 5e-3
    config.optim.weight_decay = 0.1
    config.evaluate.batches = 16
    config.task = dict(
        name=field("mqar", "module of jaxvid.tasks"),
        vocabulary=config.data.get_ref("vocabulary"),
        pairs=config.data.get_ref("pairs"),
        model=dict(
            width=field(16, "channels of a symbol"),
            depth=field(2, "layers of convolution and mixer"),
            heads=field(1, "heads of the mixer; must divide the width"),
            dtype=field("float32", "computation: float32 or bfloat16"),
            mixer=common.mixer(chosen.mixer, config.data.get_ref("frames")),
        ),
    )
    if chosen.mixer == "gla":
        config.task.model.mixer.feature = "silu"  # learns to recall sooner
    return config

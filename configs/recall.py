"""Memory of video: something leaves the picture, and must come back as it was.

    python -m jaxvid.train --config=configs/recall.py:mixer=gated_delta
    python -m jaxvid.evaluate --workdir=runs/recall_mixer_gated_delta --gaps=2,4,8,16,32,64

Options: data=sprites_recall|needle (a sprite that leaves and returns, or one marked card among
others that look the same), mixer=softmax|linear|lightning|gla|gated_delta|lightnet|aaren|routing.

The model trains on two CPU cores, teacher-forced, on gaps of 2 to 8 frames. Softmax sees 4 frames
in each of 2 layers, and each layer passes on what it sees, so a frame knows of the 6 before it.
Longer gaps must be lost. A state of constant size can keep what it has seen for any gap.
"""

from configs import ar_diffusion, common
from configs.common import field

# data -> frames, the lead, the longest gap and the answer, and pixels along a side
SIZES = {"sprites_recall": (18, 24), "needle": (12, 16)}


def get_config(options=""):
    """The experiment, with the options after the colon of the config."""
    chosen = common.parse(options, data=tuple(SIZES), mixer=tuple(common.MIXERS))
    config = ar_diffusion.get_config(f"layout=teacher_forced,mixer={chosen.mixer}")
    config.steps = 2000
    config.data.name = chosen.data
    config.data.frames, config.data.size = SIZES[chosen.data]
    config.data.gap = field((2, 8), "the least and the most frames without what is recalled")
    config.optim.ema = 0.99
    config.evaluate.every = 0
    config.task.train_frames = config.data.get_ref("frames")
    config.task.patch = 8
    config.task.model.update(width=96, depth=2, conv=1)
    if chosen.mixer == "softmax":
        config.task.model.mixer.window = 4
    return config

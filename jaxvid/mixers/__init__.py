"""The temporal mixers: layers that carry a video stream forward in time.

The contract: `y_BTND, state = mixer(x_BTND, state)`. Frames come in order; state None is the start
of a stream; a call with T = 0 frames returns the state in the form that later calls keep. However
a stream is cut, the outputs are the same, and none depends on a later frame (`tests/laws.py`
proves it for every row of the table). A mixer also has

    `y_BMD, state = mixer.prefill(context_BMD, tokens)`

which reads the context (text, class) that comes before the first frame of `tokens` tokens.

Every mixer is built as `Mixer(width=, heads=, grid=, qk_norm=, dtype=, name=)` with options of its
own beside these: what a window is, say, only attention knows.
"""

import dataclasses

from jaxvid.errors import UserError, within
from jaxvid.mixers.aaren import Aaren
from jaxvid.mixers.alibi import Alibi
from jaxvid.mixers.attention import MASKS, Attention
from jaxvid.mixers.gated_delta import GatedDelta
from jaxvid.mixers.lightnet import LightNet
from jaxvid.mixers.linear_attention import FEATURES, GLA, Lightning, LinearAttention, slopes
from jaxvid.mixers.routing import Routing

MIXERS = {
    "softmax": Attention,
    "alibi": Alibi,
    "linear": LinearAttention,
    "lightning": Lightning,
    "gla": GLA,
    "gated_delta": GatedDelta,
    "lightnet": LightNet,
    "aaren": Aaren,
    "routing": Routing,
}

# What the models say of every mixer, and a config of the model, not of its mixer.
_OF_MODELS = {"width", "heads", "grid", "qk_norm", "dtype", "parent"}

# Options of mixers: the least that a number may be, and the words to choose from.
FLOORS = {
    "window": 1,
    "sinks": 0,
    "conv": 1,
    "tpe": 0,
    "clusters": 1,
    "members": 1,
    "layer": 0,
    "layers": 1,
}
CHOICES = {"mask": MASKS, "feature": FEATURES}


def check(field, options, heads):
    """Raise UserError, one line, unless a model of `heads` heads can be built of these options.

    options: the mixer's `name` and options of its own. field: what they are called in a config,
    such as "task.model.mixer".
    """

    def choose(name, choices):
        value = options.get(name, choices[0])
        if value not in choices:
            raise UserError(f"{field}.{name}={value!r}: unknown; use one of {', '.join(choices)}")

    choose("name", list(MIXERS))
    mixer = options["name"]
    own = {option.name for option in dataclasses.fields(MIXERS[mixer])} - _OF_MODELS
    for name in options:
        if name not in own:
            raise UserError(
                f"{field}.{name}={options[name]}: {mixer} has no such option; choose a mixer "
                f"behind the colon of --config, as in mixer={mixer}"
            )
    for name, low in FLOORS.items():
        value = options.get(name)
        if value is not None and value < low:
            raise UserError(f"{field}.{name}={value}: must be at least {low}")
    for name, choices in CHOICES.items():
        choose(name, choices)
    if mixer == "lightning":
        layer, layers = options.get("layer", 0), options.get("layers", 1)
        if layer >= layers:
            raise UserError(f"{field}.layer={layer}: of layers={layers}; use 0 to {layers - 1}")
        with within(field, ["slopes"]):
            slopes(options.get("slopes", "lightning"), heads, layer, layers)

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

from jaxvid.mixers.aaren import Aaren
from jaxvid.mixers.alibi import Alibi
from jaxvid.mixers.attention import Attention
from jaxvid.mixers.gated_delta import GatedDelta
from jaxvid.mixers.lightnet import LightNet
from jaxvid.mixers.linear_attention import GLA, Lightning, LinearAttention
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

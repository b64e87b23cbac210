"""The temporal mixers: layers that carry a video stream forward in time.

The contract: `y_BTND, state = mixer(x_BTND, state)`. Frames come in order. The state None starts a
stream. A call with T = 0 frames returns the state in the form that later calls keep. The outputs do
not depend on how the stream is cut, and no output depends on a later frame; `tests/laws.py` proves
both for every row of `MIXERS`. A second method reads the context (text, class) that precedes the
first frame, each frame having `tokens` tokens:

    `y_BMD, state = mixer.prefill(context_BMD, tokens)`

A third trains with teacher forcing: every frame has a noisy copy, which reads the state after the
clean frames before it and writes nothing:

    `y_clean_BTND, y_noisy_BTND, state = mixer.teacher_forced(clean_BTND, noisy_BTND, state)`

It equals the loop over frames f of `y_noisy[f], _ = mixer(noisy[f], state)` and then
`y_clean[f], state = mixer(clean[f], state)`, which is what sampling does: denoise, then commit.

A part of a state that counts frames has a method `skip(frames)`, which moves the count on, so that
later frames stand where they do although earlier ones left nothing to read (`skip`).

Facts that every mixer states:

    window            frames that a query sees, including its own; None = all of the past
    streams           False if the mixer sees later frames and so cannot continue a stream
    constant_state    False if the state grows with the stream

Every mixer has the fields `width, heads, grid, qk_norm, dtype, name`, which a model gives to all of
its mixers. Other fields are options of that mixer alone. A mixer checks its options when it is
built, and raises UserError.

The section of a model's config has the name and options of its mixer. With `every` = n > 0 each
n-th layer is softmax attention instead, with the options `attention`, as in many hybrids (Samba,
Ren et al. 2024; SANA-Video has softmax in every fourth layer). `kinds` reads the section, and
`Stack` states the facts of all layers together.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax

from jaxvid import schema
from jaxvid.checks import at_least, choose, require
from jaxvid.errors import within
from jaxvid.mixers.aaren import Aaren
from jaxvid.mixers.alibi import Alibi
from jaxvid.mixers.attention import Attention
from jaxvid.mixers.gated_delta import GatedDelta
from jaxvid.mixers.lightnet import LightNet
from jaxvid.mixers.linear_attention import GLA, Lightning, LinearAttention
from jaxvid.mixers.miras import LaCT, Memora, Moneta, Yaad
from jaxvid.mixers.recurrent import Recurrent
from jaxvid.mixers.routing import Routing
from jaxvid.mixers.titans import MemoryAsContext, MemoryAsGate, MemoryAsLayer, NeuralMemory

MIXERS: dict[str, type[nn.Module]] = {
    "softmax": Attention,
    "alibi": Alibi,
    "linear": LinearAttention,
    "lightning": Lightning,
    "gla": GLA,
    "gated_delta": GatedDelta,
    "lightnet": LightNet,
    "aaren": Aaren,
    "routing": Routing,
    "titans_lmm": NeuralMemory,
    "titans_mac": MemoryAsContext,
    "titans_mag": MemoryAsGate,
    "titans_mal": MemoryAsLayer,
    "moneta": Moneta,
    "yaad": Yaad,
    "memora": Memora,
    "lact": LaCT,
}
MAX_DEPTH = 256  # layers, each of which is traced where they are not scanned
MAX_WIDTH = 2**20  # channels
MAX_RATIO = 1024  # hidden units of an MLP, in widths
_SHARED = ("width", "heads", "grid", "qk_norm", "dtype", "name", "parent")


def make_mixer(options: Mapping[str, Any], **shared) -> nn.Module:
    """The mixer of options["name"], built of its other options and of the fields of a model.

    Raises UserError for an unknown name, an option that the mixer does not have, and a value out of
    bounds. The fields are named as in `options`.
    """
    own = dict(options)
    name = own.pop("name", "")
    choose("name", name, MIXERS)
    known = {field.name for field in dataclasses.fields(MIXERS[name])}.difference(_SHARED)
    for option, value in own.items():
        remedy = "choose a mixer behind the colon of --config, as in mixer"
        require(option in known, option, value, f"{name} has no such option; {remedy}={name}")
    return schema.build(MIXERS[name], own, **shared)


def kinds(section: Mapping[str, Any]) -> tuple[dict, ...]:
    """The options of `make_mixer` of successive layers, after which they repeat.

    section: those of one mixer, `every` and `attention` (see the top of this module). Raises
    UserError for values of the latter two that cannot be.
    """
    own = dict(section)
    every, attention = own.pop("every", 0), own.pop("attention", {})
    schema.check("every", every, int)
    attention = schema.section("attention", attention)
    require("name" not in attention, "attention.name", attention.get("name"), "leave it out")
    if not every:
        return (own,)
    at_least("every", every, 2, at_most=MAX_DEPTH)
    remedy = "this mixer is attention in every layer; use 0"
    require(own.get("name") not in ("softmax", "alibi"), "every", every, remedy)
    return (own,) * (every - 1) + ({"name": "softmax", **attention},)


def through_window(section: Mapping[str, Any], window: int | None, sinks=None) -> dict:
    """The section with another window, and other sinks, wherever it has a window.

    Cyclic positions keep their cycle.
    """
    changed = dict(section)
    if changed.get("every"):
        attention = {"name": "softmax", "window": None, **changed.get("attention", {})}
        attention = through_window(attention, window, sinks)
        del attention["name"]
        changed["attention"] = attention
    elif changed.get("positions") == "cyclic":
        changed["cycle"] = make_mixer(section, width=2, heads=1, parent=None).period
    if "window" in changed:
        changed["window"] = window
        changed |= {} if sinks is None else {"sinks": sinks}
    return changed


class Stack:
    """The facts of the layers of a network together; they are named as those of a mixer.

    window: the least of any layer, None if all see all of the past. sinks: the most of any layer.
    anchored_sinks: frames that every layer sees wherever it stands, just before its window.
    sums_up: whether a layer has a sum of the past, out of which frames cannot be taken. Arguments
    and errors are those of `kinds` and `make_mixer`.
    """

    def __init__(self, section: Mapping[str, Any], **shared):
        mixers = [make_mixer(own, **shared, parent=None) for own in kinds(section)[-2:]]
        windows = [mixer.window for mixer in mixers if mixer.window is not None]
        self.window = min(windows, default=None)
        self.sinks = max(getattr(mixer, "sinks", 0) for mixer in mixers)
        self.streams = all(mixer.streams for mixer in mixers)
        self.constant_state = all(mixer.constant_state for mixer in mixers)
        self.sums_up = any(isinstance(mixer, Recurrent) for mixer in mixers)
        anchored = [getattr(mixer, "positions", "") == "anchored" for mixer in mixers]
        self.anchored_sinks = min(mixer.sinks for mixer in mixers) if all(anchored) else 0


def skip(state, frames):
    """A state of any layers, moved on by `frames` that it does not read; int or int32."""

    def counts(part):
        return hasattr(part, "skip")

    return jax.tree.map(lambda x: x.skip(frames) if counts(x) else x, state, is_leaf=counts)


def check_options(section: Mapping[str, Any], heads: int) -> None:
    """Raise UserError unless a model with `heads` heads can use this section."""
    shared = dict(width=2 * heads, heads=heads, parent=None)
    own, *_ = kinds(section)
    make_mixer(own, **shared)
    with within("attention"):
        make_mixer({"name": "softmax", **section.get("attention", {})}, **shared)


def check_depth(field: str, depth: int, every: int = 0) -> None:
    """Raise UserError for a number of layers that no model with such an `every` has; 0 = none."""
    at_least(field, depth, 1, at_most=MAX_DEPTH)
    if every:
        require(depth % every == 0, field, depth, f"must be a multiple of mixer.every={every}")


def check_heads(width: int, heads: int) -> None:
    """Raise UserError unless `heads` divides a `width` that a model can have into even widths.

    Rotary positions turn channels in pairs.
    """
    at_least("width", width, 1, at_most=MAX_WIDTH)
    at_least("heads", heads, 1)
    require(
        width % heads == 0 and width // heads % 2 == 0,
        "heads",
        heads,
        f"does not divide width={width} into even heads; use a divisor of {width // 2}",
    )

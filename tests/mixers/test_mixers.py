"""Every mixer of the table obeys the laws of a stream; its options, start values and own facts."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from jaxvid.errors import UserError
from jaxvid.kernels.attention import attention
from jaxvid.layers import masks
from jaxvid.layers.embed import rotary_angles, rotate
from jaxvid.mixers import (
    MIXERS,
    cache,
    check_heads,
    check_options,
    make_mixer,
    skip,
)
from jaxvid.mixers.linear_attention import decay_slopes
from jaxvid.mixers.recurrent import Recurrent
from jaxvid.mixers.titans import NeuralMemory
from tests import laws

GRID = (2, 3)


# Every mixer goes through the laws with its default options and with those that it has here.
VARIANTS = {
    "softmax": [
        {"window": 3, "sinks": 2},
        {"window": 3, "sinks": 1, "positions": "anchored"},
        {"window": 3, "sinks": 1, "positions": "cyclic"},
        {"window": 1, "qk_norm": False},
    ],
    "alibi": [{"window": 3, "sinks": 2}],
    "lightnet": [{"lrpe": False, "tpe": 0}],
    "routing": [{"clusters": 2, "members": 5}],
    "titans_lmm": [{"chunk": 3, "depth": 1}],
    "titans_mag": [{"chunk": 3, "local": 2}, {"chunk": 2, "local": 3, "write": "evicted"}],
    "titans_mal": [{"local": 3, "write": "evicted"}],
}
ROWS = [(name, {}) for name in MIXERS]
ROWS += [(name, options) for name, variants in VARIANTS.items() for options in variants]
# Mixers with a form of teacher forcing of their own.
BY_LOOP = Recurrent.teacher_forced
AT_ONCE = [name for name, kind in MIXERS.items() if kind.teacher_forced is not BY_LOOP]
# Frames back that an output certainly depends on, where that is not the window.
REACH = {"routing": 1}  # content decides which past tokens are read


def build(name, grid=GRID, qk_norm=True, **options):
    """(mixer, params, x_BTND)."""
    shared = dict(width=16, heads=2, grid=grid, qk_norm=qk_norm)
    mixer = make_mixer({"name": name, **options}, **shared)
    rngs = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(rngs[0], (2, laws.FRAMES, grid[0] * grid[1], 16))
    return mixer, jax.jit(mixer.init)(rngs[1], x[:, :1]), x


def started(mixer, params, x):
    """The state of a stream of frames like x that has read a context."""
    context_BMD = jax.random.normal(jax.random.key(1), (2, 3, 16))
    return mixer.apply(params, context_BMD, x.shape[2], method="prefill")[1]


def in_context(name, **options):
    """(mixer, the mixer as a layer of parameters that starts with a context, x_BTND)."""
    mixer, params, x = build(name, **options)

    def apply(params, x, state):
        return mixer.apply(params, x, started(mixer, params, x) if state is None else state)

    return mixer, Partial(apply, params), x


def row(name, *rest):
    return pytest.param(name, *rest, marks=laws.SLOW.get(name, ()))


@pytest.mark.parametrize("name, options", [row(*each) for each in ROWS])
def test_obeys_the_laws(name, options):
    """Over the tokens of whole frames, in a stream that starts with a context; its facts hold."""
    mixer, layer, x = in_context(name, **options)
    first = jax.eval_shape(layer, x[:, :1], None)[1]
    later = jax.eval_shape(layer, x[:, 1:], first)[1]
    assert mixer.streams and mixer.constant_state == (first == later)
    laws.streaming(layer, x)
    laws.causality(layer, x, reach=REACH.get(name, mixer.window or laws.FRAMES))
    laws.gradients(layer, x)


@pytest.mark.parametrize(
    "name, options, grid",
    [row(*each, GRID) for each in ROWS if each[0] in AT_ONCE or each[1] == {}]
    + [row(name, {}, (1, 1)) for name in AT_ONCE],
)
def test_teacher_forcing_is_denoising_and_committing_frame_by_frame(name, options, grid):
    """With many tokens a frame, as in the joint arrangement, and with one, as in the factorised.

    The mixers that are not in AT_ONCE do so by this very loop.
    """
    mixer, layer, x = in_context(name, grid=grid, **options)

    def forced(params, clean, noisy, state):
        state = started(mixer, params, clean) if state is None else state
        return mixer.apply(params, clean, noisy, state, method="teacher_forced")

    reach = REACH.get(name, mixer.window or laws.FRAMES)
    # Gradients through the updates of a memory enlarge another processor's rounding.
    rounding = 3.0 if name in laws.SLOW else 1.0
    forced = Partial(forced, *layer.args)
    laws.teacher_forcing(layer, forced, x[:, :5], x[:, 5:10], reach, rounding=rounding)


@pytest.mark.parametrize("name", AT_ONCE)
def test_teacher_forcing_solves_no_systems_by_lapack(name):
    """On two cores, two such calls at once each wait for a thread that the other one holds."""
    mixer, params, x = build(name)

    def total(params):
        y = mixer.apply(params, x[:, :5], x[:, 5:10], None, method="teacher_forced")
        return sum(part.sum() for part in y[:2])

    assert "triangular_solve" not in str(jax.make_jaxpr(jax.grad(total))(params))


@pytest.mark.parametrize(
    "name, options", [each for each in ROWS if each[0] in ("softmax", "alibi", "lightnet")]
)
def test_frames_that_are_skipped_leave_nothing_but_their_positions(name, options):
    """It is as if all that was read of them had been erased."""
    mixer, params, x = build(name, **options)
    apply = jax.jit(mixer.apply)
    _, state = apply(params, x[:, :0], started(mixer, params, x))
    y, read = apply(params, x[:, :4], state)
    if isinstance(state, cache.KVCache):
        erased = read._replace(frame_S=jnp.full_like(read.frame_S, masks.EMPTY))
    else:
        erased = state._replace(frames=read.frames)
    skipped, _ = skip(skip((state, x), 1), 3)
    y_skipped, _ = apply(params, x[:, :4], skipped)
    np.testing.assert_allclose(y_skipped, apply(params, x[:, :4], erased)[0], atol=1e-5)
    if name == "softmax":  # the context lies further back
        assert np.abs(y_skipped - y).max() > 1e-3


def test_a_matrix_state_is_one_float32_array():
    for name, V in (("linear", 9), ("lightning", 8), ("gla", 8)):
        mixer, params, x = build(name)
        state = jax.eval_shape(mixer.clone(dtype=jnp.bfloat16).apply, params, x)[1]
        assert (state.shape, state.dtype) == ((2, 2, 8, V), jnp.float32)


def test_convolutions_of_gated_delta_do_not_read_the_context():
    mixer, params, x = build("gated_delta")
    _, (_, pasts) = jax.jit(functools.partial(mixer.apply, tokens=6, method="prefill"))(
        params, x[:, 0]
    )
    assert [past.shape for past in pasts] == [(2, 3, 6, 16)] * 3 and not np.any(pasts)


def leaky(x, state):
    """Two layers of the released AR-Diffusion: its context tokens see all frames."""
    del state
    B, T, N, D = x.shape
    h_BLAK = jnp.concatenate([jnp.ones((B, 2, 1, D)), x.reshape(B, T * N, 1, D)], axis=1)
    position_L = np.array([masks.CONTEXT] * 2 + [frame for frame in range(T) for _ in range(N)])
    options = dict(q_position_L=position_L, k_position_M=position_L)
    options["allow"] = lambda q, k: (q == masks.CONTEXT) | (k <= q)
    for _ in range(2):
        h_BLAK = h_BLAK + attention(h_BLAK, h_BLAK, h_BLAK, **options)
    return h_BLAK[:, 2:].reshape(x.shape), None


def test_the_law_of_causality_catches_masks_that_see_the_future():
    mixer, params, x = build("softmax", mask="full")
    assert not mixer.streams
    for layer in (leaky, Partial(mixer.apply, params)):
        with pytest.raises(AssertionError, match="leaks back"):
            laws.causality(layer, x, gradients=False)
    _, state = jax.eval_shape(mixer.apply, params, x)
    with pytest.raises(UserError, match="mask='full': cannot continue a stream"):
        jax.eval_shape(mixer.apply, params, x, state)


@pytest.mark.parametrize("window, sinks", [(5, 0), (4, 2), (2, 1), (None, 0)])
def test_the_cache_holds_what_the_mask_allows(window, sinks):
    frames = 11
    k = jnp.arange(frames, dtype=jnp.float32).reshape(1, frames, 1, 1, 1)
    no_context = jnp.zeros((1, 0, 1, 1))
    state = cache.start(no_context, no_context, 1)
    allow = masks.causal(window, sinks)
    for first in range(frames):
        state = cache.append(
            state, k[:, first : first + 1], k[:, first : first + 1], window=window, sinks=sinks
        )
        held = {int(f): float(v) for f, v in zip(state.frame_S, state.k_BSNAK[0, :, 0, 0, 0])}
        held.pop(int(masks.EMPTY), None)
        assert all(value == frame for frame, value in held.items())
        needed = {past for past in range(first + 1) if allow(np.int32(first + 1), np.int32(past))}
        assert needed <= set(held)
        assert window is None or state.frame_S.shape == (sinks + window - 1,)
    assert int(state.length) == frames


def test_anchored_sinks_stand_just_before_the_window():
    """Against scores of keys that are rotated anew for every query; distances stay bounded."""
    window, sinks, frames = 3, 2, laws.FRAMES
    mixer, params, x = build("softmax", window=window, sinks=sinks, positions="anchored")
    context_BMD = jax.random.normal(jax.random.key(1), (2, 3, 16))
    state = jax.jit(functools.partial(mixer.apply, tokens=6, method="prefill"))(
        params, context_BMD
    )[1]
    y = jax.jit(mixer.apply)(params, x, state)[0]
    bound = mixer.bind(params)
    q, k, v = bound.project(x)
    context_k, context_v = state.context_k_BMAK, state.context_v_BMAK

    def turned(x_BNAK, frame):
        angle_TNK = rotary_angles(np.array([frame], np.int32), GRID, 8)
        return rotate(x_BNAK[:, None], angle_TNK)[:, 0]

    for f in (0, 3, window + sinks - 1, window + sinks, frames - 1):
        behind = max(0, f - (window + sinks - 1))  # by how much the sinks and context have moved
        recent = [g for g in range(max(0, f - window + 1), f + 1) if g >= sinks]
        places = [(g, g + behind) for g in range(min(sinks, f + 1))] + [(g, g) for g in recent]
        assert all(f - place < window + sinks for _, place in places)
        # A rotation of the query by f - behind is one of the context by behind, which has place 0.
        scores = [jnp.einsum("BNAK,BMAK->BANM", turned(q[:, f], f - behind), context_k)]
        scores += [
            jnp.einsum("BNAK,BMAK->BANM", turned(q[:, f], f), turned(k[:, g], place))
            for g, place in places
        ]
        values = jnp.concatenate([context_v, *(v[:, g] for g, _ in places)], axis=1)
        p = jax.nn.softmax(jnp.concatenate(scores, axis=-1) * 8**-0.5)
        expected = bound.out(jnp.einsum("BANM,BMAK->BNAK", p, values).reshape(2, 6, 16))
        np.testing.assert_allclose(y[:, f], expected, atol=1e-5)


@pytest.mark.parametrize("cycle", [None, 4])
def test_cyclic_scores_depend_on_the_distance_modulo_the_cycle(cycle):
    """Against float64 with complex numbers turned by the distance; sinks pass the cycle twice."""
    options = dict(window=3, sinks=2, positions="cyclic", cycle=cycle)
    mixer, params, x = build("softmax", grid=(1, 1), **options)
    state = started(mixer, params, x)
    y, bound = jax.jit(mixer.apply)(params, x, state)[0], mixer.bind(params)
    q, k, v = (np.float64(part)[:, :, 0] for part in bound.project(x))
    context_k, context_v = np.float64(state.context_k_BMAK), np.float64(state.context_v_BMAK)
    repeats, turns_K = (5, [1, 2, 0, 0]) if cycle is None else (4, [1, 2, 0, 0])

    def score(q_BAK, k_BAK, distance):
        q, k = (part[..., :4] + 1j * part[..., 4:] for part in (q_BAK, k_BAK))
        turned = np.exp(2j * np.pi * np.array(turns_K) * (distance % repeats) / repeats)
        return (q * k.conj() * turned).sum(-1).real * 8**-0.5

    for f in range(laws.FRAMES):
        seen = [g for g in range(f + 1) if g < 2 or f - g < 3]
        scores = [score(q[:, f], context_k[:, m], f) for m in range(3)]
        scores += [score(q[:, f], k[:, g], f - g) for g in seen]
        p = np.exp(scores) / np.exp(scores).sum(0)
        values = [*np.moveaxis(context_v, 1, 0), *(v[:, g] for g in seen)]
        read = np.einsum("MBA,MBAK->BAK", p, values).reshape(2, 1, 16)
        np.testing.assert_allclose(y[:, f], bound.out(read), atol=1e-5)


def test_a_cyclic_stream_is_the_same_after_whole_cycles():
    """Bit for bit, up to the last frames that an int32 counts, with a context but no sinks."""
    mixer, params, x = build("softmax", window=3, sinks=2, positions="cyclic")
    apply = jax.jit(mixer.apply)
    _, state = apply(params, x[:, :0], started(mixer, params, x))
    late = (2**31 - 1 - laws.FRAMES) // mixer.period * mixer.period
    early, later = (apply(params, x, skip(state, first))[0] for first in (mixer.period, late))
    np.testing.assert_array_equal(early, later)
    other = apply(params, x, skip(state, late + 1))[0]
    assert np.abs(other - later).max() > 1e-3  # the context lies elsewhere


def test_aaren_is_softmax_attention_of_a_given_query():
    """Scores so far apart that sums of their exponentials would overflow, and equal ones."""
    mixer, params, x = build("aaren", qk_norm=False)
    params["params"]["query"] *= 1000.0
    y, _ = jax.jit(mixer.apply)(params, x)
    w = params["params"]
    k, v = (np.float64(x @ w[n]["kernel"] + w[n]["bias"]).reshape(2, -1, 2, 8) for n in "kv")
    score = np.einsum("AK,BMAK->BMA", np.float64(w["query"]), k) * 8**-0.5
    assert np.abs(score).max() > 1000
    for t in (0, 5, laws.FRAMES - 1):
        seen = slice(0, 6 * (t + 1))
        p = np.exp(score[:, seen] - score[:, seen].max(1, keepdims=True))
        mean = np.einsum("BMA,BMAK->BAK", p / p.sum(1, keepdims=True), v[:, seen])
        expected = mean.reshape(2, 16) @ w["out"]["kernel"] + w["out"]["bias"]
        for n in range(6):
            np.testing.assert_allclose(y[:, t, n], expected, atol=2e-4)


def test_linear_attention_is_a_mean_weighted_by_the_kernel():
    """With queries and keys of zero, elu + 1 is one: the mean of all tokens so far."""
    mixer, params, x = build("linear", qk_norm=False)
    zero = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * (path[1].key not in "qk"), params
    )
    out, value = params["params"]["out"], params["params"]["v"]
    v = x @ value["kernel"] + value["bias"]
    tokens = 6 * np.arange(1, laws.FRAMES + 1)[:, None]
    mean = v.sum(2).cumsum(1) / tokens
    expected = (mean @ out["kernel"] + out["bias"])[:, :, None]
    y, _ = jax.jit(mixer.apply)(zero, x)
    np.testing.assert_allclose(y, jnp.broadcast_to(expected, y.shape), atol=1e-5)


@pytest.mark.parametrize(
    "name, gate, start",
    [
        ("lightning", nn.sigmoid, 0.5),
        ("gla", nn.silu, 1),
        ("gated_delta", nn.silu, 1),
        ("lightnet", nn.silu, 1),
        ("titans_lmm", nn.silu, 1),
    ],
)
def test_output_gates_start_near_a_constant_and_learn(name, gate, start):
    mixer, params, x = build(name, grid=(1, 1))

    def loss(params):
        def is_gate(module, _):
            return module.name == "gate"

        (y_BTND, _), seen = mixer.apply(params, x, capture_intermediates=is_gate)
        return jnp.square(y_BTND).sum(), seen["intermediates"]["gate"]["__call__"][0]

    grads, logit_BTND = jax.jit(jax.grad(loss, has_aux=True))(params)
    np.testing.assert_allclose(gate(logit_BTND), start, atol=0.1)
    assert jnp.abs(grads["params"]["gate"]["kernel"]).min() > 0


@pytest.mark.parametrize("heads", [1, 2, 512])
def test_gated_delta_starts_with_heads_that_forget_at_all_rates(heads):
    """From 1.6 per frame down to 0.001 for the last head; inputs vary it with variance 1/3."""
    width = max(2 * heads, 256)
    x_BTND = jax.random.normal(jax.random.key(0), (64, 1, 1, width))
    mixer = MIXERS["gated_delta"](width=width, heads=heads)
    w = jax.jit(mixer.init)(jax.random.key(1), x_BTND)["params"]
    step_A = np.exp(w["log_rate"]) * np.asarray(nn.softplus(w["step_bias"]))
    wanted_A = 1.6 * (0.001 / 1.6) ** ((np.arange(heads) + 1) / heads)
    np.testing.assert_allclose(step_A, wanted_A, rtol=1e-4)
    if heads > 2:  # statistics
        for name in ("step", "beta"):
            np.testing.assert_allclose((x_BTND @ w[name]["kernel"]).var(), 1 / 3, rtol=0.05)
        steps_BTNA = nn.softplus(x_BTND @ w["step"]["kernel"] + w["step_bias"])
        slow = step_A < 0.01  # softplus is close to exp
        ratio = (steps_BTNA / step_A)[..., slow].mean()
        np.testing.assert_allclose(ratio, np.exp(1 / 6), rtol=0.05)


def test_gla_starts_with_channels_that_forget_in_23_to_6500_frames():
    w = build("gla", grid=(1, 1))[1]["params"]
    g_AK = np.asarray(nn.log_sigmoid(w["decay_out"]["bias"])).reshape(2, 8) / 16
    np.testing.assert_allclose(-1 / g_AK[:, [0, -1]], [[23.08, 6463]] * 2, rtol=1e-3)
    assert (np.diff(g_AK, axis=1) > 0).all()


def test_published_slopes():
    powers = 2.0 ** -np.arange(1, 9)
    twelve = np.concatenate([powers, 2.0 ** -np.array([0.5, 1.5, 2.5, 3.5])])
    for slopes, layers, expected in (
        (("lightning", 8), {}, powers * (1 + 1e-5)),
        (("lightning", 8), {"layer": 7, "layers": 8}, powers * 1e-5),
        (("lightning", 12), {}, twelve * (1 + 1e-5)),
        (("fla", 4), {}, 2.0 * np.arange(4)),
        (("fla", 4), {"layer": 1, "layers": 4}, 1.5 * np.arange(4)),
        (("sglang", 8), {}, powers * (1 + 1e-5)),  # of a single layer: ALiBi's
        (("sglang", 8), {"layer": 1, "layers": 5}, powers * (1 + 1e-5)),
        (((0.5, 0.0), 2), {}, [0.5, 0]),
        (("0.5, 2", 2), {}, [0.5, 2]),
    ):
        np.testing.assert_allclose(decay_slopes(*slopes, **layers), expected, rtol=1e-7)


@pytest.mark.parametrize("grid", [(1, 1), GRID])
@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [1 / 16, 1 / 256]),
        ({"slopes": "fla", "layer": 1, "layers": 4}, [0, 3]),
        ({"slopes": "0.5, 2"}, [0.5, 2]),
    ],
)
def test_lightning_forgets_by_its_slopes(options, expected, grid):
    """A frame of zeros writes nothing, so the state only decays."""
    mixer, params, x = build("lightning", grid=grid, **options)
    apply = jax.jit(mixer.apply)
    _, before = apply(params, x[:, :1])
    _, after = apply(params, jnp.zeros_like(x[:, :1]), before)
    lost_A = -np.log(np.abs(after).sum((0, 2, 3)) / np.abs(before).sum((0, 2, 3)))
    np.testing.assert_allclose(lost_A, expected, rtol=1e-3, atol=1e-6)


REFUSED = [
    ("rnn", {}, r"name='rnn': unknown; use one of softmax, "),
    ("gla", {"tpe": 2}, r"tpe=2: gla has no such option; choose a mixer behind the colon"),
    ("gla", {"heads": 2}, r"heads=2: gla has no such option"),  # a field of the model
    ("softmax", {"window": 0}, r"window=0: must be at least 1"),
    ("softmax", {"window": -1}, r"window=-1: must be at least 1"),
    ("softmax", {"sinks": -1}, r"sinks=-1: must be at least 0"),
    ("softmax", {"positions": "round"}, r"positions='round': unknown; use one of absolute, "),
    ("softmax", {"positions": "cyclic"}, r"positions='cyclic': they repeat .*; set a window, or "),
    ("softmax", {"positions": "cyclic", "window": 3, "cycle": 2}, r"cycle=2: must be at least 3"),
    ("softmax", {"mask": "no"}, r"mask='no': unknown; use one of causal, full"),
    ("alibi", {"window": 0}, r"window=0: must be at least 1"),
    ("alibi", {"sinks": -1}, r"sinks=-1: must be at least 0"),
    ("gla", {"feature": "elu"}, r"feature='elu': unknown; use one of none, silu"),
    ("gated_delta", {"conv": 0}, r"conv=0: must be at least 1"),
    ("lightnet", {"tpe": -1}, r"tpe=-1: must be at least 0"),
    ("titans_lmm", {"conv": 0}, r"conv=0: must be at least 1"),
    ("titans_lmm", {"depth": 0}, r"depth=0: must be at least 1"),
    ("titans_lmm", {"expansion": 0}, r"expansion=0: must be at least 1"),
    ("titans_lmm", {"chunk": 0}, r"chunk=0: must be at least 1"),
    ("titans_mag", {"chunk": 0}, r"chunk=0: must be at least 1"),
    ("titans_mag", {"local": 0}, r"local=0: must be at least 1"),
    ("titans_mag", {"write": "never"}, r"write='never': unknown; use one of committed, evicted"),
    ("titans_mac", {"write": "evicted"}, r"write='evicted': titans_mac has no such option"),
    ("titans_lmm", {"delay": -1}, r"delay=-1: must be at least 0"),
    ("titans_mal", {"persistent": 0}, r"persistent=0: must be at least 1"),
    ("memora", {"chunk": 2}, r"chunk=2: must be 1 for memora"),
    ("lact", {"expansion": 0}, r"expansion=0: must be at least 1"),
    ("lact", {"local": 0}, r"local=0: must be at least 1"),
    ("titans_mac", {"local": 2}, r"local=2: titans_mac has no such option"),
    ("routing", {"clusters": 0}, r"clusters=0: must be at least 1"),
    ("routing", {"members": 0}, r"members=0: must be at least 1"),
    ("lightning", {"layers": 0}, r"layers=0: must be at least 1"),
    ("lightning", {"layer": 3, "layers": 3}, r"layer=3: must lie between 0 and 2"),
    ("lightning", {"layer": -1}, r"layer=-1: must lie between 0 and 0"),
    ("lightning", {"slopes": "alibi"}, r"slopes='alibi': unknown; use one of lightning, "),
    ("lightning", {"slopes": "0.5"}, r"slopes='0\.5': has 1 numbers; give 2, one per head"),
    ("lightning", {"slopes": (1.0, 2.0, 3.0)}, r"slopes=.*: has 3 numbers; give 2"),
    ("lightning", {"slopes": (1.0, -2.0)}, r"slopes=.*: a head would grow"),
    ("lightning", {"slopes": "nan,1"}, r"slopes=.*: a head would grow"),
]


def test_options_that_cannot_work_are_refused_in_one_line():
    for name, options, words in REFUSED:
        with pytest.raises(UserError, match=rf"^{words}") as error:
            check_options({"name": name, **options}, heads=2)
        assert "\n" not in str(error.value)
    for heads in (0, 3, 8):  # 8 heads of 8 have one channel each
        with pytest.raises(UserError, match=rf"^heads={heads}: "):
            check_heads(8, heads)


def test_evicted_frames_are_those_that_attention_does_not_see():
    """With a gate that ignores the memory MAG is window attention, exactly.

    After T frames the memory is what it would be after T - local frames if they were committed.
    """
    local = 3
    mixer, params, x = build("titans_mag", local=local, write="evicted")
    own = laws.disturbed(params)["params"]
    own["memory_norm"] = jax.tree.map(jnp.zeros_like, own["memory_norm"])

    @jax.jit
    def compute(own, x):
        bound = mixer.bind({"params": own})
        first_BMD = jnp.broadcast_to(bound.first, (2, *bound.first.shape))
        _, cache = bound.attention.prefill(first_BMD, 6)
        wanted = bound.attention_norm(bound.attention(x, cache)[0]) / 2  # a gate of sigmoid(0)
        y, ((memory, _, late), _) = mixer.apply({"params": own}, x)
        committed = NeuralMemory(16, 2, grid=GRID).apply({"params": own["memory"]}, x[:, :-local])
        return y, wanted, memory.weights, committed[1][0].weights, late

    y, wanted, evicted, committed, late = compute(own, x)
    np.testing.assert_array_equal(y, wanted)
    for got, weights in zip(evicted, committed):
        np.testing.assert_allclose(got, weights, atol=1e-6)
    assert {part.shape[1] for part in jax.tree.leaves(late)} == {local}


LEAST = {
    "gated_delta": {"conv": 1},
    "lightnet": {"tpe": 0},
    "routing": {"clusters": 1, "members": 1},
}


@pytest.mark.parametrize("name", LEAST)
def test_the_least_values_of_options_work(name):
    mixer, params, x = build(name, grid=(1, 2), **LEAST[name])
    layer = functools.partial(mixer.apply, params)
    laws.streaming(layer, x[:, :3], [[1, 1, 1]], gradients=False)

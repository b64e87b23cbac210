"""Neural memory: the loop against numpy, the dual form against the loop, and its special cases."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxvid.errors import UserError
from jaxvid.kernels.gated_delta import gated_delta
from jaxvid.kernels.linear_attention import linear_attention
from jaxvid.kernels.neural_memory import Memory, neural_memory, parts, recall, start

A, K = 2, 4  # heads and their width
WIDTHS = {"linear": (K, K), "mlp": (K, 6, K), "deep": (K, 6, 5, K)}


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def make(network="mlp", T=7, N=1, B=1, momentum=True, masked=False, objective="l2", seed=0):
    """(arrays of `neural_memory` by name, its weights), float64."""
    rng = np.random.default_rng(seed)
    shape = (B, T, N, A)
    layers = 3 if network == "swiglu" else len(WIDTHS[network]) - 1
    arrays = dict(
        q_BTNAK=rng.normal(size=(*shape, K)),
        k_BTNAK=rng.normal(size=(*shape, K)),
        v_BTNAV=rng.normal(size=(*shape, K)),
        step=rng.uniform(0, 0.2, (*shape, layers) if network == "swiglu" else shape),
        log_decay_BTA=-rng.exponential(0.2, (B, T, A)),
        norm_AV=rng.uniform(0.5, 1.5, (A, K)),
    )
    if momentum:
        arrays["log_momentum_BTA"] = -rng.exponential(0.5, (B, T, A))
    if objective in ("huber", "shift"):
        arrays["radius_BTNA"] = rng.uniform(1, 4, shape)
    if masked:
        arrays["write_mask_BTN"] = rng.uniform(size=(B, T, N)) < 0.6
    if network == "swiglu":
        pairs = [(K, 6), (K, 6), (6, K)]
    else:
        pairs = zip(WIDTHS[network], WIDTHS[network][1:])
    weights = tuple(rng.normal(size=(A, *pair)) * pair[0] ** -0.5 for pair in pairs)
    return jax.tree.map(jnp.asarray, arrays), jax.tree.map(jnp.asarray, weights)


def options(network, **own):
    return Memory(network="swiglu" if network == "swiglu" else "mlp", **own)


# The definition in numpy, with gradients by hand


def gelu(x):
    """(value, slope) of the tanh approximation."""
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    t = np.tanh(inner)
    return 0.5 * x * (1 + t), 0.5 * (1 + t) + 0.5 * x * (1 - t**2) * slope


def silu(x):
    s = 1 / (1 + np.exp(-x))
    return x * s, s + x * s * (1 - s)


def forward(memory, weights, norm, x):
    """(M(x), a function from the cotangent of M(x) to the gradients of the weights)."""
    if memory.network == "swiglu":
        gate, up = x @ weights[0], x @ weights[1]
        value, slope = silu(gate)
        hidden = value * up
        y = hidden @ weights[2]

        def back(d):
            d_hidden = d @ weights[2].T
            return [x.T @ (d_hidden * up * slope), x.T @ (d_hidden * value), hidden.T @ d]

    else:
        inputs, slopes = [x], []
        for w in weights[:-1]:
            value, slope = gelu(inputs[-1] @ w)
            inputs.append(value)
            slopes.append(slope)
        y = inputs[-1] @ weights[-1]

        def back(d):
            gradients = []
            for i in reversed(range(len(weights))):
                gradients.insert(0, inputs[i].T @ d)
                d = d @ weights[i].T * slopes[i - 1] if i else d
            return gradients

    if not memory.residual:
        return y, back
    centred = y - y.mean(-1, keepdims=True)
    deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + 1e-6)
    unit = centred / deviation

    def through_norm(d):
        g = d * norm
        means = g.mean(-1, keepdims=True), (g * unit).mean(-1, keepdims=True)
        return back((g - means[0] - unit * means[1]) / deviation)

    return x + norm * unit, through_norm


def signal(memory, r, v, radius):
    """The gradient of the objective with respect to the prediction (Miras, section 5)."""
    size = np.sqrt(np.square(r).sum(-1, keepdims=True) + 1e-6)
    absolute = np.sqrt(r**2 + 1e-6)
    radius = None if radius is None else radius[:, None]
    return {
        "l2": lambda: 2 * r,
        "dot": lambda: -v,
        "lp": lambda: memory.p * r / absolute * absolute ** (memory.p - 1),
        "huber": lambda: np.where(size <= radius, 2 * r, radius * r / np.sqrt(r**2 + 0.01)),
        "shift": lambda: r * (1 + radius / size),
    }[memory.objective]()


def loop(memory, arrays, weights):
    """y, and the accumulated after the last frame, frame by frame in numpy."""
    x = {name: np.asarray(array) for name, array in arrays.items()}
    B, T, N = x["q_BTNAK"].shape[:3]
    y = np.zeros(x["v_BTNAV"].shape)
    last = [np.zeros((B, *w.shape)) for w in weights]

    def divisor(w):
        if memory.retention != "lq":
            return 1
        return ((np.abs(w) ** memory.q).sum() + 1e-6) ** (1 - 2 / memory.q)

    def view(w):
        if memory.retention == "softmax":
            return memory.mass * np.exp(w) / np.exp(w).sum(0)
        return w / divisor(w)

    def orthogonal(w):
        w = w / np.sqrt(np.square(w).sum() + 1e-12)
        for _ in range(5):
            w = 3.4445 * w - 4.7750 * w @ w.T @ w + 2.0315 * w @ w.T @ w @ w.T @ w
        return w

    for b, a in np.ndindex(B, A):
        first = [np.asarray(w[a]) for w in weights]
        start, now, speed = first, first, [0 * w for w in first]
        for t in range(T):
            if memory.reset_every and t and t % memory.reset_every == 0:
                start, now, speed = first, first, [0 * w for w in first]
            anchor = [view(w) for w in start]
            q, k, v, step = (x[n][b, t, :, a] for n in ("q_BTNAK", "k_BTNAK", "v_BTNAV", "step"))
            step = np.broadcast_to(step.reshape(N, -1), (N, len(weights)))
            mask = np.ones(N, bool)
            if "write_mask_BTN" in x:
                mask = x["write_mask_BTN"][b, t]
            writers = max(mask.sum(), 1)
            step = step * memory.step_scale / (writers if memory.writes == "mean" else 1)
            k = k / np.sqrt(writers) if memory.writes == "keys" else k
            radius = x["radius_BTNA"][b, t, :, a] if "radius_BTNA" in x else None
            norm = x["norm_AV"][a]
            decay = 1.0
            if mask.any():
                prediction, back = forward(memory, anchor, norm, k)
                d = signal(memory, prediction - v, v, radius)
                added = [-back((step[:, i] * mask)[:, None] * d)[i] for i in range(len(anchor))]
                if "log_momentum_BTA" in x:
                    eta = np.exp(x["log_momentum_BTA"][b, t, a])
                    added = speed = [eta * s + new for s, new in zip(speed, added)]
                decay = np.exp(x["log_decay_BTA"][b, t, a])
                now = [decay * w + new for w, new in zip(now, added)]
            kept = now
            if memory.retention == "rows":
                kept = [
                    w * np.sqrt(np.square(w0).sum(0) / (np.square(w).sum(0) + 1e-12))
                    for w, w0 in zip(now, first)
                ]
            elif memory.retention == "muon":
                kept = [decay * w0 + orthogonal(w - decay * w0) for w, w0 in zip(now, start)]
            elif memory.retention == "softmax":
                kept = [w - np.log(np.exp(w).sum(0)) for w in now]
            reads = anchor
            if memory.read == "after":
                reads = [view(w) for w in kept]
            elif memory.read == "causal":
                reads = [w / divisor(w0) for w, w0 in zip(now, start)]
            y[b, t, :, a] = forward(memory, reads, norm, q)[0]
            if (t + 1) % memory.chunk == 0:
                start = now = kept
        for i, w in enumerate(now):
            last[i][b, a] = w
    return y, last


ROWS = [
    ("linear", dict(residual=False, chunk=3), {}),
    ("linear", dict(chunk=4), dict(momentum=False)),  # TTT-Linear in mini-batches of 4 tokens
    ("deep", dict(chunk=3, reset_every=3), dict(N=2, masked=True)),
    ("mlp", dict(objective="lp", retention="lq", chunk=1, read="after"), dict(momentum=False)),
    ("mlp", dict(objective="lp", retention="lq", chunk=3), dict(momentum=False, N=2)),
    (
        "mlp",
        dict(objective="huber", chunk=2, writes="mean"),
        dict(momentum=False, N=3, masked=True),
    ),
    ("mlp", dict(retention="softmax", chunk=1, read="after"), dict(momentum=False, masked=True)),
    ("mlp", dict(retention="softmax", chunk=3, read="before", mass=2.0), dict(masked=True)),
    ("linear", dict(objective="shift", chunk=3, writes="keys", step_scale=0.5), dict(N=2)),
    (
        "swiglu",  # LaCT
        dict(residual=False, objective="dot", retention="rows", chunk=1, read="before"),
        dict(N=3),
    ),
    ("swiglu", dict(retention="rows", chunk=2, remat=2), dict(N=2, masked=True)),
    ("swiglu", dict(objective="dot", retention="muon", chunk=1, read="after"), dict(N=3)),
    ("mlp", dict(chunk=1, read="after", remat=2), dict(N=1, masked=True)),
    ("linear", dict(chunk=7), {}),  # as long as the stream
]


@pytest.mark.parametrize("network, own, made", ROWS)
def test_the_loop_and_the_dual_form_equal_numpy(network, own, made):
    memory = options(network, **own)
    arrays, weights = make(network, objective=memory.objective, B=2, **made)
    run = functools.partial(neural_memory, memory=memory, weights=weights)
    wanted = loop(memory, arrays, weights)
    for implementation in ("reference", "chunked"):
        y, state = jax.jit(functools.partial(run, implementation=implementation))(**arrays)
        assert_equal((y, list(state.weights)), wanted, 1e-10)
    state = start(memory, weights, 2, momentum=False)
    unwritten = recall(arrays["q_BTNAK"], state, memory=memory, norm_AV=arrays["norm_AV"])
    assert np.abs(wanted[0] - unwritten).max() > 0.01


def assert_equal(got, wanted, tolerance):
    """Every array to a tolerance relative to its largest number."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(wanted)):
        name, scale = jax.tree_util.keystr(path), max(1.0, np.abs(y).max())
        np.testing.assert_allclose(x, y, atol=tolerance * scale, rtol=0, err_msg=name)


# The dual form


def outputs(memory, implementation, arrays, weights):
    y, state, surprise = neural_memory(
        **arrays,
        memory=memory,
        weights=weights,
        return_surprise=True,
        implementation=implementation,
    )
    return {"y": y, "state": state._replace(position=None), "surprise": surprise}


@functools.partial(jax.jit, static_argnames=("memory", "implementation"))
def value_and_grads(memory, implementation, arrays, weights):
    """The outputs, and the gradients of a random sum of them (but of no surprise)."""
    mask = {name: arrays[name] for name in arrays if name == "write_mask_BTN"}
    rest = {name: x for name, x in arrays.items() if name not in mask}

    def value(rest, weights):
        found = outputs(memory, implementation, rest | mask, weights)
        tested = jax.tree.leaves((found["y"], found["state"]))
        rngs = jax.random.split(jax.random.key(0), len(tested))
        weight = [jax.random.normal(rng, x.shape) for rng, x in zip(rngs, tested)]
        return sum((w * x).sum() for w, x in zip(weight, tested)), found

    (_, found), grads = jax.value_and_grad(value, (0, 1), has_aux=True)(rest, weights)
    return found, grads


GRADIENTS = (2, 4, 5, 9, 12)  # rows of the inner loop; between them every branch of the dual form


@pytest.mark.parametrize(
    "network, own, made",
    [
        pytest.param(*row, marks=[] if i in GRADIENTS else pytest.mark.slow)
        for i, row in enumerate(ROWS)
    ],
)
def test_the_dual_form_equals_the_loop_with_all_gradients(network, own, made):
    memory = options(network, **own)
    arrays, weights = make(network, objective=memory.objective, **made)
    wanted = value_and_grads(memory, "reference", arrays, weights)
    got = value_and_grads(memory, "chunked", arrays, weights)
    assert_equal(got[0], wanted[0], 1e-10)
    assert_equal(got[1], wanted[1], 1e-8)
    if not memory.residual:
        del wanted[1][0]["norm_AV"]
    for path, gradient in jax.tree_util.tree_leaves_with_path(wanted[1]):
        assert np.abs(gradient).max() > 0, jax.tree_util.keystr(path)


@pytest.mark.slow
@pytest.mark.parametrize("network", ["linear", "mlp", "swiglu"])
@pytest.mark.parametrize("retention", parts.RETENTIONS)
def test_the_dual_form_equals_the_loop_for_every_combination(network, retention):
    """Each objective reads in another way, with and without momentum in turn."""
    for i, objective in enumerate(parts.OBJECTIVES):
        reads = ("before", "after") if retention in ("softmax", "muon") else parts.READS
        read = reads[i % len(reads)]
        chunk = 1 if read == "after" or retention == "muon" else 3
        memory = options(network, objective=objective, retention=retention, read=read, chunk=chunk)
        made = dict(N=2, masked=True, momentum=i % 2 == 0, objective=objective)
        arrays, weights = make(network, **made)
        run = jax.jit(outputs, static_argnums=(0, 1))
        wanted, got = (run(memory, name, arrays, weights) for name in ("reference", "chunked"))
        # Newton-Schulz enlarges small singular values, and their rounding, by up to 3.4445^5 = 485.
        assert_equal(got, wanted, 1e-8 if retention == "muon" else 1e-10)


def in_pieces(memory, arrays, weights, cuts):
    """The joined outputs of calls that continue each other, compiled, and the last state."""
    per_frame = {n: x for n, x in arrays.items() if n != "norm_AV"}
    run = functools.partial(neural_memory, memory=memory, weights=weights)
    run = jax.jit(functools.partial(run, norm_AV=arrays["norm_AV"]))
    state, ys, first = None, [], 0
    for frames in cuts:
        piece = {name: x[:, first : first + frames] for name, x in per_frame.items()}
        y, state = run(**piece, state=state)
        ys.append(y)
        first += frames
    return jnp.concatenate(ys, axis=1), state


CHAINED = [
    ("mlp", dict(chunk=3), dict(N=2, masked=True)),
    ("linear", dict(objective="lp", retention="lq", chunk=3, reset_every=6), dict(momentum=False)),
    ("linear", dict(retention="softmax", chunk=2, read="before"), dict(momentum=False)),
    ("linear", dict(retention="muon", chunk=1, read="after"), dict(N=2)),
]


@pytest.mark.parametrize("network, own, made", CHAINED)
def test_chained_calls_and_single_frames_equal_one_call(network, own, made):
    memory = options(network, **own)
    arrays, weights = make(network, T=9, objective=memory.objective, **made)
    wanted, last = in_pieces(memory, arrays, weights, [9])
    for cuts in ([1] * 9, [2, 0, 5, 2]):  # token by token, as in decoding, and in pieces
        got, state = in_pieces(memory, arrays, weights, cuts)
        assert_equal((got, state), (wanted, last), 1e-10)


@pytest.mark.parametrize("read, sees", [("causal", 1), ("before", 0), ("after", 1)])
def test_no_frame_reads_a_later_one(read, sees):
    """With chunks of one frame; all tokens of the own frame are seen, or none."""
    memory = Memory(read=read, chunk=1)
    arrays, weights = make("mlp", T=4, N=2)

    @jax.jit
    def jacobian(arrays):
        def y(k_BTNAK):
            arrays["k_BTNAK"] = k_BTNAK
            return neural_memory(**arrays, memory=memory, weights=weights)[0].sum((0, 3, 4))

        return jnp.abs(jax.jacobian(y)(arrays["k_BTNAK"])).sum((2, 5, 6))

    depends_TNTN = np.asarray(jacobian(arrays)) > 0
    np.testing.assert_array_equal(depends_TNTN.all((1, 3)), np.tri(4, k=sees - 1, dtype=bool))
    np.testing.assert_array_equal(depends_TNTN.any((1, 3)), np.tri(4, k=sees - 1, dtype=bool))


@pytest.mark.parametrize("chunk, retention", [(3, "none"), (1, "muon"), (1, "rows")])
def test_masked_tokens_leave_the_state_as_it_is(chunk, retention):
    read = "after" if chunk == 1 else "causal"
    memory = options("linear", chunk=chunk, retention=retention, read=read)
    arrays, weights = make("linear", T=3, N=2)
    run = jax.jit(functools.partial(neural_memory, memory=memory, weights=weights))
    _, state = run(**arrays)
    arrays["write_mask_BTN"] = jnp.zeros((1, 3, 2), bool)
    y, after = run(**arrays, state=state)
    exact = retention != "rows"  # which divides by a norm that it has already made
    for old, new in zip(jax.tree.leaves(state[:3]), jax.tree.leaves(after[:3])):
        np.testing.assert_allclose(new, old, rtol=0, atol=0 if exact else 1e-12)
    wanted = recall(arrays["q_BTNAK"], state, memory=memory, norm_AV=arrays["norm_AV"])
    np.testing.assert_allclose(y, wanted, atol=1e-12)


def test_under_vmap_and_in_bfloat16():
    arrays, weights = make("linear", T=4, B=2)
    norm = arrays.pop("norm_AV")
    run = jax.jit(functools.partial(neural_memory, memory=Memory(chunk=3)))
    wanted, _ = run(**arrays, norm_AV=norm, weights=weights)
    one = jax.tree.map(lambda x: x[:, None], arrays)
    got, _ = jax.vmap(lambda one: run(**one, norm_AV=norm, weights=weights))(one)
    np.testing.assert_allclose(got[:, 0], wanted, atol=1e-10)
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), (arrays, norm, weights))
    y, state = run(**half[0], norm_AV=half[1], weights=half[2])
    assert y.dtype == jnp.bfloat16
    assert {x.dtype for x in jax.tree.leaves(state[:3])} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(y.astype(float), wanted, atol=0.1)


# Special cases


def linear_memory(arrays, weights, **own):
    """y [B, T, A, K] and the state of a linear memory of frames of one token."""
    arrays = {name: x for name, x in arrays.items() if name != "norm_AV"}
    run = functools.partial(neural_memory, memory=Memory(residual=False, **own))
    y, state = jax.jit(run)(**arrays, weights=weights)
    return y[:, :, 0], state.weights[0]


def by_kernel(op, arrays, weights, *more, **changes):
    """y [B, T, A, K] and the state of the reference of another operation, float32."""
    parts = [changes.get(n, arrays[n])[:, :, 0] for n in ("q_BTNAK", "k_BTNAK", "v_BTNAV")]
    state = jnp.asarray(weights[0][None], jnp.float32)
    options = dict(scale=1.0, initial_state=state, return_state=True, implementation="reference")
    return op(*parts, *more, arrays["log_decay_BTA"], **options)


def test_a_linear_memory_with_chunks_of_one_is_the_gated_delta_rule():
    """The gated delta rule decays first: a S + b k^T (v - k a S) = a S + a b k^T (v / a - k S)."""
    arrays, weights = make("linear", momentum=False)
    decay_BTA = jnp.exp(arrays["log_decay_BTA"])
    beta_BTA = arrays["step"][:, :, 0]
    mine = arrays | dict(
        v_BTNAV=arrays["v_BTNAV"] / decay_BTA[:, :, None, :, None],
        step=arrays["step"] * decay_BTA[:, :, None],
    )
    got = linear_memory(mine, weights, chunk=1, step_scale=0.5)  # the gradient of half the square
    assert_equal(got, by_kernel(gated_delta, arrays, weights, beta_BTA), 1e-5)
    arrays["log_decay_BTA"] *= 0  # the delta rule
    got = linear_memory(arrays, weights, chunk=1, step_scale=0.5)
    assert_equal(got, by_kernel(gated_delta, arrays, weights, beta_BTA), 1e-5)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_the_dot_product_is_linear_attention_for_every_chunk(chunk):
    arrays, weights = make("linear", momentum=False)
    got = linear_memory(arrays, weights, chunk=chunk, objective="dot")
    v_BTNAV = arrays["v_BTNAV"] * arrays["step"][..., None]
    assert_equal(got, by_kernel(linear_attention, arrays, weights, v_BTNAV=v_BTNAV), 1e-5)


def test_a_memory_recalls_what_it_was_told():
    """Values under orthogonal keys, read back after all of them; with no writes it answers 0."""
    rng = np.random.default_rng(0)
    k = jnp.asarray(np.linalg.qr(rng.normal(size=(8, 8)))[0]).reshape(1, 8, 1, 1, 8)
    v = jnp.asarray(rng.normal(size=(1, 8, 1, 1, 8)))
    memory = Memory(residual=False, chunk=4, step_scale=0.5)
    weights = (jnp.zeros((1, 8, 8)),)
    _, state = neural_memory(k, k, v, jnp.ones((1, 8, 1, 1)), memory=memory, weights=weights)
    np.testing.assert_allclose(recall(k, state, memory=memory), v, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
@pytest.mark.parametrize("network", ["linear", "mlp"])
def test_extreme_gates_stay_finite_over_16k_tokens(network, dtype):
    """Each gate at both ends, the others in between; keys are equal in one half, as in a still.

    The linear memory, whose step sizes are stable by theory, also in all gradients. Those of an MLP
    grow with every chunk wherever it forgets fast, because its norm divides by the size of weights
    that have decayed, so no rounding is to blame if they overflow.
    """
    T, linear = 2**14, network == "linear"
    scale = 1 / 2048 if linear else 1 / 128
    memory = Memory(chunk=64, step_scale=scale, remat=8, residual=not linear)
    rng = np.random.default_rng(0)
    with jax.enable_x64(False):
        shape = (1, T, 1, 1)
        q, k, v = rng.normal(size=(3, *shape, 16))
        k[:, T // 2 :] = k[:, :1]
        q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
        pairs = [(16, 16)] if linear else [(16, 64), (64, 16)]
        weights = [rng.normal(size=(1, *pair)) * pair[0] ** -0.5 for pair in pairs]
        weights = [jnp.asarray(w, jnp.float32) for w in weights]

        def loss(q, k, v, gates, weights):
            y, _ = neural_memory(q, k, v, **gates, memory=memory, weights=weights)
            return jnp.square(y.astype(jnp.float32)).mean(), y

        run = jax.jit(jax.grad(loss, range(5), has_aux=True) if linear else loss)
        half = dict(log_decay_BTA=-0.01, log_momentum_BTA=-0.1, step=0.1)
        ends = [("log_decay_BTA", x) for x in (-np.inf, 0.0)]
        ends += [("log_momentum_BTA", x) for x in (-np.inf, 0.0)] + [("step", 0.0), ("step", 1.0)]
        for name, end in ends:
            gates = {
                gate: np.full(shape if gate == "step" else shape[:3], value)
                for gate, value in (half | {name: end}).items()
            }
            tokens, gates = jax.tree.map(lambda x: jnp.asarray(x, dtype), ((q, k, v), gates))
            for x in jax.tree.leaves(run(*tokens, gates, weights)):
                assert np.isfinite(np.asarray(x, np.float32)).all(), (name, end)


# Refusals


@pytest.mark.parametrize(
    "own, message",
    [
        (dict(network="rnn"), "network='rnn': unknown; use one of mlp, swiglu"),
        (dict(objective="l1"), "objective='l1': unknown; use one of l2, dot, lp, huber, shift"),
        (dict(retention="l2"), "retention='l2': unknown; use one of none, lq, "),
        (dict(read="block"), "read='block': unknown; use one of causal, before, after"),
        (dict(writes="max"), "writes='max': unknown; use one of sum, mean, keys"),
        (dict(p=0.5), "p=0.5: must be at least 1"),
        (dict(q=0.5), "q=0.5: must be at least 1"),
        (dict(mass=0.0), "mass=0.0: must be more than 0"),
        (dict(step_scale=-1.0), "step_scale=-1.0: must be more than 0"),
        (dict(chunk=0), "chunk=0: must be a whole number from 1 to"),
        (dict(chunk=2.5), "chunk=2.5: must be a whole number"),
        (dict(remat=0), "remat=0: must be a whole number from 1 to"),
        (dict(read="after"), "chunk=64: must be 1 with read=after"),
        (dict(read="before", retention="muon"), "chunk=64: must be 1 with retention=muon"),
        (dict(retention="softmax"), "read='causal': is not possible with retention=softmax; use"),
        (dict(reset_every=100), "reset_every=100: must be a multiple of chunk=64"),
    ],
)
def test_options_that_cannot_work_are_refused_in_one_line(own, message):
    with pytest.raises(UserError, match=message) as error:
        Memory(**own)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "own, changes, message",
    [
        ({}, dict(k_BTNAK=np.ones((1, 7, 1, A, 5))), "q, k, v shapes="),
        ({}, dict(step=np.ones((1, 7, 1))), r"step.shape=\[1, 7, 1\]: must be \[1, 7, 1, 2\] or"),
        ({}, dict(log_decay_BTA=np.ones((1, 7))), r"log_decay.shape=\[1, 7\]: must be "),
        ({}, dict(log_momentum_BTA=np.ones((1, 7))), r"log_momentum.shape=\[1, 7\]: must be "),
        ({}, dict(write_mask_BTN=np.ones((1, 7), bool)), "write_mask.shape="),
        ({}, dict(norm_AV=np.ones(K)), r"norm.shape=\[4\]: must be \[2, 4\]"),
        ({}, dict(radius_BTNA=np.ones((1, 7, 1, A))), "objective='l2': has no radius; leave it"),
        (dict(objective="huber"), {}, "objective='huber': needs a radius"),
        ({}, dict(weights=()), r"len\(weights\)=0: must be at least 1"),
        (dict(network="swiglu"), {}, r"len\(weights\)=2: must be 3 with network=swiglu"),
        ({}, dict(weights=(np.ones((A, K, 5)), np.ones((A, 6, K)))), r"weights\[1\].shape="),
        ({}, dict(v_BTNAV=np.ones((1, 7, 1, A, 3))), r"weights\[1\].shape="),
        ({}, dict(implementation="tpu"), "implementation='tpu': unknown; use one of auto, chunked"),
    ],
)
def test_operands_that_do_not_fit_are_refused_in_one_line(own, changes, message):
    arrays, weights = make("mlp")
    with pytest.raises(UserError, match=message) as error:
        neural_memory(**dict(arrays, weights=weights) | changes, memory=Memory(**own))
    assert "\n" not in str(error.value)


def test_a_state_of_other_options_is_refused():
    arrays, weights = make("mlp")
    run = functools.partial(neural_memory, weights=weights)
    _, state = run(**arrays, memory=Memory(chunk=3))
    with pytest.raises(UserError, match="state='of another memory': use one that"):
        run(**arrays, memory=Memory(chunk=1), state=state)
    del arrays["log_momentum_BTA"]
    with pytest.raises(UserError, match=r"state\.momentum=True: must be given exactly when"):
        run(**arrays, memory=Memory(chunk=3), state=state)

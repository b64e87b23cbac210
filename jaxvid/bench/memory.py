"""The neural memory beside its naive form and softmax attention, over lengths."""

import functools
import sys

import jax
import jax.numpy as jnp

from jaxvid.bench import kernels
from jaxvid.bench.timing import take_turns
from jaxvid.kernels.neural_memory import Memory, neural_memory, parts
from jaxvid.memory import device_bytes
from jaxvid.mixers import make_mixer

LENGTHS = (1024, 4096, 16384, 65536)  # tokens of a stream
ROWS, HEADS, WIDTH = 2, 4, 64  # streams, heads and their width
FRAME = 64  # tokens of a frame or of a chunk
SHARE = 1 / 4  # of the memory of the device, which a program may need
REPETITIONS = 2  # at the least


def measure():
    """Every contender over lengths, forward, and forward and backward.

    Named <contender>_<tokens>_<forward or both>_ms, the best time; _tokens_per_s, of all streams;
    and _mib, the memory of the program beside its arguments. A program that needs more than SHARE
    of the memory is left out. The contenders:

    memory: `neural_memory` as the Titans mixers use it, on frames of 64 tokens. A frame is a step.
    tokens: the same with a step per token, whose gradients are taken at the weights before a chunk
    of 64 tokens; and naive, the same function with the weights after every token as arrays
    [rows, heads, 64, in, out], by a parallel scan over them (as the text of Titans, section 3.2,
    suggests). layer: the mixer titans_lmm on frames of 64 tokens, with its projections. softmax:
    causal attention alone.
    """
    figures = {}
    for L in LENGTHS:
        print(f"timing {L} tokens", file=sys.stderr)
        programs = {}
        for (contender, direction), (function, *arguments) in _contenders(L).items():
            program = jax.jit(function).lower(*arguments).compile()
            found = program.memory_analysis()
            needed = found.temp_size_in_bytes + found.output_size_in_bytes
            if needed > SHARE * device_bytes(jax.devices()[0], jax.local_device_count()):
                continue
            name = f"{contender}_{L}_{direction}"
            figures[f"{name}_mib"] = needed / 2**20
            programs[name] = functools.partial(program, *arguments)
        for name, seconds in zip(programs, take_turns(*programs.values(), fewest=REPETITIONS)):
            figures[f"{name}_ms"] = 1e3 * min(seconds)
            figures[f"{name}_tokens_per_s"] = ROWS * L / min(seconds)
    return figures


def _contenders(L):
    """{(contender, forward or both): (a function, its arguments)}."""
    operands = _operands(L)
    mixer = make_mixer({"name": "titans_lmm"}, width=HEADS * WIDTH, heads=HEADS)
    x_BTND = jax.random.normal(jax.random.key(0), (ROWS, L // FRAME, FRAME, HEADS * WIDTH))
    params = jax.jit(mixer.init)(jax.random.key(1), x_BTND[:, :1])
    q, k, v = (operands[name].reshape(ROWS, L, HEADS, WIDTH) for name in "qkv")

    def attend(q, k, v):
        implementation = "cudnn" if kernels.flash(WIDTH, q.dtype) else "xla"
        options = dict(is_causal=True, implementation=implementation)
        return jax.nn.dot_product_attention(q, k, v, **options)

    runs = {
        "memory": (functools.partial(by_frames, tokens=FRAME), operands),
        "tokens": (functools.partial(by_frames, tokens=1), operands),
        "naive": (naive, operands),
        "layer": (lambda params, x: mixer.apply(params, x)[0], params, x_BTND),
        "softmax": (attend, q, k, v),
    }
    found = {}
    for name, (function, *arguments) in runs.items():
        found[name, "forward"] = (function, *arguments)
        found[name, "both"] = (_gradient(function, len(arguments)), *arguments)
    return found


def _gradient(function, count):
    """All gradients of the mean square of its result."""
    return jax.grad(lambda *x: jnp.square(function(*x)).mean(), argnums=tuple(range(count)))


def _operands(L, dtype=jnp.float32):
    """Random tokens q, k, v [B, L, A, K], step [B, L, A], decay, momentum [B, L, A], weights."""
    keys = iter(jax.random.split(jax.random.key(2), 8))
    shape = (ROWS, L, HEADS, WIDTH)
    q, k, v = (jax.random.normal(next(keys), shape, dtype) for _ in range(3))
    q, k = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    step, decay, momentum = (jax.random.normal(next(keys), shape[:3], dtype) for _ in range(3))
    sizes = ((WIDTH, 4 * WIDTH), (4 * WIDTH, WIDTH))
    weights = tuple(
        jax.random.normal(next(keys), (HEADS, *pair), dtype) * pair[0] ** -0.5 for pair in sizes
    )
    return dict(
        **{"q": q, "k": k, "v": v, "step": jax.nn.sigmoid(step - 2.0) / WIDTH},
        **{"decay": -jax.nn.softplus(decay - 3.0), "momentum": jax.nn.log_sigmoid(momentum + 2.0)},
        weights=weights,
    )


def by_frames(operands, tokens):
    """`neural_memory` on frames of as many tokens -> y_BTNAK.

    Gates are averaged over a frame. Gradients are taken at the weights before FRAME tokens.
    """

    def framed(x_BLA):
        return x_BLA.reshape(x_BLA.shape[0], -1, tokens, *x_BLA.shape[2:])

    q, k, v, step = (framed(operands[name]) for name in ("q", "k", "v", "step"))
    gates = [framed(operands[name]).mean(axis=2) for name in ("decay", "momentum")]
    chunk = FRAME // tokens
    read = "after" if chunk == 1 else "causal"
    memory = Memory(chunk=chunk, read=read, writes="mean", remat=4)
    return neural_memory(q, k, v, step, *gates, memory=memory, weights=operands["weights"])[0]


def naive(operands):
    """What `by_frames` computes with one token per frame, by the weights after every token."""
    memory, norm_V = Memory(), jnp.ones(WIDTH)

    def scan(decay_G, start, added_G):
        """The states after each token: x <- decay x + added, from `start`."""
        decay_G11 = decay_G[:, None, None]
        joined = lambda a, b: (a[0] * b[0], b[0] * a[1] + b[1])  # noqa: E731
        total, sums = jax.lax.associative_scan(joined, (decay_G11, added_G))
        return total * start + sums

    def chunk(carry, tokens):
        weights, momentum = carry
        q_GK, k_GK, v_GK, step_G, decay_G, momentum_G = tokens

        def loss(weights, k_K, v_K):
            return parts.objective(memory, parts.recall(memory, weights, k_K, norm_V), v_K, None)

        gradients = jax.vmap(jax.grad(loss), in_axes=(None, 0, 0))(weights, k_GK, v_GK)
        added = [-step_G[:, None, None] * gradient for gradient in gradients]
        surprises = [scan(jnp.exp(momentum_G), m, a) for m, a in zip(momentum, added)]
        after = [scan(jnp.exp(decay_G), w, s) for w, s in zip(weights, surprises)]
        read = jax.vmap(lambda weights, q_K: parts.recall(memory, weights, q_K, norm_V))
        return [[x[-1] for x in part] for part in (after, surprises)], read(after, q_GK)

    def head(tokens, weights):
        tokens = [x.reshape(-1, FRAME, *x.shape[1:]) for x in tokens]
        start = [list(weights), [jnp.zeros_like(w) for w in weights]]
        return jax.lax.scan(chunk, start, tokens)[1].reshape(-1, WIDTH)

    tokens = [operands[name] for name in ("q", "k", "v", "step", "decay", "momentum")]
    heads = jax.vmap(head, in_axes=(1, 0), out_axes=1)
    return jax.vmap(heads, in_axes=(0, None))(tokens, operands["weights"])

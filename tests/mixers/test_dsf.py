"""Every linear mixer is one recurrence, h_t = A_t h_{t-1} + B_t u_t and y_t = C_t h_t + D_t u_t.

This is the Dynamical Systems Framework (Sieber et al. 2024). `recurrence` computes it in float64. A
row of ROWS gives A, B, C, u and the layer around them, from the weights and by the definitions of
the papers, without logarithms, chunks or kernels. The rows of u_t are the values of the N tokens of
a frame; h is the matrix [K, V] of a head. D is zero in all of them: a frame reads itself through h.

softmax, alibi and routing keep tokens and have no such form of finite size. Neural memories are not
linear; `tests/kernels/test_neural_memory.py` has their loop in numpy.
"""

import functools

import jax
import numpy as np
import pytest

from jaxvid.mixers import MIXERS
from jaxvid.mixers.linear_attention import decay_slopes
from tests import laws

HEADS, WIDTH = 2, 8
K = WIDTH // HEADS


def recurrence(frames, inputs):
    """y_TNV for frames of (A [S, S], B [S, N], C [N, S], D [N, N]) and inputs u [N, V]."""
    h, outputs = 0.0, []
    for (A, B, C, D), u in zip(frames, inputs):
        h = A @ (h if outputs else np.zeros((A.shape[0], u.shape[1]))) + B @ u
        outputs.append(C @ h + D @ u)
    return np.stack(outputs)


class Weights:
    """The layers of a mixer, computed from its parameters in numpy."""

    def __init__(self, params):
        self.params = params

    def __getitem__(self, name):
        return np.float64(self.params[name])

    def dense(self, name, x):
        return x @ np.float64(self.params[name]["kernel"]) + np.float64(self.params[name]["bias"])

    def norm(self, name, x):
        scale = np.float64(self.params[name]["scale"])
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + 1e-6) * scale

    def heads(self, name, x):
        """x [T, N, D] -> [T, N, A, K]."""
        return self.dense(name, x).reshape(*x.shape[:2], HEADS, K)

    def qkv(self, x):
        q, k, v = (self.heads(name, x) for name in "qkv")
        return self.norm("q_norm", q), self.norm("k_norm", k), v


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def silu(x):
    return x * sigmoid(x)


def softplus(x):
    return np.log1p(np.exp(x))


def elu_plus_one(x):
    return np.where(x > 0, x + 1, np.exp(np.minimum(x, 0)))


def linear(w, x):
    """C includes the normaliser of a query."""
    q, k, v = w.qkv(x)
    q, k = elu_plus_one(q), elu_plus_one(k)
    total = k.sum(1, keepdims=True).cumsum(0)
    return np.eye(K), k, q / ((q * total).sum(-1, keepdims=True) + 1e-6), v


def lightning(w, x):
    q, k, v = (silu(part) for part in w.qkv(x))
    decay_A = np.exp(-decay_slopes("lightning", HEADS))
    return decay_A[:, None, None] * np.eye(K), k, q, v


def gla(w, x, feature=lambda x: x):
    q, k, v = w.qkv(x)
    q, k = feature(q), feature(k)
    gate = sigmoid(w.dense("decay_out", w.dense("decay_in", x))) ** (1 / 16)
    decay_TAK = np.exp(np.log(gate).mean(1)).reshape(-1, HEADS, K)
    return decay_TAK[..., None] * np.eye(K), k, q * K**-0.5, v


def lightnet(w, x):
    """Shares of exp(k) in its sum so far; A rescales the earlier shares to the new sum."""
    q, k, v = w.qkv(x)
    total_TAK = np.exp(k).sum(1).cumsum(0)
    before_TAK = np.concatenate([np.zeros((1, HEADS, K)), total_TAK[:-1]])
    decay_TAKK = (before_TAK / total_TAK)[..., None] * np.eye(K)
    return decay_TAKK, np.exp(k) / total_TAK[:, None], silu(q), v


def aaren(w, x):
    """One number per head: the share of a token in the sum of exp(q k) so far."""
    k, v = w.norm("k_norm", w.heads("k", x)), w.heads("v", x)
    weight = np.exp((w["query"] * k).sum(-1, keepdims=True) * K**-0.5)
    total_TA1 = weight.sum(1).cumsum(0)
    before_TA1 = np.concatenate([np.zeros((1, HEADS, 1)), total_TA1[:-1]])
    return (before_TA1 / total_TA1)[..., None], weight / total_TA1[:, None], np.ones_like(weight), v


def gated_delta(w, x):
    """Tokens write in order: the corrections of later tokens change each earlier write."""

    def mixed(name):
        kernel = np.float64(w.params[f"conv_{name}"]["kernel"])
        h = np.concatenate([np.zeros((len(kernel) - 1, *x.shape[1:])), w.dense(name, x)])
        past = len(kernel) - 1
        y = sum(kernel[i] * h[past - i : len(h) - i] for i in range(len(kernel)))
        return silu(y).reshape(*x.shape[:2], HEADS, K)

    q, k, v = (mixed(name) for name in "qkv")
    q, k = (part / np.sqrt(np.square(part).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
    step = softplus(w.dense("step", x) + w["step_bias"])
    decay_TA = np.exp(-(np.exp(w["log_rate"]) * step).mean(1))
    beta_TNA = sigmoid(w.dense("beta", x))
    T, N = x.shape[:2]
    A_TAKK = decay_TA[..., None, None] * np.eye(K)
    B_TNAK = np.zeros_like(k)
    for t, n, a in np.ndindex(T, N, HEADS):
        correct = np.eye(K) - beta_TNA[t, n, a] * np.outer(k[t, n, a], k[t, n, a])
        A_TAKK[t, a] = correct @ A_TAKK[t, a]
        B_TNAK[t, :n, a] = B_TNAK[t, :n, a] @ correct
        B_TNAK[t, n, a] = beta_TNA[t, n, a] * k[t, n, a]
    return A_TAKK, B_TNAK, q * K**-0.5, v


def gated(gate):
    def after(w, y, x):
        y = w.norm("out_norm", y).reshape(x.shape)
        return w.dense("out", y * gate(w.dense("gate", x)))

    return after


def plain(w, y, x):
    return w.dense("out", y.reshape(x.shape))


def low_rank(w, y, x):
    y = w.norm("out_norm", y).reshape(x.shape)
    return w.dense("out", y * silu(w.dense("gate", w.dense("gate_in", x))))


# mixer -> its options, (A, B, C, u) of all frames and heads, and the layer after the recurrence
ROWS = {
    "linear": ({}, linear, plain),
    "lightning": ({}, lightning, gated(sigmoid)),
    "gla": ({}, gla, gated(silu)),
    "lightnet": ({"lrpe": False, "tpe": 0}, lightnet, low_rank),
    "aaren": ({}, aaren, plain),
    "gated_delta": ({}, gated_delta, gated(silu)),
}
VARIANTS = [("gla", {"feature": "silu"}, functools.partial(gla, feature=silu), gated(silu), 7, 1)]


@pytest.mark.parametrize(
    "name, options, terms, after, T, N",
    [(name, *ROWS[name], T, N) for name in ROWS for T, N in ((7, 1), (4, 3))] + VARIANTS,
)
def test_equals_the_recurrence(name, options, terms, after, T, N):
    mixer = MIXERS[name](width=WIDTH, heads=HEADS, grid=(1, N), **options)
    x_BTND = jax.random.normal(jax.random.key(0), (1, T, N, WIDTH))
    params = laws.disturbed(jax.jit(mixer.init)(jax.random.key(1), x_BTND))
    y_BTND, _ = jax.jit(mixer.apply)(params, x_BTND)

    w, x = Weights(params["params"]), np.float64(x_BTND[0])
    A, B, C, u = terms(w, x)
    A = np.broadcast_to(A, (T, HEADS, *A.shape[-2:]))
    D = np.zeros((N, N))
    y_TNAV = np.stack(
        [
            recurrence([(A[t, a], B[t, :, a].T, C[t, :, a], D) for t in range(T)], u[:, :, a])
            for a in range(HEADS)
        ],
        axis=2,
    )
    np.testing.assert_allclose(y_BTND[0], after(w, y_TNAV, x), atol=2e-5)

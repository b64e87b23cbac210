"""What a neural memory is made of: its options, its state, network, objective and retention.

The functions here work on one head of one row: tokens [.., K] and matrices [K, F].
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jaxvid import checks

NETWORKS = ("mlp", "swiglu")
OBJECTIVES = ("l2", "dot", "lp", "huber", "shift")
RETENTIONS = ("none", "lq", "softmax", "rows", "muon")
READS = ("causal", "before", "after")
WRITES = ("sum", "mean", "keys")
MAX_CHUNK = 2**16
SMOOTH = 1e-6  # of roots and norms, whose gradients at zero are infinite
ROUND = 1e-2  # of the corner of sum |r_i|, whose sign is a gate of every write of an outlier
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024, Muon


@dataclasses.dataclass(frozen=True)
class Memory:
    """The static options of `neural_memory`. Raises UserError for values that cannot work.

    network: M(x) with fast weights W_i. "mlp": x W_1 act(.) W_2 .., GELU between as many layers as
    there are weights; one layer is a linear memory. "swiglu": (silu(x W_1) * (x W_2)) W_3 (LaCT).
    residual: M(x) + x, with M(x) layer-normalised first (Titans, Miras, TTT).

    objective, of the prediction M(k) with residual r = M(k) - v: "l2", |r|^2. "dot", -<M(k), v>.
    "lp", sum |r|^p. "huber" (Yaad): the gradient is that of |r|^2 where |r| is at most the radius,
    else the radius times that of sum |r_i|. "shift", robust to a value that is off by the radius:
    |r|^2 / 2 + radius |r|. Sizes are smooth at zero, |x| = sqrt(x^2 + 1e-6); for the sum of |r_i|
    it is sqrt(x^2 + 0.01), because a sharp sign would multiply rounding errors by 1000.

    retention, of what the writes have accumulated, at the end of a chunk. "none". "lq" (Moneta):
    the weights are the accumulated A / |A|_q^(q - 2). "softmax" (Memora): A is a logarithm, and the
    weights of each output unit are `mass` softmax(A). "rows" (LaCT): the weights of each output
    unit get the norm that they had at the start of the stream. "muon": what a chunk adds is
    orthogonalised by Newton-Schulz (LaCT, Atlas); needs chunk=1.

    chunk: frames whose gradients are taken at the same weights, those before the chunk. It changes
    the result, so it belongs to the model.

    read: "causal", a frame reads the memory that has all frames up to itself; "before", it reads
    the memory before its chunk; "after", the memory after its chunk and its retention, which needs
    chunk=1, as a longer chunk holds later frames. "softmax" and "muon" know the weights at the ends
    of chunks only, so they have no causal read.

    step_scale: factor of all step sizes. writes: what bounds the sum of the writes of the n tokens
    of a frame that write: "sum", nothing; "mean", step sizes / n; "keys", keys / sqrt(n) (SANA).
    reset_every: frames after which the memory starts anew, a multiple of chunk (TNT). remat: chunks
    between the states that the backward pass keeps; it recomputes the others.
    """

    network: str = "mlp"
    residual: bool = True
    objective: str = "l2"
    p: float = 3.0
    retention: str = "none"
    q: float = 4.0
    mass: float = 1.0
    chunk: int = 64
    read: str = "causal"
    step_scale: float = 1.0
    writes: str = "sum"
    reset_every: int | None = None
    remat: int = 1

    def __post_init__(self):
        checks.choose("network", self.network, NETWORKS)
        checks.choose("objective", self.objective, OBJECTIVES)
        checks.choose("retention", self.retention, RETENTIONS)
        checks.choose("read", self.read, READS)
        checks.choose("writes", self.writes, WRITES)
        checks.at_least("p", self.p, 1, at_most=64)
        checks.at_least("q", self.q, 1, at_most=64)
        checks.positive("mass", self.mass)
        checks.positive("step_scale", self.step_scale)
        counts = {"chunk": self.chunk, "remat": self.remat}
        if self.reset_every is not None:
            counts["reset_every"] = self.reset_every
        for field, count in counts.items():
            whole = type(count) is int and 1 <= count <= MAX_CHUNK
            remedy = f"must be a whole number from 1 to {MAX_CHUNK}"
            checks.require(whole, field, count, remedy)
        if self.read == "after" or self.retention == "muon":
            needed = "read=after" if self.read == "after" else "retention=muon"
            checks.require(self.chunk == 1, "chunk", self.chunk, f"must be 1 with {needed}")
        if self.retention in ("softmax", "muon"):
            remedy = f"is not possible with retention={self.retention}; use before or after"
            checks.require(self.read != "causal", "read", self.read, remedy)
        if self.reset_every is not None:
            remedy = f"must be a multiple of chunk={self.chunk}"
            checks.require(
                self.reset_every % self.chunk == 0, "reset_every", self.reset_every, remedy
            )


class State(NamedTuple):
    """The state of a memory; its arrays are float32.

    weights: what the writes have accumulated so far, one [B, A, in, out] per layer; the weights
    themselves, unless retention is "lq" or "softmax". momentum: the same shapes, None without
    momentum. start: `weights` at the start of the chunk, None if chunk=1. position: int32, frames
    read so far, None if nothing depends on it (chunk=1 and no reset_every). It only says where
    chunks begin, so frames that a stream skips do not count. It is a numpy integer at the start of
    a stream, so the chunks of a whole clip are known while tracing.
    """

    weights: tuple[Any, ...]
    momentum: tuple[Any, ...] | None
    start: tuple[Any, ...] | None
    position: Any


def apply(memory: Memory, layer: Callable, depth: int, x_GK, norm_V):
    """M(x) of tokens, where layer(i, x) is the i-th product with fast weights."""
    if memory.network == "swiglu":
        y_GV = layer(2, jax.nn.silu(layer(0, x_GK)) * layer(1, x_GK))
    else:
        y_GV = layer(0, x_GK)
        for i in range(1, depth):
            y_GV = layer(i, jax.nn.gelu(y_GV))
    if not memory.residual:
        return y_GV
    y_GV = y_GV - y_GV.mean(-1, keepdims=True)
    variance_G1 = jnp.square(y_GV).mean(-1, keepdims=True)
    return x_GK + norm_V * y_GV * jax.lax.rsqrt(variance_G1 + SMOOTH)


def recall(memory: Memory, weights: Sequence, x_GK, norm_V):
    """M(x) with given weights."""
    return apply(memory, lambda i, x: x @ weights[i], len(weights), x_GK, norm_V)


def objective(memory: Memory, prediction_GV, v_GV, radius_G):
    """What a write of each token descends, [G]; radius is None for objectives without one."""
    r_GV = prediction_GV - v_GV
    square_G = jnp.square(r_GV).sum(-1)
    if memory.objective == "l2":
        return square_G
    if memory.objective == "dot":
        return -(prediction_GV * v_GV).sum(-1)
    if memory.objective == "lp":
        return ((jnp.square(r_GV) + SMOOTH) ** (memory.p / 2)).sum(-1)
    size_G = jnp.sqrt(square_G + SMOOTH)
    if memory.objective == "shift":
        return square_G / 2 + radius_G * size_G
    l1_G = jnp.sqrt(jnp.square(r_GV) + ROUND).sum(-1)
    return jnp.where(size_G <= radius_G, square_G, radius_G * l1_G)


def scale(memory: Memory, start_KF):
    """What turns the accumulated into weights within the chunk that starts with `start`."""
    if memory.retention != "lq":
        return 1.0
    power = (jnp.square(start_KF) ** (memory.q / 2)).sum() + SMOOTH
    return power ** (2 / memory.q - 1)


def weights(memory: Memory, accumulated: Sequence):
    """The weights of the network at the end of a chunk, from what has been accumulated."""
    if memory.retention == "softmax":
        return [memory.mass * jax.nn.softmax(part, axis=-2) for part in accumulated]
    return [part * scale(memory, part) for part in accumulated]


def retain(memory: Memory, accumulated: Sequence, start: Sequence, kept, initial: Sequence):
    """What is kept of the accumulated at the end of a chunk.

    kept: the decay over the chunk. initial: the accumulated at the start of the stream.
    """
    if memory.retention == "softmax":  # the same weights, but no number drifts in a long stream
        return [jax.nn.log_softmax(part, axis=-2) for part in accumulated]
    if memory.retention == "rows":
        return [
            new * jnp.sqrt(_squares(old) / (_squares(new) + SMOOTH**2))
            for new, old in zip(accumulated, initial)
        ]
    if memory.retention == "muon":
        return [kept * old + orthogonal(new - kept * old) for new, old in zip(accumulated, start)]
    return list(accumulated)


def begin(memory: Memory, fresh, initial: Sequence, carry):
    """The carry (accumulated, momentum or None, start) at a frame where the memory may restart."""
    if memory.reset_every is None:
        return carry
    old, momentum, start = carry
    if momentum is not None:
        momentum = choose(fresh, [0 * part for part in initial], momentum)
    return choose(fresh, initial, old), momentum, choose(fresh, initial, start)


def choose(condition, these: Sequence, those: Sequence):
    """The matrices `these` if the condition holds, else `those`."""
    return [jnp.where(condition, this, that) for this, that in zip(these, those)]


def _squares(x_KF):
    return jnp.square(x_KF).sum(-2, keepdims=True)


def orthogonal(x_KF):
    """The matrix with all singular values near 1: five Newton-Schulz steps; 0 stays 0."""
    a, b, c = NEWTON_SCHULZ
    wide = x_KF.shape[0] > x_KF.shape[1]
    x = x_KF.T if wide else x_KF
    x = x * jax.lax.rsqrt(jnp.square(x).sum() + SMOOTH**2)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if wide else x

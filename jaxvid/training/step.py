"""One update, as one compiled program."""

import jax
import jax.numpy as jnp
import optax

from jaxvid.parallel.sharding import replicated
from jaxvid.training.state import TrainState, step_rng


def make_step(task, tx, schedule, config, mesh, shardings):
    """The jitted step: (state, frozen, batch) -> (state, metrics).

    metrics: scalars, float32, or int32 if they count.

    `state` is donated. Randomness is a function of seed and step alone, so a resumed run repeats
    an uninterrupted one bit for bit. If the loss, the gradients or the new `extra` are not finite,
    only the counters change: neither the average nor the optimiser sees such a step.
    """
    optim = config.optim

    def step(state, frozen, batch):
        rng = step_rng(config.seed, state.step)
        updates_done = state.step - state.skipped
        grads, metrics, extra = gradients(task, state, frozen, batch, rng, optim.accumulate)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(grad_norm) & all_finite(extra)

        def if_finite(new, old):
            return jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)

        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        # Zeroing the update is cheaper than selecting the old parameters, which would copy them.
        updates = if_finite(updates, optax.tree.zeros_like(updates))
        params = optax.apply_updates(state.params, updates)
        ema = average(state.ema, params, optim.ema, updates_done)
        state = TrainState(
            step=state.step + 1,
            skipped=state.skipped + ~finite,
            params=params,
            opt_state=if_finite(opt_state, state.opt_state),
            ema=if_finite(ema, state.ema),
            extra=if_finite(extra, state.extra),
        )
        metrics |= {"grad_norm": grad_norm, "lr": schedule(updates_done)}
        metrics["skipped"] = state.skipped
        return state, jax.tree.map(_number, metrics)

    return jax.jit(step, donate_argnums=0, out_shardings=(shardings, replicated(mesh)))


def _number(value):
    """A metric as an array of float32, or of int32 if it is whole by its type."""
    is_whole = jnp.issubdtype(jnp.result_type(value), jnp.integer)
    return jnp.asarray(value, jnp.int32 if is_whole else jnp.float32)


def gradients(task, state, frozen, batch, rng, count):
    """(mean gradients, mean metrics with the loss, extra) over `count` microbatches in turn.

    Means are weighed by the targets of each microbatch, so a mean over the targets of the whole
    batch does not depend on `count`.
    """

    average = {"average": state.ema or state.params} if task.reads_average else {}

    def loss(params, batch, rng, extra):
        value, (metrics, extra, weight) = task.loss(
            params, batch, rng, step=state.step, frozen=frozen, extra=extra, **average
        )
        return value, ({"loss": value, **metrics}, extra, weight)

    gradient = jax.grad(loss, has_aux=True)
    if count == 1:
        grads, (metrics, extra, _) = gradient(state.params, batch, rng, state.extra)
        return grads, metrics, extra

    def body(carry, index_and_batch):
        total, extra = carry
        index, batch = index_and_batch
        grads, (metrics, extra, weight) = gradient(
            state.params, batch, jax.random.fold_in(rng, index), extra
        )
        weight = jnp.asarray(weight, jnp.float32)
        total = jax.tree.map(lambda old, new: old + weight * new, total, grads)
        return (total, extra), (metrics, weight)

    zeros = jax.tree.map(jnp.zeros_like, state.params)
    (total, extra), (metrics, weight_S) = jax.lax.scan(
        body, (zeros, state.extra), (jnp.arange(count), microbatches(batch, count))
    )
    weight = jnp.maximum(weight_S.sum(), 1)  # no part may have a target
    mean = jax.tree.map(lambda leaf: leaf / weight, total)
    return mean, jax.tree.map(lambda leaf_S: (weight_S * leaf_S).sum() / weight, metrics), extra


def microbatches(batch, count):
    """[B, ...] -> [count, B / count, ...], interleaved so that each device keeps its own rows."""
    return jax.tree.map(lambda x: x.reshape(-1, count, *x.shape[1:]).swapaxes(0, 1), batch)


def average(ema, params, decay, k):
    """Exponential moving average with decay min(decay, (1 + k) / (10 + k)) at update k from 0.

    The ramp discards the random initialisation quickly. An empty `ema` stays empty.
    """
    if not ema:
        return ema
    decay = jnp.minimum(decay, (1 + k) / (10 + k))
    return jax.tree.map(lambda old, new: old + (1 - decay) * (new - old), ema, params)


def all_finite(tree):
    """Whether every floating-point leaf is finite, bool []."""
    floats = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floats] or [True]))

"""Timesteps for training: one per frame, t_BT int32 in 0..S-1 (S = num_steps), larger is noisier.

Sizes are static and the draws have no loops, so they run inside the jitted training step.

A non-decreasing t_0 <= ... <= t_{T-1} in 0..S-1 corresponds to a set of T places among
S + T - 1 (stars and bars): frame f stands at place t_f + f. So a sequence is drawn by drawing a
set, in integers only, for any number of frames and steps.
"""

import jax
import jax.numpy as jnp


def fopp(rng: jax.Array, batch: int, frames: int, num_steps: int) -> jax.Array:
    """Non-decreasing t_BT by frame-oriented probability propagation (AR-Diffusion: Sun et al.).

    A frame c and its timestep are uniform. Given them, the frames before c are uniform among the
    non-decreasing sequences below, and the frames after c among those above:
    P(t) = 1/(T S) sum_c 1 / (E[t_c, c] A[t_c, c]), where E and A count these sequences.
    """
    rng_frame, rng_step, rng_places = jax.random.split(rng, 3)
    pivot_B1 = jax.random.randint(rng_frame, (batch, 1), 0, frames)
    t_pivot_B1 = jax.random.randint(rng_step, (batch, 1), 0, num_steps)
    place_B1 = t_pivot_B1 + pivot_B1

    # Shuffle the places left and right of the pivot, then take one place for each frame there.
    places = num_steps + frames - 1
    side_BL = jnp.sign(jnp.arange(places) - place_B1)
    shuffled_BL = jnp.lexsort((jax.random.bits(rng_places, (batch, places)), side_BL))
    frame_T = jnp.arange(frames)
    chosen_BT = jnp.where(frame_T < pivot_B1, frame_T, t_pivot_B1 + frame_T)
    return _sequence(jnp.take_along_axis(shuffled_BL, chosen_BT, axis=1))


def uniform(rng: jax.Array, batch: int, frames: int, num_steps: int) -> jax.Array:
    """Uniform over all C(S + T - 1, T) non-decreasing t_BT (the ablation of AR-Diffusion)."""
    places = num_steps + frames - 1
    shuffled_BL = jnp.argsort(jax.random.bits(rng, (batch, places)))
    return _sequence(shuffled_BL[:, :frames])


def iid(rng: jax.Array, batch: int, frames: int, num_steps: int) -> jax.Array:
    """Independent and uniform timesteps for all frames -> t_BT (Diffusion Forcing, Chen et al.
    2024)."""
    return jax.random.randint(rng, (batch, frames), 0, num_steps, jnp.int32)


def full_sequence(rng: jax.Array, batch: int, frames: int, num_steps: int) -> jax.Array:
    """One uniform timestep for all frames of a clip -> t_BT (ordinary video diffusion)."""
    return jnp.broadcast_to(iid(rng, batch, 1, num_steps), (batch, frames))


def clean_prefix(
    rng: jax.Array, t_BT: jax.Array, probability: float, frames: int | jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Make the first prefix_B frames clean (t = 0), for image to video and continuation.

    With `probability` the length is uniform in 1..frames-1, else 0. frames: of the clip, if fewer
    than T. A clip of one frame has no prefix. Returns (t_BT, prefix_B int32).
    """
    batch, T = t_BT.shape
    frames = T if frames is None else frames
    rng_whether, rng_length = jax.random.split(rng)
    lengths = jnp.maximum(frames - 1, 1)
    length_B = 1 + jax.random.randint(rng_length, (batch,), 0, lengths, jnp.int32)
    has_prefix_B = jax.random.bernoulli(rng_whether, probability, (batch,)) & (frames > 1)
    prefix_B = jnp.where(has_prefix_B, length_B, 0)
    return jnp.where(jnp.arange(T) < prefix_B[:, None], 0, t_BT), prefix_B


def _sequence(place_BT):
    """Non-decreasing t_BT of distinct places in any order."""
    return (jnp.sort(place_BT) - jnp.arange(place_BT.shape[1])).astype(jnp.int32)

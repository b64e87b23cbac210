"""Timesteps for training: one per frame, t_BT int32 in 0..num_steps-1, larger is noisier.

Sizes are static and the draws are loop-free, so all of this lives inside the jitted step.

A non-decreasing t_0 <= ... <= t_{F-1} in 0..T-1 is the same thing as a set of F places among
T + F - 1 (stars and bars): frame f stands at place t_f + f. Drawing sets is drawing sequences, in
integers only, for any number of frames and steps.
"""

import jax
import jax.numpy as jnp


def fopp(rng, batch, frames, num_steps):
    """Non-decreasing t_BT by frame-oriented probability propagation (AR-Diffusion: Sun et al.).

    A frame c and its timestep are uniform; given them, the frames before are uniform among the
    non-decreasing sequences below, the frames after among those above:
    P(t) = 1/(F T) sum_c 1 / (E[t_c, c] S[t_c, c]), E and S the numbers of such sequences.
    """
    rng_frame, rng_step, rng_places = jax.random.split(rng, 3)
    pivot_B1 = jax.random.randint(rng_frame, (batch, 1), 0, frames)
    t_pivot_B1 = jax.random.randint(rng_step, (batch, 1), 0, num_steps)
    place_B1 = t_pivot_B1 + pivot_B1

    # Shuffle the places left and right of the pivot, then take as many as there are frames there.
    places = num_steps + frames - 1
    side_BL = jnp.sign(jnp.arange(places) - place_B1)
    shuffled_BL = jnp.lexsort((jax.random.bits(rng_places, (batch, places)), side_BL))
    frame_F = jnp.arange(frames)
    chosen_BF = jnp.where(frame_F < pivot_B1, frame_F, t_pivot_B1 + frame_F)
    return _sequence(jnp.take_along_axis(shuffled_BL, chosen_BF, axis=1))


def uniform(rng, batch, frames, num_steps):
    """Uniform over all C(T + F - 1, F) non-decreasing t_BT (the ablation of AR-Diffusion)."""
    places = num_steps + frames - 1
    shuffled_BL = jnp.argsort(jax.random.bits(rng, (batch, places)))
    return _sequence(shuffled_BL[:, :frames])


def iid(rng, batch, frames, num_steps):
    """Every frame on its own, uniform -> t_BT (Diffusion Forcing, Chen et al. 2024)."""
    return jax.random.randint(rng, (batch, frames), 0, num_steps, jnp.int32)


def full_sequence(rng, batch, frames, num_steps):
    """One uniform timestep for all frames of a clip -> t_BT (ordinary video diffusion)."""
    return jnp.broadcast_to(iid(rng, batch, 1, num_steps), (batch, frames))


def clean_prefix(rng, t_BT, probability):
    """Make the first prefix_B frames clean (t = 0): image to video and continuation.

    With `probability` the length is uniform in 1..F-1, else 0; one frame alone is never a prefix.
    Returns (t_BT, prefix_B int32).
    """
    batch, frames = t_BT.shape
    rng_whether, rng_length = jax.random.split(rng)
    length_B = 1 + jax.random.randint(rng_length, (batch,), 0, max(frames - 1, 1), jnp.int32)
    has_prefix_B = jax.random.bernoulli(rng_whether, probability, (batch,)) & (frames > 1)
    prefix_B = jnp.where(has_prefix_B, length_B, 0)
    return jnp.where(jnp.arange(frames) < prefix_B[:, None], 0, t_BT), prefix_B


def _sequence(place_BF):
    """Non-decreasing t_BT of distinct places in any order."""
    return (jnp.sort(place_BF) - jnp.arange(place_BF.shape[1])).astype(jnp.int32)

"""Shortcut forcing: a network that knows the size of its step, trained in one phase.

A step of size d goes from noise level t to t - d on the flow schedule. The network reads t and d of
every frame and predicts x0. The smallest step, 1 / finest, is ordinary training: its target is the
data, and no teacher is needed. The target of any other step is what two steps of half its size
reach (Frans et al. 2024, One Step Diffusion via Shortcut Models; per frame: Hafner et al. 2025,
Dreamer 4, section 3.2). Size i is a step of 2^i / finest.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxvid import checks
from jaxvid.diffusion.noise import NoiseSchedule
from jaxvid.errors import within

MAX_VELOCITY = 4.0  # per number, of the two half steps: an early network may predict anything


def sizes(finest: int) -> int:
    """How many sizes of a step there are: 1 / finest, 2 / finest .. 1."""
    return finest.bit_length()


def draw(rng: jax.Array, shape_BT: tuple[int, int], finest: int, num_steps: int):
    """(t_BT, size_BT) int32 of steps larger than the smallest, on the grid of their size.

    The size of a frame is uniform among 1 .. sizes - 1, and t among the levels d, 2 d .. 1.
    """
    rng_size, rng_place = jax.random.split(rng)
    size_BT = jax.random.randint(rng_size, shape_BT, 1, sizes(finest), jnp.int32)
    places_BT = finest >> size_BT
    place_BT = 1 + jnp.floor(jax.random.uniform(rng_place, shape_BT) * places_BT).astype(jnp.int32)
    return jnp.minimum(place_BT, places_BT) * stride(size_BT, finest, num_steps), size_BT


def stride(size, finest: int, num_steps: int):
    """The timesteps that a step of this size covers."""
    return (num_steps - 1) // finest << size


class Shortcut(NamedTuple):
    """How a network learns steps of all sizes; static under jit.

    finest: the number of the smallest steps from noise to data, a power of two; 0 = the network
    knows no sizes. share: of the clips of a batch that learn larger steps. after: training steps
    before they do.
    """

    finest: int = 0
    share: float = 0.25
    after: int = 0

    @property
    def sizes(self) -> int:
        """Sizes of a step that the network tells apart, 0 if it knows none."""
        return sizes(self.finest) if self.finest else 0

    def check(self, noise: NoiseSchedule, prediction: str, steps: int):
        """Raise UserError unless networks of this prediction can be trained and sampled so."""
        finest = self.finest
        is_power = finest >= 0 and finest & (finest - 1) == 0 and finest != 1
        checks.require(is_power, "shortcut.finest", finest, "use 0, or a power of 2 from 2 on")
        with within("shortcut"):
            checks.between("share", self.share, 0, 1)
            checks.positive("share", self.share)
            checks.between("after", self.after, 0, 2**31 - 1)
        if not finest:
            return
        remedy = "steps have a size on the flow schedule alone; use noise.name=flow, noise.shift=1"
        checks.require(noise.is_flow and noise.shift == 1, "shortcut.finest", finest, remedy)
        remedy = "shortcuts are of predictions of x0; use x0"
        checks.require(prediction == "x0", "prediction", prediction, remedy)
        divided = (noise.num_steps - 1) % finest == 0
        fitting = -(-(noise.num_steps - 1) // finest) * finest + 1
        remedy = f"does not hold {finest} equal steps; use {fitting}"
        checks.require(divided, "noise.num_steps", noise.num_steps, remedy)
        remedy = f"the network knows {finest} steps, half of them, a quarter ..; use one of these"
        is_known = steps >= 1 and finest % steps == 0
        checks.require(is_known, "sampler.steps", steps, remedy)

    def size_of(self, steps: int) -> int:
        """The size of a step where `steps` of them lead from noise to data."""
        return (self.finest // steps).bit_length() - 1

    def rows(self, batch: int) -> slice:
        """The clips of a batch that learn larger steps, evenly spaced, as devices hold them."""
        return slice(0, batch, max(round(1 / self.share), 1))


def target(
    predict: Callable,
    x_BTNC: jax.Array,
    t_BT: jax.Array,
    size_BT: jax.Array,
    *,
    noise: NoiseSchedule,
    finest: int,
) -> jax.Array:
    """The x0 that one step of `size_BT` >= 1 must predict to reach what two half steps reach.

    predict(x_BTNC, t_BT, size_BT) -> x0_BTNC. No gradient passes. x_t + t (b' + b'') / 2, with the
    velocities b towards the data of both half steps.
    """
    half_BT = stride(size_BT - 1, finest, noise.num_steps)

    def sigma(t_BT):
        return jnp.take(noise.sigma_S, t_BT)[..., None, None]

    def velocity(x_BTNC, t_BT):
        x0_BTNC = predict(x_BTNC, t_BT, size_BT - 1)
        return jnp.clip((x0_BTNC - x_BTNC) / sigma(t_BT), -MAX_VELOCITY, MAX_VELOCITY)

    first = velocity(x_BTNC, t_BT)
    x_half = x_BTNC + (sigma(t_BT) - sigma(t_BT - half_BT)) * first
    second = velocity(x_half, t_BT - half_BT)
    return jax.lax.stop_gradient(x_BTNC + sigma(t_BT) * (first + second) / 2)

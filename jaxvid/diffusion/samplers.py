"""Samplers: take every frame from noise to data by a frame schedule, in one `lax.scan`.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`. Denoising keeps the
prediction and drops the new state; committing keeps the new state and drops the prediction. Only
finished frames are committed, once, at the timestep of clean data, and never evaluated again. A
network that has a method `commit(x_BTNC, state) -> state` commits by that.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid import checks
from jaxvid.diffusion.frame_schedules import FrameSchedule
from jaxvid.diffusion.noise import NoiseSchedule
from jaxvid.errors import UserError

ENDS = ("clean", "noisy")


class Solver(NamedTuple):
    """One step of a frame: DDIM, which is Euler on the flow schedule. Static under jit.

    end: what the last step of a frame gives. "clean": the predicted x0. "noisy": x at timestep 0,
    as the released AR-Diffusion code does, which keeps the noise sigma_0 of the schedule. Both are
    the same on the flow schedule, where sigma_0 is 0.
    """

    noise: NoiseSchedule
    prediction: str
    eta: float = 0.0
    end: str = "clean"

    def step(
        self,
        predict: Callable,
        x_BTNC: jax.Array,
        t_T: jax.Array,
        next_T: jax.Array,
        state: Any,
        rng: jax.Array,
        frame_T: jax.Array,
    ) -> jax.Array:
        """x_BTNC after every frame moved from its timestep t_T to next_T, reading the state."""
        B = x_BTNC.shape[0]
        t_BT, next_BT = (jnp.broadcast_to(t, (B, len(t))) for t in (t_T, next_T))
        prediction_BTNC, _ = predict(x_BTNC, t_BT, state)
        x0, eps = self.noise.split(prediction_BTNC, x_BTNC, t_BT, self.prediction)
        fresh = frame_noise(rng, frame_T, t_T, x_BTNC.shape) if self.eta else None
        checks.choose("end", self.end, ENDS)
        stepped = self.noise.step(x0, eps, t_BT, next_BT, self.eta, fresh)
        if self.end == "noisy":
            return stepped
        return jnp.where((next_T == 0)[:, None, None], x0, stepped)  # levels end at 0


def frame_noise(
    rng: jax.Array, frame_T: jax.Array, t_T: jax.Array, shape_BTNC: tuple[int, ...]
) -> jax.Array:
    """Standard normal noise x_BTNC that depends on a frame's index and timestep alone.

    So it is the same however the stream is cut.
    """
    B, _, N, C = shape_BTNC

    def one(frame, t):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, frame), t), (B, N, C))

    return jax.vmap(one, out_axes=1)(jnp.asarray(frame_T), jnp.asarray(t_T))


class Plan(NamedTuple):
    """The sizes of the pieces of a schedule, static under jit.

    A piece is at most `rows` iterations and ends when frames are finished. It works on `slots`
    frames, the first that are not finished. An iteration evaluates the first n of them, with n in
    `widths`, and a piece commits n frames, with n in `commits`; both begin with 0.
    """

    sample_steps: int
    slots: int
    rows: int
    widths: tuple[int, ...]
    commits: tuple[int, ...]


class Piece(NamedTuple):
    """What one piece of a plan does, int32: rows of a scan, or the argument of a compiled step.

    first: the frame in slot 0. age_W: steps that the frame in each slot has taken, negative before
    its start. width_U, commit: places in the plan's `widths` and `commits`.
    """

    first: np.ndarray
    age_W: np.ndarray
    width_U: np.ndarray
    commit: np.ndarray


def stream_plan(schedule: FrameSchedule) -> Plan:
    """The plan of a stream by this schedule.

    While a stream begins, fewer frames are noisy than later on. It then evaluates up to twice as
    many: all sizes would be programs of their own to compile.
    """
    slots, block, N = schedule.in_flight, schedule.block, schedule.sample_steps
    widths = {slots}
    while (half := -(-min(widths) // (2 * block)) * block) < min(widths):
        widths.add(half)
    if N % schedule.s and slots > block:  # a block ends before the next one starts
        widths.add(slots - block)
    at_once = math.ceil(1 / schedule.s)  # blocks that may end in the same iteration
    commits = (block * n for n in range(at_once + 1))
    rows = min(math.ceil(schedule.s), N)
    return Plan(N, slots, rows, (0, *sorted(widths)), tuple(n for n in commits if n <= slots))


def clip_plan(schedule: FrameSchedule) -> Plan:
    """The plan of a clip, with exactly the sizes that occur."""
    plan = stream_plan(schedule)
    _, widths, commits = zip(*_pieces(schedule, plan.slots, plan.rows))
    widths = np.unique([0, *itertools.chain.from_iterable(widths)]).tolist()
    return plan._replace(widths=tuple(widths), commits=tuple(np.unique([0, *commits]).tolist()))


class Position(NamedTuple):
    """A place between two pieces of a stream: iterations taken and frames finished."""

    iteration: int = 0
    finished: int = 0


BEGINNING = Position()


def pieces(
    schedule: FrameSchedule,
    plan: Plan,
    *,
    position: Position = BEGINNING,
    endless: bool = False,
) -> Iterator[tuple[Piece, Position]]:
    """Yield the pieces from a position on, each with the position after it.

    endless: go on beyond the last frame of the schedule.
    """
    iteration, first = position
    options = dict(position=position, endless=endless)
    for age_W, widths, done in _pieces(schedule, plan.slots, plan.rows, **options):
        widths = np.pad(widths, (0, plan.rows - len(widths)))
        width_U = np.searchsorted(plan.widths, widths).astype(np.int32)
        commit = np.int32(plan.commits.index(done))
        piece = Piece(np.int32(first), age_W, width_U, commit)
        iteration, first = iteration + np.count_nonzero(widths), first + done
        yield piece, Position(iteration, first)


def _pieces(schedule, slots, rows, *, position=BEGINNING, endless=False):
    """Yield (age_W, frames that are noisy in each iteration, frames finished) of every piece."""
    iteration, first = position
    while endless or first < schedule.frames:
        last = first + slots if endless else min(first + slots, schedule.frames)
        start_W = [schedule.start(frame) for frame in range(first, first + slots)]
        age_W = np.array([iteration - start for start in start_W], np.int32)
        widths, done = [], 0
        while not done and len(widths) < rows:
            iteration += 1
            widths.append(sum(start < iteration for start in start_W[: last - first]))
            done = sum(
                start + schedule.sample_steps <= iteration for start in start_W[: widths[-1]]
            )
        yield age_W, widths, done
        first += done


def advance(
    predict: Callable,
    x_BWNC: jax.Array,
    state: Any,
    piece: Piece,
    rng: jax.Array,
    noise: Callable,
    *,
    solver: Solver,
    plan: Plan,
    given: int | jax.Array = 0,
) -> tuple[jax.Array, Any, jax.Array]:
    """One piece -> (x_BWNC of the next slots, state, finished frames [B, max(commits), N, C]).

    Of the last, as many frames count as the piece commits. `given` earlier frames are in the state
    already. noise(frame, count): the noise of the frames that enter the slots, [B, count, N, C].
    """
    levels = jnp.asarray(solver.noise.levels(plan.sample_steps))
    W = x_BWNC.shape[1]

    def denoise(width, x_BWNC, row):
        if width == 0:
            return x_BWNC
        n_T, old = piece.age_W[:width] + row, x_BWNC[:, :width]
        waiting_T11 = ((n_T < 0) | (n_T >= plan.sample_steps))[:, None, None]
        n_T = jnp.clip(n_T, 0, plan.sample_steps - 1)
        frame_T = given + piece.first + jnp.arange(width)
        new = solver.step(predict, old, levels[n_T], levels[n_T + 1], state, rng, frame_T)
        return x_BWNC.at[:, :width].set(jnp.where(waiting_T11, old, new))

    def iteration(x_BWNC, row):
        width, row = row
        return _switch(width, denoise, plan.widths, x_BWNC, row), None

    def read(count, x_BWNC, state):
        return _same_size(state, commit(predict, x_BWNC[:, :count], state)) if count else state

    x_BWNC, _ = jax.lax.scan(iteration, x_BWNC, (piece.width_U, jnp.arange(plan.rows)))
    state = _switch(piece.commit, read, plan.commits, x_BWNC, state)
    most, finished = max(plan.commits), jnp.asarray(plan.commits)[piece.commit]
    longer = jnp.concatenate([x_BWNC, noise(piece.first + W, most)], axis=1)
    entered = jax.lax.dynamic_slice_in_dim(longer, finished, W, axis=1)
    return entered, state, x_BWNC[:, :most]


def commit(predict: Callable, x_BTNC: jax.Array, state: Any) -> Any:
    """The state after the finished frames x_BTNC."""
    if hasattr(predict, "commit"):
        return predict.commit(x_BTNC, state)
    return predict(x_BTNC, jnp.zeros(x_BTNC.shape[:2], jnp.int32), state)[1]


def _same_size(state, new):
    """`new`, the state after `state`; UserError unless the scan can carry it."""
    remedy = "start the stream: use the state that the network returns for no frames"
    checks.require(state is not None or new is None, "state", state, remedy)
    shapes, new_shapes = (jax.tree.map(jnp.shape, tree) for tree in (state, new))
    if shapes != new_shapes:
        raise UserError(
            "state: changes its shape when a frame is committed; a mixer without window keeps all "
            "frames: give it a window, at least as long as the video to keep them all"
        )
    return new


def _switch(index, branch, sizes, *operands):
    branches = [lambda *args, size=size: branch(size, *args) for size in sizes]
    return jax.lax.switch(index, branches, *operands)


def sample_cached(
    predict: Callable,
    x_BFNC: jax.Array,
    state: Any,
    rng: jax.Array,
    *,
    solver: Solver,
    schedule: FrameSchedule,
    given: int = 0,
) -> tuple[jax.Array, Any]:
    """Sample with an exact cache -> (clean x_BFNC, state that has read every frame).

    x_BFNC: noise. state: the stream before frame 0, with `given` earlier frames committed. Only the
    frames that an iteration steps are evaluated: the sizes that occur are the branches of a
    `lax.switch`, so a clip costs exactly `FrameSchedule.evaluations`. Raises UserError for a stream
    that has not been started (None), and for one without a window, whose state grows with every
    frame.
    """
    plan = clip_plan(schedule)
    rows = [piece for piece, _ in pieces(schedule, plan)]
    most = max(plan.commits)
    padded = jnp.pad(x_BFNC, ((0, 0), (0, plan.slots + most), (0, 0), (0, 0)))

    def noise(frame, count):
        return jax.lax.dynamic_slice_in_dim(padded, frame, count, axis=1)

    def step(carry, piece):
        options = dict(solver=solver, plan=plan, given=given)
        *carry, finished = advance(predict, *carry, piece, rng, noise, **options)
        return tuple(carry), finished

    start = (x_BFNC[:, : plan.slots], state)
    rows = jax.tree.map(lambda *parts: np.stack(parts), *rows)
    (_, state), finished_SBTNC = jax.lax.scan(step, start, rows)
    counts = np.array(plan.commits)[rows.commit]
    places = [s * most + t for s, count in enumerate(counts) for t in range(count)]
    finished_BTNC = jnp.moveaxis(finished_SBTNC, 1, 0).reshape(len(x_BFNC), -1, *x_BFNC.shape[2:])
    return finished_BTNC[:, np.array(places)], state


def sample_uncached(
    predict: Callable,
    x_BFNC: jax.Array,
    state: Any,
    rng: jax.Array,
    *,
    solver: Solver,
    schedule: FrameSchedule,
    given_BPNC: jax.Array,
    window: int | None = None,
) -> jax.Array:
    """Sample by running whole windows through the network in every iteration -> clean x_BFNC.

    window: None runs all frames every time, the reference that `sample_cached` must equal. A number
    runs a moved window of that many frames, positions counted from its start, as the released
    AR-Diffusion code does for long videos (its `valid_interval`). state: the stream before any
    frame. given_BPNC: clean first frames. The network gets the last timestep for frames that have
    not started and the timestep of clean data for finished frames; both stay as they are.
    """
    steps, P = schedule.sample_steps, given_BPNC.shape[1]
    levels = solver.noise.levels(steps)
    total = P + schedule.frames
    width = min(window or total, total)
    stop_I = np.clip(P + schedule.active_I2[:, 1], width, total)
    before_IF = np.vstack([np.zeros_like(schedule.index_IF[:1]), schedule.index_IF[:-1]])
    waiting_IF = (before_IF == 0) & ~schedule.update_IF
    t_IF = np.where(waiting_IF, solver.noise.num_steps - 1, levels[before_IF])
    rows = dict(
        first=(stop_I - width).astype(np.int32),
        t=np.pad(t_IF, ((0, 0), (P, 0)), constant_values=levels[steps]).astype(np.int32),
        next=np.pad(levels[schedule.index_IF], ((0, 0), (P, 0))).astype(np.int32),
        update=np.pad(schedule.update_IF, ((0, 0), (P, 0))),
    )

    def iteration(x_BFNC, row):
        def part(array, axis=0):
            return jax.lax.dynamic_slice_in_dim(array, row["first"], width, axis)

        old = part(x_BFNC, 1)
        frame_T = row["first"] + jnp.arange(width)
        new = solver.step(predict, old, part(row["t"]), part(row["next"]), state, rng, frame_T)
        new = jnp.where(part(row["update"])[:, None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(x_BFNC, new, row["first"], axis=1), None

    x_BFNC, _ = jax.lax.scan(iteration, jnp.concatenate([given_BPNC, x_BFNC], axis=1), rows)
    return x_BFNC[:, P:]

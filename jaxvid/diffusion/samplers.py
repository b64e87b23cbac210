"""Samplers: take every frame from noise to data by a frame schedule, in one `lax.scan`.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`. Denoising keeps the
prediction and drops the new state; committing keeps the new state and drops the prediction. Only
finished frames are committed, once, at the timestep of clean data, and never evaluated again.
"""

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
    """A frame schedule as the rows of a scan, int32 [I] each; the sizes that occur are static.

    A row steps the frames first .. first + widths[width] - 1 and then commits commits[commit]
    frames, the first of them `done`.
    """

    start_F: np.ndarray
    widths: tuple[int, ...]
    commits: tuple[int, ...]
    rows: dict[str, np.ndarray]


def plan(schedule: FrameSchedule) -> Plan:
    """The plan of a schedule. `widths` and `commits` begin with 0, for rows that do nothing."""
    first_I, stop_I = schedule.active_I2.T
    finished_I = schedule.finished_I
    commit_I = np.diff(finished_I, prepend=0)
    widths = np.unique([0, *(stop_I - first_I)])
    commits = np.unique([0, *commit_I])
    rows = dict(
        iteration=np.arange(schedule.iterations),
        first=first_I,
        width=np.searchsorted(widths, stop_I - first_I),
        done=finished_I - commit_I,
        commit=np.searchsorted(commits, commit_I),
    )
    return Plan(
        np.asarray(schedule.start_F, np.int32),
        tuple(widths.tolist()),
        tuple(commits.tolist()),
        {name: row.astype(np.int32) for name, row in rows.items()},
    )


def split_after_commits(plan: Plan) -> Iterator[tuple[dict[str, np.ndarray], slice]]:
    """Cut the rows after every commit; yield (rows, slice of the frames that they finish).

    All pieces have the same length, padded in front with rows that do nothing, so one compiled
    program serves them all.
    """
    ends = np.flatnonzero(plan.rows["commit"]) + 1
    cuts = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends)]
    longest = max(cut.stop - cut.start for cut in cuts)
    for cut in cuts:
        idle = longest - (cut.stop - cut.start)
        rows = {name: np.pad(row[cut], (idle, 0)) for name, row in plan.rows.items()}
        done = int(rows["done"][-1])
        yield rows, slice(done, done + plan.commits[rows["commit"][-1]])


def advance(
    predict: Callable,
    x_BFNC: jax.Array,
    state: Any,
    rows: dict[str, jax.Array],
    rng: jax.Array,
    *,
    solver: Solver,
    plan: Plan,
    levels: jax.Array,
    given: int = 0,
) -> tuple[jax.Array, Any]:
    """Run rows of a plan on the frames x_BFNC -> (x_BFNC, state).

    `given` earlier frames are in the state already. A row evaluates only the frames that it steps:
    the sizes that occur are the branches of a `lax.switch`, so a clip costs exactly
    `FrameSchedule.evaluations`.
    """
    levels, start_F = jnp.asarray(levels), jnp.asarray(plan.start_F)
    B = x_BFNC.shape[0]

    def denoise(width, x_BFNC, state, row):
        if width == 0:
            return x_BFNC
        first = row["first"]
        n_T = row["iteration"] - jax.lax.dynamic_slice_in_dim(start_F, first, width)
        window = jax.lax.dynamic_slice_in_dim(x_BFNC, first, width, axis=1)
        frame_T = given + first + jnp.arange(width)
        window = solver.step(predict, window, levels[n_T], levels[n_T + 1], state, rng, frame_T)
        return jax.lax.dynamic_update_slice_in_dim(x_BFNC, window, first, axis=1)

    def commit(count, x_BFNC, state, row):
        if count == 0:
            return state
        finished = jax.lax.dynamic_slice_in_dim(x_BFNC, row["done"], count, axis=1)
        return _same_size(state, predict(finished, jnp.full((B, count), levels[-1]), state)[1])

    def iteration(carry, row):
        x_BFNC, state = carry
        x_BFNC = _switch(row["width"], denoise, plan.widths, x_BFNC, state, row)
        state = _switch(row["commit"], commit, plan.commits, x_BFNC, state, row)
        return (x_BFNC, state), None

    (x_BFNC, state), _ = jax.lax.scan(iteration, (x_BFNC, state), rows)
    return x_BFNC, state


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

    x_BFNC: noise. state: the stream before frame 0, with `given` earlier frames committed. Raises
    UserError for a stream that has not been started (None), and for one without a window, whose
    state grows with every frame.
    """
    steps = plan(schedule)
    options = dict(solver=solver, plan=steps, levels=solver.noise.levels(schedule.sample_steps))
    return advance(predict, x_BFNC, state, steps.rows, rng, given=given, **options)


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

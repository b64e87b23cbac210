"""Samplers: walk every frame from noise to data as a frame schedule says, in one `lax.scan`.

A network is `predict(x_BTNC, t_BT, state) -> (prediction_BTNC, state)`. The two verbs of a stream
are both this call: to denoise is to keep the prediction and drop the new state, to commit is the
opposite. Only finished frames are ever committed, at the timestep of clean data, and then never
evaluated again.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxvid.diffusion.schedulers import FrameSchedule
from jaxvid.diffusion.schedules import NoiseSchedule


class Solver(NamedTuple):
    """How a frame takes one step: DDIM, which is Euler on the flow schedule. Static under jit."""

    noise: NoiseSchedule
    prediction: str
    eta: float = 0.0

    def step(self, predict, x_BTNC, t_T, next_T, state, rng, frame_T):
        """x after every frame i moved from timestep t_T[i] to next_T[i], reading the state."""
        B = x_BTNC.shape[0]
        t_BT, next_BT = (jnp.broadcast_to(t, (B, len(t))) for t in (t_T, next_T))
        prediction_BTNC, _ = predict(x_BTNC, t_BT, state)
        x0, eps = self.noise.split(prediction_BTNC, x_BTNC, t_BT, self.prediction)
        fresh = frame_noise(rng, frame_T, t_T, x_BTNC.shape) if self.eta else None
        return self.noise.step(x0, eps, t_BT, next_BT, self.eta, fresh)


def frame_noise(rng, frame_T, t_T, shape_BTNC):
    """Standard normal noise of each frame's index and timestep alone, however the stream is cut."""
    B, _, N, C = shape_BTNC

    def one(frame, t):
        return jax.random.normal(jax.random.fold_in(jax.random.fold_in(rng, frame), t), (B, N, C))

    return jax.vmap(one, out_axes=1)(jnp.asarray(frame_T), jnp.asarray(t_T))


class Plan(NamedTuple):
    """A frame schedule as the rows of a scan, int32 [K] each; the sizes that occur are static.

    Row k steps frames first .. first + widths[width] - 1 and then commits the commits[commit]
    frames from `done` on.
    """

    start_F: np.ndarray
    widths: tuple[int, ...]
    commits: tuple[int, ...]
    rows: dict[str, np.ndarray]


def plan(schedule: FrameSchedule) -> Plan:
    """The plan of a schedule. Its widths and commits begin with 0, the row that does nothing."""
    first_K, stop_K = schedule.active_K2.T
    finished_K = (schedule.index == schedule.sample_steps).sum(axis=1)
    commit_K = np.diff(finished_K, prepend=0)
    widths = np.unique([0, *(stop_K - first_K)])
    commits = np.unique([0, *commit_K])
    rows = dict(
        iteration=np.arange(schedule.iterations),
        first=first_K,
        width=np.searchsorted(widths, stop_K - first_K),
        done=finished_K - commit_K,
        commit=np.searchsorted(commits, commit_K),
    )
    return Plan(
        np.asarray(schedule.start_F, np.int32),
        tuple(widths.tolist()),
        tuple(commits.tolist()),
        {name: row.astype(np.int32) for name, row in rows.items()},
    )


def pieces(plan: Plan):
    """Cut the rows after every commit -> (rows of one length, slice of the frames it finishes), ...

    Pieces are padded in front with rows that do nothing, so one compiled program serves them all.
    """
    ends = np.flatnonzero(plan.rows["commit"]) + 1
    cuts = [slice(a, b) for a, b in zip([0, *ends[:-1]], ends)]
    longest = max(cut.stop - cut.start for cut in cuts)
    for cut in cuts:
        idle = longest - (cut.stop - cut.start)
        rows = {name: np.pad(row[cut], (idle, 0)) for name, row in plan.rows.items()}
        done = int(rows["done"][-1])
        yield rows, slice(done, done + plan.commits[rows["commit"][-1]])


def advance(predict, x_BFNC, state, rows, rng, *, solver, plan, levels, given=0):
    """Run rows of a plan on x_BFNC, which `given` frames precede in the state -> (x_BFNC, state).

    Only the frames that a row steps are evaluated, whatever else the buffer holds: the sizes that
    occur are the branches of a `lax.switch`, so a clip costs exactly `FrameSchedule.evaluations`.
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
        return predict(finished, jnp.full((B, count), levels[-1]), state)[1]

    def iteration(carry, row):
        x_BFNC, state = carry
        x_BFNC = _switch(row["width"], denoise, plan.widths, x_BFNC, state, row)
        state = _switch(row["commit"], commit, plan.commits, x_BFNC, state, row)
        return (x_BFNC, state), None

    (x_BFNC, state), _ = jax.lax.scan(iteration, (x_BFNC, state), rows)
    return x_BFNC, state


def _switch(index, branch, sizes, *operands):
    branches = [lambda *args, size=size: branch(size, *args) for size in sizes]
    return jax.lax.switch(index, branches, *operands)


def cached(predict, x_BFNC, state, rng, *, solver, schedule, given=0):
    """Sample with an exact cache -> (clean x_BFNC, state that has read every frame).

    x_BFNC: noise. state: the stream before frame 0, with `given` earlier frames committed.
    """
    levels = solver.noise.levels(schedule.sample_steps)
    steps = plan(schedule)
    return advance(
        predict,
        x_BFNC,
        state,
        steps.rows,
        rng,
        solver=solver,
        plan=steps,
        levels=levels,
        given=given,
    )


def uncached(predict, x_BFNC, state, rng, *, solver, schedule, given_BPNC, window=None):
    """Sample by running whole windows through the network in every iteration -> clean x_BFNC.

    window None: all frames every time, the reference that `cached` must equal. window W: only the
    moved window of W frames, positions counted from its start, as the released AR-Diffusion code
    does for long videos (its `valid_interval`). state: the stream before any frame. given_BPNC:
    clean first frames. Waiting frames are told the last timestep, finished ones that of clean
    data; both are left untouched.
    """
    N, P = schedule.sample_steps, given_BPNC.shape[1]
    levels = solver.noise.levels(N)
    total = P + schedule.frames
    width = min(window or total, total)
    stop_K = np.clip(P + schedule.active_K2[:, 1], width, total)
    before_KF = np.vstack([np.zeros_like(schedule.index[:1]), schedule.index[:-1]])
    idle = (before_KF == 0) & ~schedule.update
    told_KF = np.where(idle, solver.noise.num_steps - 1, levels[before_KF])
    rows = dict(
        first=(stop_K - width).astype(np.int32),
        told=np.pad(told_KF, ((0, 0), (P, 0)), constant_values=levels[N]).astype(np.int32),
        next=np.pad(levels[schedule.index], ((0, 0), (P, 0))).astype(np.int32),
        update=np.pad(schedule.update, ((0, 0), (P, 0))),
    )

    def iteration(x_BFNC, row):
        def part(array, axis=0):
            return jax.lax.dynamic_slice_in_dim(array, row["first"], width, axis)

        old = part(x_BFNC, 1)
        frame_T = row["first"] + jnp.arange(width)
        new = solver.step(predict, old, part(row["told"]), part(row["next"]), state, rng, frame_T)
        new = jnp.where(part(row["update"])[:, None, None], new, old)
        return jax.lax.dynamic_update_slice_in_dim(x_BFNC, new, row["first"], axis=1), None

    x_BFNC, _ = jax.lax.scan(iteration, jnp.concatenate([given_BPNC, x_BFNC], axis=1), rows)
    return x_BFNC[:, P:]

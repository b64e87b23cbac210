"""Train a task: `python -m jaxvid.train --config=configs/ar_diffusion.py [--workdir=DIR]`.

The same command resumes where the run stopped, on any number of devices and hosts. SIGTERM and
Ctrl-C save and exit with status 0, or with --stopped_status; a second Ctrl-C stops at once. The
work folder (default runs/<config name>) holds config.json, metrics.jsonl, ckpt/<step>/,
tensorboard/ and samples/<step>/.

On many hosts run this on each. Cloud TPU, Kubernetes, SLURM and Open MPI are detected; elsewhere
give --coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import contextlib
import os
from pathlib import Path

import jax
from absl import flags

from jaxvid import checks, cli, data, files
from jaxvid import config as config_lib
from jaxvid.data import text
from jaxvid.errors import UserError, within
from jaxvid.evaluators.held_out import HeldOut
from jaxvid.parallel import multihost
from jaxvid.parallel.mesh import make_mesh
from jaxvid.parallel.sharding import batch_sharding, shard_params
from jaxvid.runs import make_task, open_weights
from jaxvid.training import flops, interrupt, memory, profile
from jaxvid.training.adopt import adopt
from jaxvid.training.checkpoint import Checkpoints
from jaxvid.training.guard import Guard
from jaxvid.training.lock import locked
from jaxvid.training.log import Log, Progress, parameter_table, say
from jaxvid.training.optim import make_optimizer
from jaxvid.training.profile import Trace
from jaxvid.training.state import make_init, placed
from jaxvid.training.step import make_step
from jaxvid.training.watchdog import SECONDS, Watchdog
from jaxvid.training.writer import Writer

FLAGS = flags.FLAGS


def train(config, workdir, *, traced=None, hang_seconds=0):
    """Train `config` in `workdir`, from its newest checkpoint if there is one; the last TrainState.

    traced: a range of steps whose trace is written to <workdir>/profile/, or None. hang_seconds:
    see `training.watchdog`.

    Raises UserError, one line, for what the user can repair, before compiling if it is known then.
    """
    multihost.initialize()
    config_lib.validate(config)
    workdir = checks.local_path("workdir", workdir)
    folders = [workdir, *map(str, Path(workdir).parents)]
    # os.path.exists, unlike that of Path, also takes a name that is too long.
    new = [folder for folder in folders if not os.path.exists(folder)]
    try:
        _prepare(workdir, config)
        mesh = make_mesh(config.mesh)
        config_lib.check_batch(config, mesh.shape["data"] * mesh.shape["fsdp"])
        with contextlib.ExitStack() as stack:
            stack.enter_context(jax.set_mesh(mesh))
            stack.enter_context(_disk_errors(workdir))
            stack.enter_context(locked(workdir))
            return _train(config, workdir, mesh, stack, traced, hang_seconds)
    except BaseException:
        _remove_if_empty(new)
        raise


def _train(config, workdir, mesh, stack, traced, hang_seconds):
    task = make_task(config.task)
    config.task.update(task.binding())  # a run is bound to the weights of its tokenizer
    with within("data"):
        source = data.make_source(config.data, "train")
        _check_hosts(source, config.data)
        config.data.update(text.binding(config.data))
    if "fps" in config.data:
        config.data.fps = float(source.fps)  # sampling conditions and shows clips at this rate
    with within("task"):
        task.check(source)
        split_frames = task.split_frames(config.data.frames)
    config_lib.check_sequence(config, split_frames, mesh.shape["seq"])
    with within("optim"):
        tx, schedule = make_optimizer(config.optim, config.steps)
    checkpoints = stack.enter_context(Checkpoints(workdir, config, source.digest))
    checkpoints.check_config()
    with within("data"):
        row = data.row(source, config.data)
    shapes = _batch_of(row, config, mesh)
    with within("task"):
        init, shardings = make_init(task, tx, shapes, config, mesh)
        target = placed(jax.eval_shape(init), shardings)
        frozen = task.frozen()
    memory.check_step(task, config, target, frozen, shapes, mesh)

    clips = stack.enter_context(contextlib.closing(_iterator(config, "train", mesh)))
    validation = stack.enter_context(contextlib.closing(_iterator(config, "validation", mesh)))
    _peek(clips)
    frozen = jax.device_put(frozen, shard_params(frozen, mesh))
    held_out = HeldOut(task, config, mesh, validation)
    held_out_shapes = _batch_of(_peek(validation), config, mesh)
    checkpoints.check_best(held_out.trace(target.weights, frozen, held_out_shapes))
    found = checkpoints.restore(target, clips)
    step, state = found or (0, _begin(init, task, config))
    if jax.process_index() == 0:
        config_lib.save(config, Path(workdir, "config.json"))
    say(parameter_table(state.params, config.log.get("parameters", 2)))
    say(f"{workdir}: {'resuming at' if found else 'starting at'} step {step} of {config.steps}")

    update = make_step(task, tx, schedule, config, mesh, shardings)
    writer = stack.enter_context(
        contextlib.closing(
            Writer(workdir, step, config.log.tensorboard, data.clip_rate(config.data))
        )
    )
    guard = Guard(config.optim.skip_nonfinite, source, skipped=int(state.skipped))
    work = flops.of_step(task, state, frozen, shapes)
    trained = config.task.get("train_frames", config.data.frames)
    frames = config.data.batch_size * min(trained, config.data.frames)
    progress = Progress(config.steps, frames, work, flops.machine(mesh.devices.flatten()))
    log = Log(config, writer, progress, guard)
    sampling = f"sampling {config.sample.num} clips"
    if found:
        _catch_up(step, state, frozen, config, held_out, writer, log)

    trace = stack.enter_context(contextlib.closing(Trace(workdir, traced)))
    watchdog = stack.enter_context(contextlib.closing(Watchdog(hang_seconds)))
    while step < config.steps:
        trace.before(step)
        watchdog.step(step)
        rows = progress.next(clips)
        batch = multihost.to_global(rows, batch_sharding(mesh))
        state, metrics = update(state, frozen, batch)
        step += 1
        trace.after(step, state)
        log.push(step, metrics, rows["id"])  # settles the step before, while this one runs
        watchdog.rest()

        preempted, scores = checkpoints.preempted(step), None
        last = step == config.steps
        is_measured = last or _due(step, config.evaluate.every)
        if is_measured and not preempted:
            with log.pause(f"step {step}: evaluating"):
                scores = held_out.evaluate(state.weights, frozen)
            log.settle(scores)
        if checkpoints.due(step):
            log.settle(always=is_measured)  # so that the log never lags behind the checkpoint
            with log.pause():
                checkpoints.save(step, state, clips, scores)
        if preempted:
            say(f"{workdir}: stopped; step {step} is saved, the same command goes on from there")
            return state
        if _due(step, config.sample.every) and not last:
            with log.pause(f"step {step}: {sampling}"):
                writer.videos(step, held_out.sample(state.weights, frozen))

    say(f"step {step}: {sampling}")
    writer.videos(step, held_out.sample(state.weights, frozen))
    say(f"{workdir}: finished at step {step}")
    return state


def _check_hosts(source, fields):
    """Refuse hosts with other lists of clips: their rows would not be of one batch."""
    if not multihost.all_equal(source.listing()):
        raise UserError(
            f"path={fields.path}: the hosts found different clips ({len(source)} here); make all "
            "files readable on every host"
        )


def _catch_up(step, state, frozen, config, held_out, writer, log):
    """Catch up on the evaluation and samples of the resumed step that a stop prevented.

    The files of process 0 decide for all processes.
    """
    last = step == config.steps
    lacks_scores = (last or _due(step, config.evaluate.every)) and not writer.has_scores(step)
    lacks_videos = _due(step, config.sample.every) and not last and not writer.has_videos(step)
    lacks_scores, lacks_videos = multihost.agreed(lacks_scores, lacks_videos)
    if lacks_scores:
        say(f"step {step}: evaluating")
        log.catch_up(step, held_out.evaluate(state.weights, frozen))
    if lacks_videos:
        writer.videos(step, held_out.sample(state.weights, frozen))


def _begin(init, task, config):
    """The first state, with the weights of the run config.init_from if that is set."""
    if not config.init_from:
        return init()
    fields, _, weights = open_weights(config.init_from, config.task.name, "init_from")
    with within("task"):
        weights = task.inflate(weights, fields)
    state, taken = adopt(init(), weights)
    say(f"from {config.init_from}: {taken}")
    return state


def _prepare(workdir, config):
    """Make the work folder, test that it can be written, and set the compile cache beside it."""
    checks.writable("workdir", workdir)
    cache = config.compile_cache or str(Path(workdir).resolve().parent / "jax_cache")
    if config.compile_cache:
        checks.local_path("compile_cache", cache)
        checks.writable("compile_cache", cache)
    jax.config.update("jax_compilation_cache_dir", cache)


def _remove_if_empty(folders):
    """Remove the folders that a refused config has made, the deepest first, if they are empty."""
    for folder in [*(os.path.join(workdir, "ckpt") for workdir in folders[:1]), *folders]:
        with contextlib.suppress(OSError):  # it is not empty, or another host was faster
            os.rmdir(folder)


@contextlib.contextmanager
def _disk_errors(workdir):
    """Turns disk errors while metrics or samples are written into one line."""
    try:
        yield
    except OSError as error:
        if error.errno not in files.DISK_ERRORS:
            raise
        raise UserError(
            f"workdir={workdir}: cannot be written ({error.strerror}); checkpoints already saved "
            "are complete; make room and run the same command again"
        ) from error


def _iterator(config, split, mesh):
    """This host's rows of the split's batches."""
    index, count = multihost.batch_share(mesh)
    with within("data"):
        return data.make_iterator(
            config.data,
            split=split,
            seed=config.seed,
            batch_size=config.data.batch_size,
            process_index=index,
            process_count=count,
        )


def _peek(iterator):
    """A row of the next batch, from reading it: data that cannot be read fails right away."""
    start = iterator.get_state()
    rows = next(iterator)
    iterator.set_state(start)
    return {name: x[0] for name, x in rows.items()}


def _batch_of(row, config, mesh):
    """Shapes of a global batch of rows like this one."""
    place = batch_sharding(mesh)  # what is traced for these shapes then serves the arrays too
    size = config.data.batch_size
    return {
        name: jax.ShapeDtypeStruct((size, *x.shape), x.dtype, sharding=place)
        for name, x in row.items()
    }


def _due(step, every):
    return every > 0 and step % every == 0


def main():
    """Entry point."""
    config, workdir = cli.config_from_flags()
    traced = profile.steps_of(FLAGS.profile_steps)
    cluster = FLAGS.coordinator, FLAGS.num_processes, FLAGS.process_id
    multihost.initialize(*cluster, FLAGS.join_seconds)
    with multihost.failing_alone(), interrupt.saves():
        state = train(config, workdir, traced=traced, hang_seconds=FLAGS.hang_seconds)
    return 0 if int(state.step) >= config.steps else FLAGS.stopped_status


if __name__ == "__main__":
    cli.define_config_flags()
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if it is not detected.")
    flags.DEFINE_integer("num_processes", None, "Number of processes, if it is not detected.")
    flags.DEFINE_integer("process_id", None, "Number of this process, if it is not detected.")
    flags.DEFINE_float(
        "hang_seconds",
        SECONDS,
        "Seconds after which a step that has not ended ends the process; 0 = never.",
        lower_bound=0,
    )
    flags.DEFINE_integer(
        "join_seconds",
        None,
        f"Seconds in which all processes must start. Default: {multihost.JOIN_SECONDS}, or "
        f"{multihost.DETECTED_JOIN_SECONDS} on a detected cluster.",
        lower_bound=1,
        upper_bound=24 * 3600,
    )
    flags.DEFINE_string(
        "profile_steps", "", "Steps to trace, first:last, as 10:15; see <workdir>/profile."
    )
    flags.DEFINE_integer(
        "stopped_status",
        0,
        "Exit status after SIGTERM or Ctrl-C and a save. Launchers that start only failed jobs "
        "again want another than 0, such as 75.",
        lower_bound=0,
        upper_bound=125,
    )
    cli.run(main)

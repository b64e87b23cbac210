"""Checkpoints: train state, place in the data and config, saved as one (orbax).

<workdir>/ckpt/<step>/state    the TrainState
<workdir>/ckpt/<step>/data     state of the data iterator, the same for any number of hosts
<workdir>/ckpt/<step>/config   the config that made it
<workdir>/ckpt/<step>/digests  digests of each array, of the other two and of the clips
"""

import contextlib
import errno
import json
import logging
import math
import os
import shutil
import traceback
from pathlib import Path

import jax
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from orbax.checkpoint import checkpoint_managers as policies

from jaxvid import config as config_lib
from jaxvid.errors import UserError
from jaxvid.parallel import multihost
from jaxvid.training import digests
from jaxvid.training.log import say
from jaxvid.training.restore import PATHS, UNVERIFIED, is_free, reason, remedy


class Checkpoints:
    """The checkpoints of one run; a context manager that waits for the last save.

    Saving is asynchronous and atomic: a folder without the suffix of a temporary one is whole.
    A damaged checkpoint is passed over and renamed if an earlier one is good. Raises UserError for
    a full or read-only disk, for checkpoints of another run, and if none of them is good.
    clips: the digest of the data source, which must not change; "" where the config decides.
    """

    def __init__(self, workdir, config, clips=""):
        self.workdir, self.config, self.manager = workdir, config, None
        self.clips = clips
        self.bad = {}  # {step of a damaged checkpoint: its error}
        for name in ("absl", "asyncio"):
            logging.getLogger(name).addFilter(_not_orbax)
        keep = [policies.LatestN(config.checkpoint.keep)]
        score = _score(config) if config.checkpoint.best else None
        if score:
            keep.append(
                policies.BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
            )
        with self._one_line("open the checkpoints"):
            self._set_metrics_aside()
            self.manager = ocp.CheckpointManager(
                os.path.join(os.path.abspath(workdir), "ckpt"),
                options=ocp.CheckpointManagerOptions(
                    save_decision_policy=policies.AnySavePolicy(
                        [
                            policies.FixedIntervalPolicy(config.checkpoint.every),
                            policies.PreemptionCheckpointingPolicy(),
                        ]
                    ),
                    preservation_policy=policies.AnyPreservationPolicy(keep),
                    best_fn=score,  # makes orbax write the metrics, which then survive a restart
                    cleanup_tmp_directories=True,
                ),
            )

    def _set_metrics_aside(self):
        """Rename scores of checkpoints that cannot be read: orbax would open no checkpoint then."""
        if jax.process_index() == 0:
            for file in Path(self.workdir, "ckpt").glob("*/metrics/metrics"):
                if not _are_scores(file):
                    aside = file.parent.with_name("metrics.damaged")
                    whose = f"scores of checkpoint {file.parts[-3]}"
                    say(f"{self.workdir}: {whose} are damaged and kept as {aside}")
                    file.parent.rename(aside)
        multihost.together("scores of checkpoints")

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if error is None:
            with self._one_line("save"):
                self.manager.close()
        else:  # a save in progress may still succeed; only the first error is reported
            with contextlib.suppress(Exception):
                self.manager.close()

    def check_best(self, metrics):
        """Raise UserError if checkpoint.best is not among the names of `evaluate`'s metrics."""
        best = self.config.checkpoint.best
        if best and best.removeprefix("-") not in metrics:
            raise UserError(
                f"checkpoint.best={best}: evaluate has no such metric; choose one of "
                f"{', '.join(metrics)}, with a minus before it if less is better"
            )

    def preempted(self, step):
        """Whether SIGTERM came and all processes stop after this step; call at every step."""
        return self.manager.reached_preemption(step)

    def due(self, step):
        """Whether to save now: the interval, a preemption or the last step."""
        last = step == self.config.steps and self.manager.latest_step() != step
        return last or self.manager.should_save(step)

    def save(self, step, state, iterator, metrics=None):
        """Save in the background; returns when the state may be donated."""
        small = {"data": iterator.get_state(), "config": json.loads(self.config.to_json())}
        sums = {name: digests.of_json(value) for name, value in small.items()}
        sums |= {"state": digests.of_arrays(state), "clips": self.clips}
        items = ocp.args.Composite(
            state=ocp.args.StandardSave(state),
            digests=ocp.args.JsonSave(sums),
            **{name: ocp.args.JsonSave(value) for name, value in small.items()},
        )
        with self._one_line(f"save step {step}"):
            self.manager.wait_until_finished()
            _require_room(self.workdir, state)
            self.manager.save(step, args=items, metrics=metrics, force=True)

    def check_config(self):
        """Raise UserError if the newest readable checkpoint was made with another config."""
        for step in self._good():
            try:
                read = self._read(step, config=ocp.args.JsonRestore()).config
                saved = ConfigDict(config_lib.as_now(read))
            except Exception as error:
                self.bad[step] = error
                continue
            sums = digests.load(self.manager.directory / str(step)) or {}
            return self._compare(saved, sums.get("clips", ""))
        self._require_good("is not one of jaxvid's")

    def _compare(self, saved, clips):
        """Raise UserError if the config or clips of a checkpoint are not those of this run."""
        before, now = config_lib.flatten(saved), config_lib.flatten(self.config)
        changed, added = [], []
        has_digests = bool(clips and self.clips)
        if has_digests and clips != self.clips:
            path = self.config.data.path
            changed.append(f"data.path={path!r}: clips {clips} -> {self.clips}")
        for field, old, new in config_lib.differences(saved, self.config):
            if is_free(field):
                continue
            if field == "data.path" and has_digests:  # the clips may move
                continue
            if field in PATHS and _is_one_path(old, new):
                continue
            if field == "data.fps" and field not in before and _keeps_rate(self.config.data):
                continue
            if field in before:
                changed.append(f"{field}: {old!r} -> {repr(new) if field in now else 'no field'}")
            else:
                added.append(f"{field}: no field -> {new!r}")
        if added and not changed:
            # The run need not have behaved as the defaults of the new fields do.
            raise UserError(
                f"workdir={self.workdir}: holds a run without fields of this config "
                f"({'; '.join(added)}); resume it with the options and the version of jaxvid that "
                "began it, or choose another --workdir"
            )
        if changed := changed + added:
            raise UserError(
                f"workdir={self.workdir}: holds a run with another config "
                f"({'; '.join(changed)}); undo these changes or choose another --workdir"
            )

    def restore(self, shapes, iterator):
        """(step, state) of the newest good checkpoint, and set `iterator` to its place; or None.

        `shapes` is the TrainState as ShapeDtypeStructs with shardings, of any mesh.
        """
        items = {
            "state": ocp.args.StandardRestore(shapes),
            "data": ocp.args.JsonRestore(),
            "config": ocp.args.JsonRestore(),
        }
        for step in self._good():
            try:
                restored = self._read(step, **items)
            except Exception as error:
                self.bad[step] = error
                # An error of reading may be of one process alone, and then the others wait for it.
                if jax.process_count() > 1 and not isinstance(error, digests.DamageError):
                    break
                continue
            self._set_aside(step)
            iterator.set_state(restored.data)
            return step, restored.state
        self._require_good("does not fit this model or is damaged")

    def _good(self):
        """Steps of the checkpoints that are not known to be bad, the newest first."""
        return sorted(set(self.manager.all_steps()) - set(self.bad), reverse=True)

    def _require_good(self, complaint):
        """Raise UserError about the newest checkpoint, if there is any: none of them is good."""
        if self.bad:
            step, error = max(self.bad.items())
            raise UserError(
                f"workdir={self.workdir}: checkpoint {step} {complaint} ({reason(error)}); "
                f"{self._remedy()}"
            ) from error

    def _set_aside(self, step):
        """Rename the bad checkpoints; nothing is deleted. step: the one to go on from."""
        if not self.bad:
            return
        for bad, error in sorted(self.bad.items()):
            folder = self.manager.directory / str(bad)
            names = (f"{bad}.damaged{number}" for number in ("", *range(2, 10**6)))
            aside = next(
                folder.parent / name for name in names if not (folder.parent / name).exists()
            )
            say(
                f"{self.workdir}: checkpoint {bad} is damaged ({reason(error)}) and kept as "
                f"{aside}; going on from step {step}"
            )
            multihost.together("names of checkpoints")  # all have looked
            if jax.process_index() == 0:
                with self._one_line(f"rename checkpoint {bad}"):
                    os.rename(folder, aside)
            multihost.together("renamed checkpoint")
        self.manager.reload()

    def _read(self, step, **items):
        """Items of a checkpoint. Raises one of many errors if they cannot be read or differ."""
        found = self.manager.restore(step, args=ocp.args.Composite(**items))
        sums = digests.load(self.manager.directory / str(step))
        if sums is None:
            if "state" in items:
                say(f"{self.workdir}: checkpoint {step} {UNVERIFIED}")
            return found
        for name in items:
            if name == "state":
                digests.check_arrays(found.state, sums["state"])
            else:
                digests.check_json(name, found[name], sums)
        return found

    def _remedy(self):
        done = remedy(os.path.join(self.workdir, "ckpt"), self.manager.all_steps())
        return f"choose another --workdir, or {done}"

    @contextlib.contextmanager
    def _one_line(self, action):
        """Turns a full or read-only disk, however it is reported, into a UserError."""
        try:
            yield
        except Exception as error:
            trouble = _disk_trouble(error)
            if not trouble:
                raise
            kept = self.manager.all_steps() if self.manager else []
            kept = f"checkpoint {max(kept)} is complete" if kept else "nothing was saved yet"
            raise UserError(
                f"workdir={self.workdir}: cannot {action} ({trouble}); {kept}; "
                "make room or repair the folder and run the same command again"
            ) from error


def _are_scores(file):
    """Whether a file holds {name: number} as JSON."""
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and all(isinstance(x, int | float) for x in found.values())


def _keeps_rate(fields):
    """Whether clips keep the rate of their source, as in runs from before the field `fps`."""
    return fields.name != "folder" or not fields.fps


def _is_one_path(a, b):
    return bool(a and b) and os.path.realpath(a) == os.path.realpath(b)


def _not_orbax(record):
    """Filter for orbax, which logs each failure once per thread with its stack."""
    trace = record.exc_info[2] if record.exc_info else None
    places = [record.pathname, *(frame.filename for frame in traceback.extract_tb(trace))]
    return not any("orbax" in place for place in places)


def _score(config):
    """Function of the metrics, highest for the best: "psnr" prefers high, "-loss" low values."""
    name = config.checkpoint.best.removeprefix("-")
    sign = -1 if config.checkpoint.best.startswith("-") else 1
    if not config.evaluate.every or config.checkpoint.every % config.evaluate.every:
        raise UserError(
            f"checkpoint.best={config.checkpoint.best}: checkpoint.every={config.checkpoint.every} "
            f"must be a multiple of evaluate.every={config.evaluate.every}, so that every "
            "checkpoint is measured"
        )

    def score(metrics):
        value = sign * metrics.get(name, math.nan)
        return -math.inf if math.isnan(value) else value  # NaN is the worst

    return score


def _require_room(folder, state):
    """Raise OSError if the disk is certainly too small: orbax would fail halfway, with a traceback.

    Weights hardly compress; a fifth is allowed for compression and for zeros.
    """
    need = 0.8 * sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    free = shutil.disk_usage(folder).free
    if free < need:
        trouble = f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} MB of {need / 1e6:.1f} MB"
        raise OSError(errno.ENOSPC, trouble)


def _disk_trouble(error):
    """The disk error in a few words, from an OSError or a message of tensorstore; "" for others."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    complaints = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO, errno.EFBIG)
    return next((os.strerror(code) for code in complaints if os.strerror(code) in str(error)), "")

"""A trace of some steps, for XProf and TensorBoard."""

import re
from pathlib import Path

import jax

from jaxvid.errors import UserError
from jaxvid.training.log import say

FOLDER = "profile"
MAX_STEPS = 1000  # a trace holds every operation of every step


def steps_of(text: str) -> range | None:
    """ "10:15" -> the steps 11 to 15; None for "". Raises UserError."""
    if not text:
        return None
    match = re.fullmatch(r"(\d{1,9}):(\d{1,9})", text)
    if not match or not 0 < int(match[2]) - int(match[1]) <= MAX_STEPS:
        raise UserError(
            f"--profile_steps={text[:40]}: write first:last, such as 10:15 for the steps 11 to 15, "
            f"of up to {MAX_STEPS} steps"
        )
    return range(int(match[1]), int(match[2]))


class Trace:
    """Traces the steps `steps` of a run to <workdir>/profile/, on process 0; none without steps.

    A run that starts or ends among them has a trace of a part.
    """

    def __init__(self, workdir: str, steps: range | None):
        self._folder = Path(workdir, FOLDER)
        self._steps = steps if jax.process_index() == 0 else None
        self._is_on = False

    def before(self, step: int) -> None:
        """Call when so many steps are done, before the next one."""
        if self._steps is not None and not self._is_on and step in self._steps:
            jax.profiler.start_trace(str(self._folder))
            self._is_on = True

    def after(self, step: int, state) -> None:
        """Call when so many steps are done, with what the last of them made."""
        if self._is_on and step >= self._steps.stop:
            jax.block_until_ready(state)
            self.close()

    def close(self) -> None:
        """Write the trace, if one has begun."""
        if self._is_on:
            self._is_on, self._steps = False, None
            jax.profiler.stop_trace()
            say(f"{self._folder}: a trace; pip install xprof, then xprof --logdir={self._folder}")

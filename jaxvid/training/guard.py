"""Ends a run after too many steps in a row that were not finite."""

from jaxvid.errors import UserError

SHOWN = 32  # clips named; a large batch would fill the screen


class Guard:
    """Ends the run when more than `limit` steps in a row were skipped, naming their clips.

    The compiled step skips updates that are not finite, so the parameters stay good.
    """

    def __init__(self, limit, source, skipped=0):
        self.limit, self.source = limit, source
        self.skipped, self.streak = skipped, []

    def check(self, step, skipped, ids):
        """Check a step. skipped: count of skipped steps after it. ids: its clips on this host."""
        self.streak = [*self.streak, ids] if skipped > self.skipped else []
        self.skipped = skipped
        if len(self.streak) <= self.limit:
            return
        clips = list(dict.fromkeys(int(i) for ids in self.streak for i in ids))
        names = ", ".join(f"{i} ({self.source.name(i)})" for i in clips[:SHOWN])
        more = f" and {len(clips) - SHOWN} more" if len(clips) > SHOWN else ""
        raise UserError(
            f"optim.skip_nonfinite={self.limit}: loss or gradients were not finite in "
            f"{len(self.streak)} steps in a row, {step - len(self.streak) + 1} to {step}; "
            f"clips of these batches: {names}{more}; look at them, or lower optim.lr"
        )

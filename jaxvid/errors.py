"""The one exception that means "the user can fix this"."""

import contextlib


class UserError(ValueError):
    """Bad input. The message is one line naming the field, its value and the remedy.

    Entry points print the line without a traceback and exit with status 2.
    """


@contextlib.contextmanager
def within(section, fields):
    """Gives the field that a UserError names first, if one of `fields`, its full name in a config.

    So what knows nothing of configs can say "s=9: ...", and the user reads "task.sampler.s=9: ...".
    """
    try:
        yield
    except UserError as error:
        if str(error).partition("=")[0] not in fields:
            raise
        raise UserError(f"{section}.{error}") from error

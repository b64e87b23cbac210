"""The one exception that means "the user can fix this"."""

import contextlib


class UserError(ValueError):
    """Bad input. The message is one line: "field=value: what is wrong; the remedy".

    The field is named as the code that raises it knows it. Each caller that holds a larger section
    of the config adds its own name with `within`. Entry points print the line without a traceback
    and exit with status 2.
    """


@contextlib.contextmanager
def within(section):
    """Prefix the field that a UserError names: "s=9: ..." becomes "task.sampler.s=9: ..."."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{section}.{error}") from error

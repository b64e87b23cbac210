"""The one exception that means "the user can fix this"."""


class UserError(ValueError):
    """Bad input. The message is one line naming the field, its value and the remedy.

    Entry points print the line without a traceback and exit with status 2.
    """

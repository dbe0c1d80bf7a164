"""The one kind of error that is the user's to mend: reported in one line, without a traceback, by the command line."""


class UserError(ValueError):
    """Something asked for cannot be done as asked.

    The message says what was expected, what came, where, and what to do.
    """

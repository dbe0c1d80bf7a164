"""The one kind of error that is the user's to mend: the command line reports it in one line."""


class UserError(Exception):
    """Something asked for cannot be done as asked.

    The message says what was expected, what came, where, and what to do. It is no `ValueError`, so that no
    `except ValueError` around a reader or a parser takes it for its own.
    """

"""Errors that the user can put right."""


class UserError(Exception):
    """Something the user can put right: bad input, a missing file, a setting that does not fit.

    The message is what the user sees, without a traceback: what was found, what was expected, where, and what to do
    next.  Anything else that escapes a stage is a bug of ours and keeps its traceback.
    """


class NotFinite(UserError):
    """A number of a training is infinite or not a number."""

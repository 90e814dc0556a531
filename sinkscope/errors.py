"""The errors that sinkscope raises on purpose.

Each message is one sentence that says what was given, what was expected and what to do. The command
line prints it and exits with code 2; any other exception is a bug and keeps its traceback.
"""


class SinkscopeError(Exception):
    """Base of every error that sinkscope raises on purpose."""


class ModelError(SinkscopeError):
    """A model cannot be found, read or trusted: no package, a truncated file, NaN weights."""


class UnsupportedError(SinkscopeError):
    """This architecture or attention path does not allow an exact measurement."""


class TextError(SinkscopeError):
    """Texts or token ids cannot be measured: empty, too short, too long, ids out of range."""


class ReportError(SinkscopeError):
    """A report lacks the requested values, or cannot be read, written or merged."""


class SinkscopeWarning(UserWarning):
    """An input was corrected, or is probably not what the user intended."""

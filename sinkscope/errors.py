"""The errors that sinkscope raises on purpose.

Each message is one sentence a user can act on: what was given, what was expected, what to do.
The command line prints that sentence and exits with code 2; everything else is a bug and keeps
its traceback.
"""


class SinkscopeError(Exception):
    """Base of every error that sinkscope raises on purpose."""


class ModelError(SinkscopeError):
    """A model that cannot be found, read, or trusted: no package, a truncated file, NaN weights."""


class UnsupportedError(SinkscopeError):
    """Something that this architecture or path cannot measure exactly, so it is refused."""


class TextError(SinkscopeError):
    """Text or tokens that cannot be measured: empty, too short, too long, ids out of range."""


class ReportError(SinkscopeError):
    """A report that lacks what was asked of it, or that cannot be read, written or merged."""


class SinkscopeWarning(UserWarning):
    """Something that was put right, or that most likely is not what was meant."""

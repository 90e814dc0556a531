"""Formatting and writing of results: numbers, words, tables, JSON, and atomic file writes.

Numbers have three significant digits below 1,000 and no decimals from there on. Undefined values
are a dash on the terminal, in pages and in figures, and null in JSON.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import html
import io
import json
import math
import os
import platform
import re
import secrets
import shutil
import textwrap
import time
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any, SupportsFloat

from sinkscope.errors import ReportError

UNDEFINED = "–"
"""Text for an undefined number (nan or None)."""

# -- numbers and words ---------------------------------------------------------------------------


def number(value: SupportsFloat | None, form: str | None = None) -> str:
    """A number as text: 0.0123, 1.23, 123, 1,234, 1.2e-05.

    Args:
        value: The number; nan and None are undefined.
        form: A format specification such as ".3f", for columns whose digits line up; by default
            three significant digits below 1,000, and whole numbers with commas from there on.
    """
    if value is None or math.isnan(value := float(value)):
        return UNDEFINED
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    if form is not None:
        return format(value, form)
    rounded = float(f"{value:.3g}")
    return f"{value:,.0f}" if abs(rounded) >= 1000 else f"{value:.3g}"


def counted(n: int, noun: str) -> str:
    """A count with its noun: "1 head", "2 heads"."""
    return f"{n:,} {noun}{'' if n == 1 else 's'}"


def megabytes(n: int) -> str:
    """A number of bytes as text: "0.0123 MB", "12.3 MB", "1,234 MB"."""
    return f"{number(n / 1e6)} MB"


def listed(items: Sequence[str]) -> str:
    """Items as words: "a", "a and b", "a, b and c"."""
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def and_more(shown: Sequence[str], total: int, separator: str = ", ") -> str:
    """The shown items and the number of the others: "a, b, 3 more"."""
    rest = total - len(shown)
    return separator.join(shown) + (f"{separator}{rest} more" if rest > 0 else "")


def printable(text: str) -> str:
    """The text with control and other non-printable characters escaped, safe for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


# -- lines and tables ----------------------------------------------------------------------------

_NARROWEST, _WIDEST = 80, 100  # narrower tables would lose digits
_UNLIMITED = 10_000
_GLUE = "\ue000"  # placeholder for a no-break space, since Rich breaks lines at real ones
_width = ContextVar("width", default=_WIDEST)

_LINE = "border:0;border-bottom:1px solid rgba(128,128,128,.35);background:transparent"
_LEFT = f"{_LINE};padding:2px 12px 2px 0;text-align:left;vertical-align:top"
_RIGHT = f"{_LINE};padding:2px 10px;text-align:right;font-variant-numeric:tabular-nums"
_TABLE = "border-collapse:collapse;margin:.5em 0;color:inherit"


def line_width() -> int:
    """Maximum line length: 100 characters in files and notebooks, maybe fewer on a terminal."""
    return _width.get()


@contextlib.contextmanager
def as_wide_as_the_terminal() -> Iterator[None]:
    """Set the line width to that of the terminal, 80 to 100 columns; 100 without a terminal."""
    columns = shutil.get_terminal_size((_WIDEST, 24)).columns
    outside = _width.set(min(max(columns, _NARROWEST), _WIDEST))
    try:
        yield
    finally:
        _width.reset(outside)


def wrapped(line: str) -> str:
    """Wrap a sentence at `line_width`; continuation lines of a list item are indented."""
    if len(line) <= line_width():
        return line
    indent = " " * (len(line) - len(line.lstrip()))
    later = f"{indent}  " if indent else ""
    text = line.strip().replace(" %", "\N{NO-BREAK SPACE}%")
    lines = textwrap.fill(text, line_width(), initial_indent=indent, subsequent_indent=later)
    return lines.replace("\N{NO-BREAK SPACE}%", " %")


def facts_as_text(facts: Sequence[tuple[str, str]]) -> str:
    """Labelled sentences as text, aligned and wrapped."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for label, text in facts:
        table.add_row(Text(label), Text(re.sub(r"(?<=\d) (?=[%×])", _GLUE, text)))
    return _printed(table, line_width())


def facts_as_html(facts: Sequence[tuple[str, str]]) -> str:
    """Labelled sentences as an HTML table, which inherits the notebook's colours."""
    rows = "".join(
        f'<tr><th scope="row" style="{_LEFT};white-space:nowrap">{html.escape(label)}</th>'
        f'<td style="{_LEFT}">{html.escape(text)}</td></tr>'
        for label, text in facts
    )
    return f'<table style="{_TABLE}"><tbody>{rows}</tbody></table>'


def table_as_text(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text cells for the terminal, all but the first column right-justified.

    If it would be too wide, column titles are broken into one word per line.
    """
    from rich.cells import cell_len

    wide = _printed(_table(columns, rows), _UNLIMITED)
    if max(map(cell_len, wide.splitlines())) <= line_width():
        return wide
    broken = [re.sub(" (?!%)", "\n", column) for column in columns]
    return _printed(_table(broken, rows), line_width())


def table_as_html(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The same table for a notebook."""
    head = "".join(f'<th scope="col" style="{_RIGHT}">{html.escape(c)}</th>' for c in columns)
    body = "".join(
        "<tr>" + "".join(f'<td style="{_RIGHT}">{html.escape(cell)}</td>' for cell in row) + "</tr>"
        for row in rows
    )
    return f'<table style="{_TABLE}"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Any:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, column in enumerate(columns):
        table.add_column(Text(column), justify="right" if index else "left")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    return table


def _printed(renderable: Any, width: int) -> str:
    from rich.console import Console

    out = io.StringIO()
    console = Console(
        file=out, width=width, color_system=None, legacy_windows=False, force_jupyter=False
    )
    console.print(renderable)
    lines = [line.rstrip() for line in out.getvalue().replace(_GLUE, " ").splitlines()]
    return "\n".join(line for line in lines if line)


# -- JSON and files ------------------------------------------------------------------------------


def plain(value: Any) -> Any:
    """Convert a value to JSON types: dataclasses and named tuples to objects, tensors to lists.

    nan and inf become null.
    """
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "tolist"):  # tensors, arrays and their scalars
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def as_json(value: Any, indent: int | None = None) -> str:
    """`plain` values as JSON text."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)


def as_csv(frame: Any) -> str:
    """A pandas frame as CSV that is safe to open in a spreadsheet.

    Spreadsheets evaluate cells that begin with =, +, - or @, as the name of a file may. Such text
    is prefixed with an apostrophe, which spreadsheets do not show.
    """
    guarded = frame.rename(columns=_no_formula)
    for name in guarded.columns:
        if guarded[name].dtype.kind not in "biufc":
            guarded[name] = guarded[name].map(_no_formula)
    return guarded.to_csv(index=False)


def _no_formula(value: Any) -> Any:
    risky = isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r"))
    return f"'{value}" if risky else value


def write_file(path: str | Path, content: str | bytes) -> Path:
    """Write a file atomically: the old file stays in place until the new one is on disk.

    The content is written to a temporary file in the same folder, flushed to disk, and renamed.
    Several processes may write the same file: the last one wins, and none fails. Temporary files of
    killed processes are removed.

    Returns:
        The path.

    Raises:
        ReportError: If it cannot be written; nothing is left behind.
    """
    path = Path(path)
    unfinished = path.with_name(f"{_unfinished(path)}{os.getpid()}-{secrets.token_hex(4)}.tmp")
    data = content.encode() if isinstance(content, str) else content
    try:
        _remove_orphans(path)
        # O_EXCL: never follow a link that exists already. Permissions are those of any new file.
        handle = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(unfinished, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(unfinished)
            raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReportError(f"{path} cannot be written: {reason}.") from error
    return path


@contextlib.contextmanager
def locked(path: str | Path, busy: Exception | None = None) -> Iterator[None]:
    """Hold the lock on a file or folder while results are written there.

    The lock is released when the process ends, even if it is killed, and is reentrant within a
    process.

    Args:
        path: A file, which need not exist yet, or an existing folder.
        busy: Exception to raise instead if another process holds the lock.

    Raises:
        ReportError: If another process holds the lock, or no lock can be made there.
    """
    from filelock import FileLock, Timeout

    path = Path(path).resolve()
    beside = path / ".lock" if path.is_dir() else path.with_name(f".{path.name[:200]}.lock")
    if beside.is_symlink():
        raise ReportError(f"{beside} is a link and not a lock; remove it.")
    lock = FileLock(beside, timeout=0, is_singleton=True)
    try:
        lock.acquire()
    except Timeout as error:
        raise busy or ReportError(
            f"Another process is writing to {path}; wait until it has ended, or name another place."
        ) from error
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReportError(f"{path} cannot be written: {reason}.") from error
    try:
        yield
    finally:
        lock.release()


_ORPHANED_AFTER = 24 * 3600  # seconds; processes of other machines cannot be checked


def _unfinished(path: Path) -> str:
    """Prefix of the names of a file's temporary files, with an identifier of this machine."""
    machine = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
    return f".{path.name[:150]}.{machine}-"


def _remove_orphans(path: Path) -> None:
    """Remove temporary files whose process is dead, or that have not been written to for a day."""
    mine = _unfinished(path)
    pattern = re.compile(re.escape(f".{path.name[:150]}.") + r"[0-9a-f]{8}-(\d+)-[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError), os.scandir(path.parent) as entries:
        for entry in entries:
            if (match := pattern.fullmatch(entry.name)) is None:
                continue
            with contextlib.suppress(OSError):
                old = time.time() - entry.stat(follow_symlinks=False).st_mtime > _ORPHANED_AFTER
                here = entry.name.startswith(mine) and os.name == "posix"
                if not _is_running(int(match[1])) if here else old:
                    os.unlink(entry.path)


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)  # signal 0 sends nothing and only checks that the process exists
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True  # the process of another user
    return True

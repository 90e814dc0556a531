"""Options and helpers that several commands use: texts, output folders, JSON on stdout."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import signal
import sys
import tempfile
import threading
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.errors import ReportError, SinkscopeError, SinkscopeWarning, TextError
from sinkscope.output import as_json, as_wide_as_the_terminal, locked

if TYPE_CHECKING:
    from typer import Context

    from sinkscope.prompts.recipes import TextSource
    from sinkscope.prompts.tokens import Texts as Tokens
else:
    Context = typer.Context.__base__  # the class of the object that typer passes

Model = Annotated[
    str,
    typer.Argument(
        help="A packaged model (see `sinkscope models`), a Hub id, a folder, or a .gguf file."
    ),
]
Device = Annotated[str | None, typer.Option(help="Default: cuda if available.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32 (the default), bfloat16, float16, or auto: the checkpoint's own."),
]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; created if missing.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Texts = Annotated[str, typer.Option("--texts", help="prose, code, a file, or hf:owner/name:split.")]
Prompts = Annotated[int, typer.Option(min=1, help="Number of prompts.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of each prompt, BOS included.")]
Bos = Annotated[str, typer.Option(help="auto, always, never, or random (an ordinary first token).")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the random cuts of the texts.")]


def listed(option: str) -> tuple[str, ...]:
    """Split a comma-separated option into names."""
    return tuple(name.strip() for name in option.split(",") if name.strip())


def some(option: str, text: str) -> tuple[str, ...]:
    """Split a comma-separated option into at least one name.

    Raises:
        SinkscopeError: If there is none.
    """
    if names := listed(text):
        return names
    raise SinkscopeError(f"{option} {text!r} names nothing; see --help for what it takes.")


def numbers(option: str, text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers.

    Raises:
        SinkscopeError: If they are not.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise SinkscopeError(
            f"{option} {text} should be whole numbers separated by commas, such as 0,4."
        ) from None


RECIPE = ("prompts", "length", "bos", "seed")
"""Options that say how prompts are made of text."""


def prompts_of(
    context: Context, texts: str, void: tuple[str, ...] = RECIPE, **recipe: Any
) -> TextSource | Tokens:
    """Return the texts of --texts: a recipe, or the exact token ids of a .json file.

    Args:
        context: The command's.
        texts: The option.
        void: Options that have no effect on exact ids.
        recipe: What `texts` takes.

    Raises:
        TextError: If there is no such text, or an option is given that has no effect.
    """
    import sinkscope as ss

    return exact_ids(context, texts, void) if is_exact(texts) else ss.texts(texts, **recipe)


def exact_ids(context: Context, file: str | Path, void: tuple[str, ...]) -> Tokens:
    """Read token ids from a file, unless an option is given that has no effect on them.

    Raises:
        TextError: If there is no such file, or one of these options is given.
    """
    import sinkscope as ss

    ids = ss.read_token_ids(file)
    refuse_beside_ids(context, str(file), void)
    return ids


def is_exact(texts: str) -> bool:
    """Return whether --texts is a file of exact token ids."""
    return Path(texts).suffix == ".json"


def refuse_beside_ids(context: Context, ids: str, void: tuple[str, ...]) -> None:
    """Refuse options that were given on the command line but have no effect on exact token ids.

    Raises:
        TextError: If there are any.
    """
    if given := [f"--{name}" for name in void if _given(context, name)]:
        raise TextError(
            f"{ids} holds exact token ids, which are used as they are; leave out "
            f"{', '.join(given)}."
        )


def _given(context: Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name == "COMMANDLINE"


@contextlib.contextmanager
def terminal() -> Iterator[None]:
    """Make output printable in the terminal's encoding, and let SIGTERM end the command cleanly.

    Characters that the terminal's encoding lacks are replaced, and sinkscope's own warnings are one
    line. SIGTERM raises SystemExit, so that nothing half-written is left.
    """
    codecs.register_error("sinkscope", _in_ascii)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="sinkscope")
    shown = warnings.showwarning
    warnings.showwarning = functools.partial(_show_warning, shown)
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main else None
    try:
        yield
    finally:
        warnings.showwarning = shown
        if in_main:
            signal.signal(signal.SIGTERM, before)


_LOOKALIKES = str.maketrans(
    {"–": "-", "—": "-", "−": "-", "─": "-", "━": "-", "│": "|", "×": "x", "→": ">", "…": "~"}
    | {"ε": "e", "‖": "|", "≥": ">=", "≤": "<=", "∞": "inf", "Δ": "d", "ρ": "rho"}
)


def _in_ascii(error: UnicodeError) -> tuple[str, int]:
    """Replace a character that the terminal's encoding lacks by a lookalike, or by its escape."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    text = error.object[error.start : error.end].translate(_LOOKALIKES)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def _show_warning(otherwise: Any, message: Any, category: Any, *where: Any, **rest: Any) -> None:
    if issubclass(category, SinkscopeWarning):
        typer.secho(f"sinkscope: {message}", fg="yellow", err=True)
    else:
        otherwise(message, category, *where, **rest)


def _terminate(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


@contextlib.contextmanager
def interruptible(kept: Path | None) -> Iterator[None]:
    """After Ctrl-C, say that the same command continues from the saved results, if any."""
    try:
        yield
    except KeyboardInterrupt:
        if kept is not None and kept.exists():
            typer.echo(f"Interrupted; the same command continues from {kept}.", err=True)
        raise


def locked_folder(out: Path | None) -> contextlib.AbstractContextManager[None]:
    """Lock --out, so that no other process writes there meanwhile."""
    return contextlib.nullcontext() if out is None else locked(out)


def writable_folder(out: Path | None, option: str = "--out") -> Path | None:
    """Create the folder and check that it is writable, before any long computation.

    Raises:
        ReportError: If it cannot.
    """
    if out is None:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ReportError(
            f"{option} {out} cannot be written to ({reason}); name a folder that can."
        ) from error
    return out


def page_to_write(option: str, page: Path) -> Path:
    """The file of a page, if it has the name of one: it must not replace a report or a text.

    Its folder is created if missing.

    Raises:
        SinkscopeError: If it ends otherwise, or its folder cannot be written to.
    """
    if page.suffix != ".html":
        raise SinkscopeError(f"{option} {page} should end in .html.")
    writable_folder(page.parent, option)
    return page


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, with nan and infinity as null."""
    sys.stdout.write(as_json(value) + "\n")


def show(result: Any) -> None:
    """Print a result's summary, with tables as wide as the terminal."""
    with as_wide_as_the_terminal():
        typer.echo(repr(result))


def tell(result: Any, written: Iterable[Path], json: bool, remark: str = "") -> None:
    """Print a result: one JSON object, or its summary, a remark, and the files written."""
    if json:
        print_json(result.to_dict())
        return
    show(result)
    if remark:
        typer.echo(remark)
    for file in written:
        typer.echo(f"wrote {file}")


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Redirect everything printed to stderr, so that stdout contains only the JSON."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def progress_wanted() -> bool:
    """Return whether to draw progress bars: only on a terminal, not in pipes and logs."""
    return sys.stderr.isatty()

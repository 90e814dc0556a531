"""What several commands share: options, folders to write to, JSON on stdout."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from sinkscope._width import as_wide_as_the_terminal
from sinkscope.errors import ReportError

Model = Annotated[
    str,
    typer.Argument(
        help="A packaged model (see `sinkscope models`), a Hub id, a folder, or a .gguf file."
    ),
]
Device = Annotated[str | None, typer.Option(help="Default: cuda where there is one.")]
Dtype = Annotated[
    str | None,
    typer.Option(help="float32 (the default), bfloat16, float16, or auto: the checkpoint's own."),
]
Out = Annotated[Path | None, typer.Option(help="Folder to write to; made if it is not there.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Texts = Annotated[str, typer.Option("--texts", help="prose, code, a file, or hf:owner/name:split.")]
Prompts = Annotated[int, typer.Option(min=1, help="How many prompts.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of each prompt, BOS included.")]
Bos = Annotated[str, typer.Option(help="auto, always, never, or random (an ordinary first token).")]
Seed = Annotated[int, typer.Option(help="Where the texts are cut.")]


def writable_folder(out: Path | None) -> Path | None:
    """Make the folder and prove that it can be written to, before any long work.

    Raises:
        ReportError: If it cannot.
    """
    if out is None:
        return None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise ReportError(
            f"--out {out} cannot be written to ({error.strerror}); name a folder that can."
        ) from error
    return out


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: a reader never meets half of one.

    Raises:
        ReportError: If it cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.chmod(name, 0o666 & ~_umask())
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise ReportError(f"{path} cannot be written ({error.strerror}).") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def print_json(value: Any) -> None:
    """One JSON object on stdout; nan and infinity must be gone by now."""
    sys.stdout.write(json.dumps(value, allow_nan=False) + "\n")


def show(found: Any) -> None:
    """Print a result in words and tables that the terminal shows whole."""
    with as_wide_as_the_terminal():
        typer.echo(repr(found))


def finite(value: Any) -> Any:
    """The same value with nan and infinity, which JSON has not, as None."""
    if isinstance(value, dict):
        return {name: finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


@contextlib.contextmanager
def quiet_stdout() -> Iterator[None]:
    """Send whatever libraries print to stderr, so that stdout holds the JSON alone."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def progress_wanted() -> bool:
    """Bars are for people: not in pipes and logs."""
    return sys.stderr.isatty()

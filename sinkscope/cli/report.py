"""`sinkscope report` and `sinkscope compare`: print a saved report, or compare two."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import ReportError
from sinkscope.output import write_file

File = Annotated[Path, typer.Argument(help="A report.nc that `sinkscope scan --out` wrote.")]
Page = Annotated[
    Path | None,
    typer.Option(help="File of the page; default: beside the report, with the suffix .html."),
]


def report(file: File, page: Page = None, json: common.Json = False) -> None:
    """Print a saved report and write its page; no model is loaded."""
    import sinkscope as ss

    target = common.page_to_write("--page", page or file.with_suffix(".html"))
    if target.absolute() == file.absolute():
        raise ReportError(f"The page would replace the report {file} itself; give it --page.")
    loaded = ss.load_report(file)
    if json:
        common.print_json(loaded.to_dict())
        return
    written = write_file(target, loaded.to_html())
    common.show(loaded)
    typer.echo(f"wrote {written}")


def compare(
    before: File,
    after: File,
    page: Annotated[
        Path | None, typer.Option(help="Also write a page with the changes to this .html file.")
    ] = None,
) -> None:
    """Compare two saved reports of the same tokens: what changed, and where most."""
    import sinkscope as ss

    target = None if page is None else common.page_to_write("--page", page)
    comparison = ss.compare(ss.load_report(before), ss.load_report(after))
    common.show(comparison)
    if target is not None:
        typer.echo(f"wrote {write_file(target, comparison.to_html())}")

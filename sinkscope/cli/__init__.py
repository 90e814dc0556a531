"""The `sinkscope` command: each subcommand is a thin layer over the public Python functions.

Nothing heavy is imported before a command runs, so that `--help` is fast.
"""

from __future__ import annotations

import sys
import warnings

import typer

from sinkscope.cli import (
    _common,
    bb,
    bench,
    dormant,
    dynamics,
    examples,
    experts,
    life,
    models,
    positions,
    precision,
    report,
    scan,
    spikes,
    stream,
    sweep,
    trace_peak,
    transplant,
    vocabulary,
    waiver,
)


class InOrder(typer.core.TyperGroup):
    """Command group that lists `models` and `scan` first, which a new user needs first."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands in that order."""
        names = super().list_commands(ctx)
        first = [name for name in ("models", "scan") if name in names]
        return [*first, *(name for name in names if name not in first)]


app = typer.Typer(
    name="sinkscope",
    help="Measure, explain and control attention sinks in transformer models.",
    cls=InOrder,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # paragraphs are filled as wide as the terminal is
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(models.app, name="models")
app.command("scan")(scan.scan)
app.command("report")(report.report)
app.command("compare")(report.compare)
app.command("waiver")(waiver.waiver)
app.command("dormant")(dormant.dormant)
app.command("dynamics")(dynamics.dynamics)
app.command("trace-peak")(trace_peak.trace_peak)
app.command("vocabulary")(vocabulary.vocabulary)
app.command("life")(life.life)
app.command("experts")(experts.experts)
app.command("spikes")(spikes.spikes)
app.command("transplant")(transplant.transplant)
app.command("precision")(precision.precision)
app.command("positions")(positions.positions)
app.command("stream")(stream.stream)
app.command("sweep")(sweep.sweep)
app.command("atlas")(sweep.atlas)
app.command("bench")(bench.bench)
app.add_typer(bb.app, name="bb")


@app.callback(invoke_without_command=True)
def _root(
    version: bool = typer.Option(False, "--version", help="Print the version and stop."),
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(installed("sinkscope"))
        raise typer.Exit


examples.add_to(app)


def main() -> None:
    """Run the command; sinkscope's own errors end with one sentence and exit code 2.

    Ctrl-C ends with exit code 130; the command then reports which results were saved.
    """
    from sinkscope.errors import SinkscopeError

    # Notices from one library to the developers of another, on which a user cannot act.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(?!sinkscope\b)")
    try:
        with _common.terminal():
            app()
    except SinkscopeError as error:
        typer.secho(f"sinkscope: {error}", fg="red", err=True)
        sys.exit(2)

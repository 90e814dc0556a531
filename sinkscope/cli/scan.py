"""`sinkscope scan`: measure a model and show where its sinks are."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import SinkscopeError, TextError
from sinkscope.output import as_csv, listed, megabytes, write_file

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

PER_HEAD = ("prompt", "layer", "head")
REPORT, HEADS, PAGE = "report.nc", "heads.csv", "report.html"


def scan(
    context: common.Context,
    model: common.Model,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 16,
    length: common.Length = 256,
    tokens: Annotated[
        Path | None,
        typer.Option(
            help="JSON file with a list of lists of token ids, which are used as they are."
        ),
    ] = None,
    bos: common.Bos = "auto",
    metrics: Annotated[
        str, typer.Option(help="Comma-separated: all, core, or names of metrics.")
    ] = "all",
    sinks: Annotated[str, typer.Option(help="Comma-separated positions, or auto.")] = "0",
    epsilon: Annotated[float, typer.Option(help="Threshold of the sink rate.")] = 0.3,
    attention: Annotated[
        str, typer.Option(help="How attention is computed: auto, streaming, or eager.")
    ] = "auto",
    nulls: Annotated[
        int,
        typer.Option(
            min=0,
            help="Number of draws of each null: model at initialisation, random positions, "
            "shuffled keys.",
        ),
    ] = 0,
    nulls_seed: Annotated[int, typer.Option(min=0, help="Seed of these draws.")] = 0,
    path: Annotated[str | None, typer.Option(hidden=True)] = None,
    batch: Annotated[
        int | None, typer.Option(min=1, help="Prompts per pass; default: auto.")
    ] = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    devices: Annotated[
        str | None,
        typer.Option(
            help="Divide the prompts between these, such as cuda:0,cuda:1; instead of --device."
        ),
    ] = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure every head of a model in one pass and show where its sinks are.

    With --out, writes report.nc (everything, labelled), heads.csv (one row per prompt, layer and
    head; left out where no metric is per head) and report.html (interactive, one file).
    """
    folder = common.writable_folder(out)
    where = sink_positions(sinks)
    places = None if devices is None else common.some("--devices", devices)
    if places and device is not None:
        raise SinkscopeError(
            f"--device {device} and --devices {devices} are both given; leave one of them out."
        )
    with common.quiet_stdout(), interruptible(folder), common.locked_folder(folder):
        import sinkscope as ss

        source = (
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed)
            if tokens is None
            else common.exact_ids(context, tokens, ("texts", *common.RECIPE))
        )
        loaded = ss.load_model(model, device=places[0] if places else device, dtype=dtype)
        report = ss.scan(
            loaded,
            source,
            metrics=common.some("--metrics", metrics),
            sinks=where,
            epsilon=epsilon,
            attention=attention,
            nulls=nulls,
            nulls_seed=nulls_seed,
            devices=places,
            path=path,
            batch=batch or "auto",
            progress=common.progress_wanted(),
        )
        written = write(report, folder, loaded) if folder is not None else []
    if json:
        common.print_json(report.to_dict())
        return
    common.show(report)
    if report.settings.length == 1:
        typer.echo(
            "Every prompt is a single token, which can attend to nothing but itself, so these "
            "numbers say nothing about sinks; use a --length of 2 or more."
        )
    for file in written:
        typer.echo(f"wrote {file}, {megabytes(file.stat().st_size)}")
    if folder is not None and folder / HEADS not in written:
        typer.echo(f"no {HEADS}: none of the metrics {metrics} has a value for every head")


def sink_positions(text: str) -> Any:
    """Parse the --sinks option: "auto", or comma-separated positions.

    Raises:
        TextError: If it is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return tuple(int(position) for position in text.split(","))
    except ValueError:
        raise TextError(
            f"--sinks {text} is neither auto nor positions separated by commas, such as 0,255."
        ) from None


@contextlib.contextmanager
def interruptible(folder: Path | None) -> Iterator[None]:
    """After Ctrl-C, say which files were written: a scan writes them when all is measured."""
    before = _stamps(folder)
    try:
        yield
    except KeyboardInterrupt:
        after = _stamps(folder)
        if new := [name for name, stamp in after.items() if before.get(name) != stamp]:
            kept = f"{listed(new)} in {folder} were written, the other files of this scan were not"
        elif after:
            kept = f"{listed(list(after))} in {folder} are of an earlier scan"
        else:
            kept = "nothing was saved: a scan writes its files when all is measured"
        typer.echo(f"Interrupted; {kept}.", err=True)
        raise


def _stamps(folder: Path | None) -> dict[str, int]:
    files = [] if folder is None else [folder / name for name in (REPORT, HEADS, PAGE)]
    return {file.name: file.stat().st_mtime_ns for file in files if file.is_file()}


def write(report: SinkReport, folder: Path, model: Any) -> list[Path]:
    """Write the files of a scan, and remove the table of heads of an earlier one.

    If no metric has a value per head, there is no table of heads. The page also shows attention
    patterns, for which the model runs once more on two prompts.
    """
    from sinkscope.capture.patterns import head_patterns

    report.save(folder / REPORT)
    if per_head := report.measured(*PER_HEAD):
        write_file(folder / HEADS, as_csv(report.to_frame(*per_head)))
    else:
        (folder / HEADS).unlink(missing_ok=True)
    write_file(folder / PAGE, report.to_html(head_patterns(model, report)))
    return [folder / name for name in (REPORT, *([HEADS] if per_head else []), PAGE)]

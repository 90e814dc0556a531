"""`sinkscope scan`: measure a model and show where its sinks are."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import TextError
from sinkscope.output import write_file

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport

PER_HEAD = ("prompt", "layer", "head")
HEADS = "heads.csv"


def scan(
    context: common.Context,
    model: common.Model,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 16,
    length: common.Length = 256,
    tokens: Annotated[
        Path | None,
        typer.Option(help="JSON file, a list of lists of token ids; nothing is added to them."),
    ] = None,
    bos: common.Bos = "auto",
    metrics: Annotated[
        str, typer.Option(help="all, core, names, or several of these with commas between them.")
    ] = "all",
    sinks: Annotated[str, typer.Option(help="Positions with commas between them, or auto.")] = "0",
    epsilon: Annotated[float, typer.Option(help="Threshold of the sink rate.")] = 0.3,
    attention: Annotated[
        str, typer.Option(help="How attention is read: auto, streaming, or eager.")
    ] = "auto",
    path: Annotated[str | None, typer.Option(hidden=True)] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Prompts a pass; default: auto.")] = None,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure every head of a model in one pass and show where its sinks are.

    With --out, writes report.nc (everything, labelled), heads.csv (one row a prompt, layer and
    head; left out where no metric is per head) and report.html (interactive, one file).
    """
    folder = common.writable_folder(out)
    where = sink_positions(sinks)
    with common.quiet_stdout():
        import sinkscope as ss

        source = (
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed)
            if tokens is None
            else common.exact_ids(context, tokens, ("texts", *common.RECIPE))
        )
        loaded = ss.load_model(model, device=device, dtype=dtype)
        report = ss.scan(
            loaded,
            source,
            metrics=common.some("--metrics", metrics),
            sinks=where,
            epsilon=epsilon,
            attention=attention,
            path=path,
            batch=batch or "auto",
            progress=common.progress_wanted(),
        )
        written = write(report, folder, loaded) if folder is not None else []
    if json:
        common.print_json(report.to_dict())
        return
    common.show(report)
    for file in written:
        typer.echo(f"wrote {file}")
    if folder is not None and folder / HEADS not in written:
        typer.echo(f"no {HEADS}: none of the metrics {metrics} has a figure for every head")


def sink_positions(text: str) -> Any:
    """The --sinks option: "auto", or positions with commas between them.

    Raises:
        TextError: If it is neither.
    """
    if text == "auto":
        return "auto"
    try:
        return tuple(int(position) for position in text.split(","))
    except ValueError:
        raise TextError(
            f"--sinks {text} is neither auto nor positions with commas between them, such as 0,255."
        ) from None


def write(report: SinkReport, folder: Path, model: Any) -> list[Path]:
    """Write what a scan leaves in its folder; without any figure per head, no table of heads.

    The page also shows attention patterns, for which the model runs once more on two prompts.
    """
    from sinkscope.capture.patterns import head_patterns

    report.save(folder / "report.nc")
    written = [folder / "report.nc"]
    if per_head := report.measured(*PER_HEAD):
        write_file(folder / HEADS, report.to_frame(*per_head).to_csv(index=False))
        written.append(folder / HEADS)
    write_file(folder / "report.html", report.to_html(head_patterns(model, report)))
    return [*written, folder / "report.html"]

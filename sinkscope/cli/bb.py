"""`sinkscope bb`: train toy models on the Bigram-Backcopy task and follow the sink they form."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from sinkscope.bb.config import ATTENTIONS
from sinkscope.cli import _common as common
from sinkscope.errors import SinkscopeError
from sinkscope.output import as_csv, number, write_file

LAWS_FROM = 200
"""First step that is used to fit growth laws."""

app = typer.Typer(help="Grow an attention sink: train, compare mitigations, draw the curves.")

OPERATORS = ", ".join(ATTENTIONS)
Attention = Annotated[str, typer.Option(help=f"One of {OPERATORS}.")]
Optimizer = Annotated[str, typer.Option(help="adamw, sgd, or muon.")]
Layers = Annotated[int, typer.Option(min=1, help="Blocks.")]
Heads = Annotated[int, typer.Option(min=1, help="Heads of each block.")]
Steps = Annotated[
    int | None,
    typer.Option(min=1, help="Optimiser steps; default: 2,000, or 10,000 with --paper."),
]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the initial weights and of every batch.")]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="The paper's settings (for a GPU) instead of the small default ones."
    ),
]
Text = Annotated[
    Path | None,
    typer.Option(
        "--text",
        help="UTF-8 text file in which to count the task's bigrams (the paper: tinyshakespeare); "
        "default: the English counts that come with sinkscope.",
    ),
]
Triggers = Annotated[
    int,
    typer.Option(
        "--triggers", "-k", min=0, help="Number of most frequent characters that are triggers."
    ),
]


@app.command()
def train(
    attention: Attention = "softmax",
    optimizer: Optimizer = "adamw",
    layers: Layers = 1,
    heads: Heads = 1,
    steps: Steps = None,
    seed: Seed = 42,
    text: Text = None,
    triggers: Triggers = 3,
    paper: Paper = False,
    snapshots: Annotated[
        str,
        typer.Option(
            help="Comma-separated steps after which the weights are also saved in --out, for "
            "`sinkscope dynamics`."
        ),
    ] = "",
    device: common.Device = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Train one model and report whether it forms a sink, a drain and a peak.

    With --out, the run is saved there, and the same command resumes it.
    """
    kept = _steps(snapshots, out)
    folder = common.writable_folder(out)
    with common.quiet_stdout():
        from sinkscope import bb
        from sinkscope.bb import curves
        from sinkscope.bb.comparison import headline
        from sinkscope.bb.run_folder import CHECKPOINT

        config = _config(paper, layers, heads, steps, triggers).replace(
            attention=attention, optimizer=optimizer, learning_rate=_rate(paper, optimizer),
            seed=seed, snapshots=kept,
        )  # fmt: skip
        source = _source(text)
        with common.interruptible(None if folder is None else folder / CHECKPOINT):
            run = bb.train(
                config, folder, source=source, device=device, progress=common.progress_wanted()
            )
        values = headline(run.to_frame())
    if json:
        common.print_json(values)
        return
    title = f"{curves.run_name(config)}, seed {seed}, step {values['step']:,}"
    _print_rows(_in_words(values), title)


@app.command()
def compare(
    attention: Annotated[
        str, typer.Option(help=f"Comma-separated: all, or some of {OPERATORS}.")
    ] = "softmax,relu",
    optimizer: Annotated[str, typer.Option(help="Comma-separated: adamw, sgd, muon.")] = "adamw",
    seeds: Annotated[int, typer.Option(min=1, help="Number of seeds for each combination.")] = 3,
    layers: Layers = 3,
    heads: Heads = 1,
    steps: Steps = None,
    text: Text = None,
    triggers: Triggers = 3,
    paper: Paper = False,
    device: common.Device = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Train models with every mitigation, and report which phenomena each removes, over seeds."""
    folder = common.writable_folder(out)
    with common.quiet_stdout():
        from sinkscope import bb

        names = list(bb.ATTENTIONS) if attention == "all" else common.some("--attention", attention)
        optimizers = common.some("--optimizer", optimizer)
        config, source = _config(paper, layers, heads, steps, triggers), _source(text)
        with common.interruptible(folder):
            runs = bb.compare(
                names,
                optimizers,
                range(42, 42 + seeds),
                config=config,
                rates={name: _rate(paper, name) for name in optimizers},
                folder=folder,
                source=source,
                device=device,
                progress=common.progress_wanted(),
            )
        table = bb.summarise(runs)
        if folder is not None:
            write_file(folder / "runs.csv", as_csv(runs))
            write_file(folder / "summary.csv", as_csv(table))
    rows = table.to_dict("records")
    if json:
        common.print_json({"runs": runs.to_dict("records"), "summary": rows})
        return
    _print_rows(_a_row_each(rows), f"present? mean over {seeds} seeds, 95 % interval")


@app.command()
def dynamics(
    runs: Annotated[list[Path], typer.Argument(help="Folders that `bb train --out` wrote.")],
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Plot the curves of training runs, with growth laws fitted to them."""
    folder = common.writable_folder(out)
    with common.quiet_stdout():
        import pandas as pd

        from sinkscope import bb, plot

        curves = bb.dynamics(runs)
        every = bb.dynamics(runs, metrics=None)
        fits, laws = [], []
        for pair, log in every.groupby(["run", "seed"], sort=False):
            run, seed = cast("tuple[str, int]", pair)
            last = int(log["step"].to_numpy().max())
            if last < 2 * LAWS_FROM:
                raise SinkscopeError(
                    f"Run {run} of seed {seed} ends at step {last}; growth laws are "
                    f"asymptotic and need at least {2 * LAWS_FROM} steps."
                )
            fitted, law = bb.growth_laws(log, start=LAWS_FROM)
            fits.append(fitted.assign(run=run, seed=seed))
            laws.append(law.assign(run=run))
        fit = pd.concat(fits, ignore_index=True)
        if folder is not None:
            figure = plot.training_curves(
                curves, about="Bigram-Backcopy", laws=pd.concat(laws, ignore_index=True)
            )
            plot.save(figure, folder / "dynamics.html")
            write_file(folder / "curves.csv", as_csv(curves))
            write_file(folder / "laws.csv", as_csv(fit))
    rows = fit.to_dict("records")
    if json:
        common.print_json({"laws": rows})
        return
    _print_rows(
        [
            {
                "curve": f"{row['metric']}, layer {row['layer']}",
                "law": row["law"],
                "slope": row["slope"],
                "95 %": _interval(row["slope_low"], row["slope_high"], ".3g"),
                "R²": row["r_squared"],
                "run": f"{row['run']}, seed {row['seed']}",
            }
            for row in rows
        ],
        f"laws fitted from step {LAWS_FROM} on, best first",
    )


def _steps(snapshots: str, out: Path | None) -> tuple[int, ...]:
    """Parse the steps of --snapshots.

    Raises:
        SinkscopeError: If they are not numbers, or --out is missing.
    """
    names = common.listed(snapshots)
    if not all(name.isdecimal() for name in names):
        raise SinkscopeError(
            f"--snapshots {snapshots} names no steps; expected steps such as 50,100,500."
        )
    if names and out is None:
        raise SinkscopeError("--snapshots needs --out, the folder that the files are written to.")
    return tuple(map(int, names))


def _in_words(values: dict[str, int | float]) -> list[dict[str, Any]]:
    """Return the values at the end of a run as rows of a table."""
    layers = {name: values[f"{name}_layer"] for name in ("sink", "drain", "peak")}
    layers = {name: "–" if layer < 0 else layer for name, layer in layers.items()}
    rows = (
        ("attention to BOS of non-trigger queries, largest of any head", "sink", ""),
        ("… as a share of that head's attention to all positions", "sink_share", ""),
        ("… logit of BOS minus the other keys' mean", "gap", "logit"),
        ("… off-sequence mass of that head", "spare", ""),
        ("value norm of BOS / mean of the others, smallest of any head", "drain", "×"),
        ("residual norm of BOS / median of the others, largest layer", "peak", "×"),
        ("… that norm at the end / halfway", "growth", "×"),
        ("backcopy risk minus the Bayes optimum", "backcopy_excess", "nat"),
        ("bigram risk minus the Bayes optimum", "bigram_excess", "nat"),
    )
    return [
        {
            "at the end of training": text,
            "layer": layers.get(name, ""),
            "value": f"{number(values[name], '.3g')} {unit}".rstrip(),
        }
        for text, name, unit in rows
    ]


def _a_row_each(summary: list[dict[str, Any]]) -> list[dict[str, str]]:
    """Return one row per attention and optimiser, with one column per phenomenon."""
    rows: dict[str, dict[str, str]] = {}
    for cell in summary:
        name = f"{cell['attention']} {cell['optimizer']}"
        row = rows.setdefault(name, {"run": name})
        ends = _interval(cell["low"], cell["high"], ".2f")
        row[cell["phenomenon"]] = f"{cell['present']}, {number(cell['mean'], '.2f')}\n{ends}"
    return list(rows.values())


def _interval(low: float, high: float, form: str) -> str:
    return number(low, form) if math.isnan(low) else f"{low:{form}} to {high:{form}}"


def _config(paper: bool, layers: int, heads: int, steps: int | None, triggers: int) -> Any:
    from sinkscope.bb import TrainConfig

    config = TrainConfig() if paper else TrainConfig.classroom()
    steps = config.steps if steps is None else steps
    return config.replace(layers=layers, heads=heads, steps=steps, triggers=triggers)


def _source(text: Path | None) -> Any:
    """Return the bigram source of --text; None for the one that comes with sinkscope."""
    from sinkscope.bb import BigramSource

    return None if text is None else BigramSource.from_file(text)


def _rate(paper: bool, optimizer: str) -> float | None:
    """Return the learning rate for the model's size; None for the optimiser's default."""
    from sinkscope.bb.comparison import classroom_rates

    rates = classroom_rates()
    if optimizer not in rates:
        raise SinkscopeError(f"--optimizer {optimizer} is not one of {', '.join(rates)}.")
    return None if paper else rates[optimizer]


def _print_rows(rows: list[dict[str, Any]], title: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(*(str(name) for name in rows[0]), title=title)
    for row in rows:
        cells = (number(v, ".4g") if isinstance(v, float) else str(v) for v in row.values())
        table.add_row(*cells)
    Console().print(table)

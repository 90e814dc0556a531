"""`sinkscope sweep` and `sinkscope atlas`: many measurements, and one page of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import SinkscopeError
from sinkscope.output import counted, listed
from sinkscope.validation import path


def sweep(
    file: Annotated[
        Path, typer.Argument(help="YAML file with the arguments of `ss.sweep`: models, texts, ….")
    ],
    out: Annotated[
        str | None, typer.Option(help="Folder or URL for the cells, instead of the file's.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=0, help="Worker processes; 0: measure in this one.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            help="Measure on Ray: local, auto (the cluster of this machine), or an address."
        ),
    ] = None,
    num_gpus: Annotated[
        float | None, typer.Option(min=0, help="On Ray: GPUs per worker; 0.5 puts two on one GPU.")
    ] = None,
    device: common.Device = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the plan and the memory it needs, and stop.")
    ] = False,
    json: common.Json = False,
) -> None:
    """Measure every model on every text at every length, saving each as soon as it is measured.

    After an interruption the same command continues with the missing cells. Failed cells record the
    reason, and the exit code is then 1.
    """
    given: dict[str, Any] = {"out": out, "workers": workers, "ray": ray, "num_gpus": num_gpus}
    given["device"] = device
    with common.quiet_stdout():
        from sinkscope.sweeps.cell import FAILED
        from sinkscope.sweeps.grid import read_file
        from sinkscope.sweeps.run import plan
        from sinkscope.sweeps.run import sweep as measure

        arguments = read_file(file) | {
            name: value for name, value in given.items() if value is not None
        }
        arguments = _known(arguments, file)
        if dry_run:
            of_running = ("workers", "ray", "num_gpus", "num_cpus", "device")
            for name in of_running:
                arguments.pop(name, None)
            result: Any = plan(**arguments)
        else:
            with common.interruptible(path("out", arguments.get("out", "sweep"))):
                result = measure(**arguments, progress=common.progress_wanted())
    if json:
        common.print_json(result.to_dict() if dry_run else _as_dict(result))
    else:
        common.show(result)
    if dry_run:
        return
    if not json:
        typer.echo(result.run.summary())
    if result.run.count(FAILED):
        raise typer.Exit(1)


def atlas(
    folder: Annotated[str, typer.Argument(help="A folder or URL that `sinkscope sweep` wrote to.")],
    out: Annotated[Path, typer.Option(help="The .html file to write.")] = Path("atlas.html"),
    reports: Annotated[
        bool,
        typer.Option(help="Also write the full page of every cell beside it, 5 MB each."),
    ] = True,
) -> None:
    """Write one page for a sweep, to sort and filter: a row per cell with values and head map."""
    common.page_to_write("--out", out)
    with common.quiet_stdout():
        from sinkscope.sweeps.view import open_sweep

        cells = open_sweep(folder)
        written = cells.save_atlas(out, reports=reports, progress=common.progress_wanted())
    typer.echo(f"wrote {written[0]}")
    if len(written) > 1:
        typer.echo(f"wrote {counted(len(written) - 1, 'report')} to {written[1].parent}")


def _known(arguments: dict[str, Any], file: Path) -> dict[str, Any]:
    """Return the arguments, if `sweep` accepts them all.

    Raises:
        SinkscopeError: If one is unknown, or no models are named.
    """
    import inspect

    from sinkscope.sweeps.run import sweep as measure

    known = [name for name in inspect.signature(measure).parameters if name != "progress"]
    if unknown := [name for name in arguments if name not in known]:
        raise SinkscopeError(
            f"The sweep file {file} has {listed(unknown)}; it may have {', '.join(known)}."
        )
    if "models" not in arguments:
        raise SinkscopeError(f"The sweep file {file} names no models; add a line models: […].")
    return arguments


def _as_dict(result: Any) -> dict[str, Any]:
    run = result.run
    counts = {state: run.count(state) for state in ("measured", "kept", "failed")}
    return {"folder": result.folder.place, "cells": list(result.rows), **counts, "loads": run.loads}

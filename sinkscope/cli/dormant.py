"""`sinkscope dormant`: which heads sleep on one kind of text and work on another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope.cli import _common as common

if TYPE_CHECKING:
    from pathlib import Path

    from sinkscope.experiments.result import Result


def dormant(
    context: common.Context,
    model: common.Model,
    domains: Annotated[
        str, typer.Option(help="Kinds of text with commas between them; each as for --texts.")
    ] = "prose,code",
    prompts: common.Prompts = 32,
    length: common.Length = 128,
    bos: common.Bos = "auto",
    remove: Annotated[
        str,
        typer.Option(help="Remove every head in turn: zero, mean, resample, or several of them."),
    ] = "",
    remove_prompts: Annotated[
        int | None, typer.Option(min=1, help="On how many prompts of each kind.")
    ] = 8,
    sleep: Annotated[
        bool, typer.Option("--sleep", help="Also ask how many heads can sleep at once, per input.")
    ] = False,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Find heads that are dormant on one kind of text and active on another.

    With --remove, every head is also taken out, and the loss says whether it mattered. With --out,
    what is measured is kept as it comes: the same command continues an interrupted run. At the end
    there are dormant.json, dormant.csv and dormant.html, and likewise sleep-KIND.*.
    """
    folder = common.writable_folder(out)
    kinds, modes = common.listed(domains), common.listed(remove)
    if kinds and all(map(common.is_exact, kinds)):
        common.refuse_beside_ids(context, domains, ("prompts", "length", "bos"))
    with common.quiet_stdout(), common.interruptible(folder):
        import sinkscope as ss
        from sinkscope.experiments.dormant import dormancy, sources
        from sinkscope.experiments.inactive_heads import sleep as put_to_sleep

        bridge = ss.load_model(model, device=device, dtype=dtype)
        texts = sources(kinds, prompts=prompts, length=length, bos=bos, seed=seed)
        shared: dict[str, Any] = dict(seed=seed, progress=common.progress_wanted())
        found: dict[str, Result] = {
            "dormant": dormancy(
                bridge,
                texts,
                remove=modes,
                remove_prompts=remove_prompts,
                out=folder,
                **shared,
            )
        }
        for kind, source in texts.items() if sleep else ():
            name = f"sleep-{plain(kind)}"
            file = None if folder is None else folder / f"{name}.nc"
            found[name] = put_to_sleep(bridge, source, file=file, **shared)
        written = write(found, folder) if folder is not None else []
    if json:
        common.print_json({name: one.to_dict() for name, one in found.items()})
        return
    for one in found.values():
        common.show(one)
        typer.echo()
    for file in written:
        typer.echo(f"wrote {file}")


def plain(kind: str) -> str:
    """A source of texts as part of a file's name."""
    return "".join(letter if letter.isalnum() or letter in "._" else "_" for letter in kind)


def write(found: dict[str, Result], folder: Path) -> list[Path]:
    """Write each result's JSON, table and page."""
    return [file for name, result in found.items() for file in result.save(folder, name)]

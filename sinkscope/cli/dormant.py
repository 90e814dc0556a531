"""`sinkscope dormant`: heads that are dormant on one kind of text and active on another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from sinkscope import renamed
from sinkscope.cli import _common as common

if TYPE_CHECKING:
    from pathlib import Path

    from sinkscope.experiments.result import Result


def dormant(
    context: common.Context,
    model: common.Model,
    domains: Annotated[
        str, typer.Option(help="Comma-separated kinds of text, each as for --texts.")
    ] = "prose,code",
    prompts: common.Prompts = 32,
    length: common.Length = 128,
    bos: common.Bos = "auto",
    remove: Annotated[
        str,
        typer.Option(help="Also ablate every head in turn; comma-separated: zero, mean, resample."),
    ] = "",
    remove_prompts: Annotated[
        int | None, typer.Option(min=1, help="Number of prompts of each kind for --remove.")
    ] = 8,
    inactive: Annotated[
        bool,
        typer.Option("--inactive", help="Also ablate the heads that each score flags as inactive."),
    ] = False,
    sleep: Annotated[bool, typer.Option("--sleep", hidden=True)] = False,
    one_pass: Annotated[
        bool,
        typer.Option(
            "--one-pass",
            help="With --inactive: score and zero heads in one forward pass, as Sandoval-Segura et "
            "al. do; by default heads are scored in the unchanged model.",
        ),
    ] = False,
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Find heads that are dormant on one kind of text and active on another.

    With --remove, every head is also ablated, and the loss without it is measured. With --out, each
    result is saved as soon as it is measured, and the same command continues an interrupted run. At
    the end writes dormant.json, dormant.csv and dormant.html, and with --inactive also
    inactive-KIND.*.
    """
    if sleep:
        renamed.warn("--sleep", "--inactive")
        inactive = True
    folder = common.writable_folder(out)
    kinds, modes = common.listed(domains), common.listed(remove)
    if kinds and all(map(common.is_exact, kinds)):
        common.refuse_beside_ids(context, domains, ("prompts", "length", "bos"))
    with common.quiet_stdout(), common.interruptible(folder), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.dormant import dormancy, sources
        from sinkscope.experiments.inactive_heads import ablate_inactive
        from sinkscope.experiments.partial_forward import Partway
        from sinkscope.experiments.resume import file_stem

        bridge = ss.load_model(model, device=device, dtype=dtype)
        if inactive:  # raise errors before the long computation, not after it
            Partway(bridge)
        texts = sources(kinds, prompts=prompts, length=length, bos=bos, seed=seed)
        shared: dict[str, Any] = dict(seed=seed, progress=common.progress_wanted())
        results: dict[str, Result] = {}
        written: list[Path] = []

        def keep(name: str, result: Result) -> None:
            results[name] = result
            written.extend([] if folder is None else result.save(folder / name))

        result = dormancy(
            bridge, texts, remove=modes, remove_prompts=remove_prompts, out=folder, **shared
        )
        keep("dormant", result)
        for kind, source in texts.items() if inactive else ():
            name = f"inactive-{file_stem(kind)}"
            before = f"sleep-{file_stem(kind)}"  # of earlier versions
            if folder is not None and (folder / f"{before}.nc").exists():
                name = before
            file = None if folder is None else folder / f"{name}.nc"
            procedure = "one pass" if one_pass else "two passes"
            keep(name, ablate_inactive(bridge, source, procedure=procedure, file=file, **shared))
    if json:
        common.print_json({name: one.to_dict() for name, one in results.items()})
        return
    for one in results.values():
        common.show(one)
        typer.echo()
    for file in written:
        typer.echo(f"wrote {file}")

"""`sinkscope dynamics`: sinks, drains, peaks and dormant heads, checkpoint by checkpoint."""

from __future__ import annotations

import re
from typing import Annotated, Any

import typer

from sinkscope.cli import _common as common


def dynamics(
    context: common.Context,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Folders or laboratory snapshots whose names end in a step (checkpoint-500, "
            "step-000500.safetensors); with --model, its Hub revisions (step1000), or bare numbers "
            "for the training steps that TransformerLens knows."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The Hub model that revisions and steps are of.")
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="prose, code, a file, or hf:owner/name:split; default: prose, and for the "
            "laboratory's snapshots its own task."
        ),
    ] = None,
    prompts: common.Prompts = 16,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of each prompt, BOS included; default: 256, and for the laboratory's "
            "snapshots their context.",
        ),
    ] = None,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Follow the sink over training: scan every checkpoint on the same texts.

    With --out, each checkpoint's report is kept when it is measured, and an interrupted run
    continues; at the end there are dynamics.json, dynamics.csv and dynamics.html.
    """
    folder = common.writable_folder(out)
    options: dict[str, Any] = {
        name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None
    }
    with common.quiet_stdout(), common.interruptible(folder), common.locked_folder(folder):
        from sinkscope.experiments.dynamics import by_step, usual_texts
        from sinkscope.experiments.dynamics import dynamics as follow

        named = by_step([int(n) if re.fullmatch(r"\d+", n) else n for n in checkpoints])
        recipe: dict[str, Any] = dict(prompts=prompts, length=length, bos=bos, seed=seed)
        if texts is None:
            source = usual_texts(next(iter(named.values())), **recipe)
        else:
            recipe |= {"length": length or 256}
            source = common.prompts_of(context, texts, **recipe)
        found = follow(
            model,
            named,
            source,
            out=folder,
            progress=common.progress_wanted(),
            **options,
        )
        written = found.save(folder / "dynamics") if folder is not None else []
    if json:
        common.print_json(found.to_dict())
        return
    common.show(found)
    for file in written:
        typer.echo(f"wrote {file}")

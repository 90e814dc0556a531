"""`sinkscope dynamics`: sinks, drains, peaks and dormant heads, checkpoint by checkpoint."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer

from sinkscope.cli import _common as common


def dynamics(
    context: common.Context,
    checkpoints: Annotated[
        list[str],
        typer.Argument(
            help="Folders or toy-model snapshots whose names end in a step (checkpoint-500, "
            "step-000500.safetensors); with --model, its Hub revisions (step1000), or numbers for"
            " the training steps that TransformerLens lists."
        ),
    ],
    model: Annotated[
        str | None, typer.Option(help="The Hub model of the revisions and steps.")
    ] = None,
    texts: Annotated[
        str | None,
        typer.Option(
            help="prose, code, a file, or hf:owner/name:split; default: prose, and for toy-model "
            "snapshots their own task."
        ),
    ] = None,
    prompts: common.Prompts = 16,
    length: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of each prompt, BOS included; default: 256, and for toy-model snapshots "
            "their context.",
        ),
    ] = None,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    seeds: Annotated[
        bool,
        typer.Option(
            "--seeds",
            help="Treat checkpoints in different folders as runs with different seeds, at the same "
            "steps, and compare their sink heads.",
        ),
    ] = False,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Follow the sink over training: scan every checkpoint on the same texts.

    With --out, each checkpoint's report is saved as soon as it is measured, and the same command
    continues an interrupted run; at the end writes dynamics.json, dynamics.csv and dynamics.html.
    With --seeds, each run gets a folder, and seeds.json, seeds.csv and seeds.html compare their
    sink heads.
    """
    folder = common.writable_folder(out)
    options: dict[str, Any] = {
        name: value for name, value in (("device", device), ("dtype", dtype)) if value is not None
    }
    with common.quiet_stdout(), common.interruptible(folder), common.locked_folder(folder):
        from sinkscope.experiments.dynamics import by_step, usual_texts
        from sinkscope.experiments.dynamics import dynamics as follow

        given = [int(n) if re.fullmatch(r"\d+", n) else n for n in checkpoints]
        runs = {name: by_step(own) for name, own in _by_folder(given, seeds).items()}
        recipe: dict[str, Any] = dict(prompts=prompts, length=length, bos=bos, seed=seed)
        if texts is None:
            source = usual_texts(next(iter(next(iter(runs.values())).values())), **recipe)
        else:
            recipe |= {"length": length or 256}
            source = common.prompts_of(context, texts, **recipe)
        results: dict[str, Any] = {}
        for name, named in runs.items():
            results[name] = follow(
                model,
                named,
                source,
                out=None if folder is None else folder / name,
                progress=common.progress_wanted(),
                **options,
            )
        written = []
        if folder is not None:
            for name, result in results.items():
                written += result.save(folder / name / "dynamics")
        if seeds:
            from sinkscope.experiments.seeds import same_heads

            results["seeds"] = same_heads(results)
            written += results["seeds"].save(folder / "seeds") if folder is not None else []
    result = results.popitem()[1]
    common.tell(result, written, json)


def _by_folder(checkpoints: list[Any], seeds: bool) -> dict[str, list[Any]]:
    """Group the checkpoints by the name of their folder; without `seeds`, all are of one run.

    Raises:
        ModelError: If runs cannot be distinguished.
    """
    from sinkscope.errors import ModelError

    if not seeds:
        return {"": checkpoints}
    folders: dict[Path, list[Any]] = {}
    for checkpoint in checkpoints:
        folders.setdefault(Path(str(checkpoint)).resolve().parent, []).append(checkpoint)
    names = [folder.name for folder in folders]
    if isinstance(checkpoints[0], int) or len(set(names)) < len(names) or len(names) < 2:
        raise ModelError(
            "--seeds compares runs, each in a folder of its own name, and was given checkpoints in "
            f"{', '.join(map(str, folders))}; give such as seed0/checkpoint-500 "
            "seed1/checkpoint-500."
        )
    return dict(zip(names, folders.values(), strict=True))

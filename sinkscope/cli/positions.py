"""`sinkscope positions`: what low precision does to rotary positions."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def positions(
    context: common.Context,
    model: common.Model,
    shifts: Annotated[
        str, typer.Option(help="Comma-separated shifts of all position ids.")
    ] = "16,1024,16384",
    dtypes: Annotated[
        str, typer.Option(help="Comma-separated: bfloat16, float16, float32.")
    ] = "bfloat16,float16,float32",
    keep: Annotated[
        str,
        typer.Option(
            help="What to compute in float32 under the other dtypes, comma-separated: none, "
            "angles, scores, both."
        ),
    ] = "none,angles,scores,both",
    texts: common.Texts = "prose",
    prompts: common.Prompts = 2,
    length: common.Length = 512,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Shift all rotary position ids, which should change nothing, and measure what changes.

    With --out, writes positions.json, positions.csv, positions.html and positions.nc. The last one
    is written while the command runs, and the same command continues from it after an interruption.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        from sinkscope.experiments.rotary_precision import rotary_precision

        file = None if folder is None else folder / "positions.nc"
        parts = ["" if part == "none" else part for part in common.some("--keep", keep)]
        with common.interruptible(file):
            result = rotary_precision(
                model,
                common.prompts_of(
                    context, texts, prompts=prompts, length=length, bos=bos, seed=seed
                ),
                shifts=common.numbers("--shifts", shifts),
                dtypes=common.some("--dtypes", dtypes),
                keep=parts,
                device=device,
                file=file,
                progress=common.progress_wanted(),
            )
        written = result.save(folder / "positions") if folder is not None else []
    common.tell(result, written, json)

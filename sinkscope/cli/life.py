"""`sinkscope life`: where the sink comes from, what keeps it, and what takes it away."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def life(
    context: common.Context,
    model: common.Model,
    sink: Annotated[int, typer.Option(min=0, help="The sink position.")] = 0,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 8,
    length: common.Length = 64,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Follow the sink's residual state: what writes, carries and erases it, and what triggers it.

    Then removes the writers at the sink, and measures attention to it and the loss. With --out,
    writes life.json, life.csv and life.html.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.life import sink_life

        result = sink_life(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            sink=sink,
            progress=common.progress_wanted(),
        )
        written = result.save(folder / "life") if folder is not None else []
    common.tell(result, written, json)

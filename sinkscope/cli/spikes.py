"""`sinkscope spikes`: whether a hybrid model's activations spike before its attention layers."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def spikes(
    context: common.Context,
    model: common.Model,
    sink: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="The position whose retention is measured; default: the sink of most layers.",
        ),
    ] = None,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 4,
    length: common.Length = 128,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure sink–spike alignment and inter-spike retention of a hybrid model (Su et al. 2026).

    The full pattern of each attention layer is computed. With --out, writes spikes.json, spikes.csv
    and spikes.html.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.spikes import spikes as measure

        result = measure(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            sink=sink,
        )
        written = result.save(folder / "spikes") if folder is not None else []
    common.tell(result, written, json)

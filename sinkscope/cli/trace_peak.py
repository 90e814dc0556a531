"""`sinkscope trace-peak`: which blocks write the residual peak, and which heads read it."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def trace_peak(
    context: common.Context,
    model: common.Model,
    sink: Annotated[int, typer.Option(min=0, help="The sink position.")] = 0,
    modes: Annotated[
        str,
        typer.Option(
            help="Comma-separated replacements: zero, typical (the mean over the other positions), "
            "mean (the mean at the sink)."
        ),
    ] = "zero,typical,mean",
    texts: common.Texts = "prose",
    prompts: common.Prompts = 4,
    length: common.Length = 48,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Replace each block's attention and FFN output at the sink, and measure the peak that is left.

    Takes one pass over the texts for each block, part and mode. With --out, writes
    trace-peak.json, trace-peak.csv and trace-peak.html.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.trace_peak import trace_peak as trace

        result = trace(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            sink=sink,
            modes=common.some("--modes", modes),
            progress=common.progress_wanted(),
        )
        written = result.save(folder / "trace-peak") if folder is not None else []
    common.tell(result, written, json)

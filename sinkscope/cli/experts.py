"""`sinkscope experts`: which experts of a routed model write its massive activations."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def experts(
    context: common.Context,
    model: common.Model,
    sink: Annotated[int, typer.Option(min=0, help="The sink position.")] = 0,
    ablate: Annotated[
        bool,
        typer.Option(
            help="Also measure the model without its super experts, and without as many random "
            "experts of the same layers."
        ),
    ] = True,
    percentile: Annotated[
        float,
        typer.Option(
            min=0,
            max=100,
            help="Percentile of all experts' largest outputs that a super expert exceeds.",
        ),
    ] = 99.5,
    share: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="Share of the maximum over all experts that a super expert exceeds."
        ),
    ] = 0.1,
    minimum: Annotated[
        float, typer.Option(min=0, help="Magnitude that a massive activation exceeds.")
    ] = 100.0,
    ratio: Annotated[
        float, typer.Option(min=0, help="Multiple of its hidden state's median that it exceeds.")
    ] = 1000.0,
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
    """Measure the output of every expert of a routed model, and find its super experts.

    Each expert is computed from transformers' own modules, for the tokens that the router sends to
    it. With --out, writes experts.json, experts.csv and experts.html.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.experts import experts as measure

        result = measure(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            sink=sink,
            ablate=ablate,
            percentile=percentile,
            share=share,
            minimum=minimum,
            ratio=ratio,
            seed=seed,
            progress=common.progress_wanted(),
        )
        written = result.save(folder / "experts") if folder is not None else []
    common.tell(result, written, json)

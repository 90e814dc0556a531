"""`sinkscope vocabulary`: which tokens make a sink as the first of a prompt."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def vocabulary(
    context: common.Context,
    model: common.Model,
    threshold: Annotated[
        float,
        typer.Option(
            min=0, help="A token makes a sink if its norm exceeds this many times a later token's."
        ),
    ] = 10.0,
    sample: Annotated[
        int | None,
        typer.Option(min=1, help="Tokens to measure, drawn at random; default: all of them."),
    ] = None,
    further: Annotated[
        int,
        typer.Option(
            min=0,
            help="How many of them to measure after BOS too and, where positions are learned, with "
            "another position's vector.",
        ),
    ] = 4096,
    pairs: Annotated[
        int,
        typer.Option(
            min=0, help="Pairs of a token that makes no sink and a control to put into texts."
        ),
    ] = 8,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 16,
    length: common.Length = 64,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Run every token of the vocabulary as the first of a prompt, and find those without a sink.

    Under a causal mask the first position attends to itself alone, so one-token prompts give its
    whole trajectory. The texts set the scale; exceptions are put first in them. With --out, what is
    measured is kept in vocabulary.nc, an interrupted run continues, and at the end there are
    vocabulary.json, vocabulary.csv and vocabulary.html.
    """
    folder = common.writable_folder(out)
    file = None if folder is None else folder / "vocabulary.nc"
    with common.quiet_stdout(), common.interruptible(file), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.vocabulary import vocabulary as measure

        result = measure(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            threshold=threshold,
            sample=sample,
            further=further,
            pairs=pairs,
            seed=seed,
            file=file,
            progress=common.progress_wanted(),
        )
        written = result.save(folder / "vocabulary") if folder is not None else []
    common.tell(result, written, json)

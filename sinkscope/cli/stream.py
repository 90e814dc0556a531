"""`sinkscope stream`: a long text with a small cache, with and without its sinks."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def stream(
    context: common.Context,
    model: common.Model,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 4096,
    windows: Annotated[
        str,
        typer.Option(
            help="Comma-separated window sizes, in recent positions that a query sees, or none."
        ),
    ] = "256,512,1024",
    sinks: Annotated[
        str, typer.Option(help="Comma-separated numbers of first tokens to keep.")
    ] = "0,1,2,4,8",
    designated: Annotated[
        str,
        typer.Option(
            help="Comma-separated positions to designate and keep instead of the first tokens, or "
            "none; auto: 255, or two thirds of the way along a short text."
        ),
    ] = "auto",
    counted: Annotated[
        str,
        typer.Option(
            help="Where positions are counted: cache (as StreamingLLM), absolute (from the text's "
            "start), or cache,absolute for both."
        ),
    ] = "cache",
    full: Annotated[
        bool | None,
        typer.Option(
            "--full/--no-full", help="Also run without a window; default: if the text fits."
        ),
    ] = None,
    quantise: Annotated[
        str,
        typer.Option(
            help="Schemes by which older keys and values are stored, such as "
            "int8-token,int4-token,int2-group64-asym, with none, the first --sinks and the pivots "
            "kept in full precision; none."
        ),
    ] = "none",
    recent: Annotated[
        int,
        typer.Option(min=1, help="With --quantise: number of last tokens that are not quantised."),
    ] = 128,
    chunk: Annotated[int, typer.Option(min=1, help="Queries processed at once.")] = 128,
    texts: common.Texts = "prose",
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure the perplexity of a long text when queries see a few kept positions and a window.

    --texts may be a file, and longer than the model's context. With --out, writes
    stream.json, stream.csv, stream.html and stream.nc. The last one is written while the command
    runs, and the same command continues from it after an interruption.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.streaming_context import streaming_context

        if common.is_exact(texts):
            common.refuse_beside_ids(context, texts, ("bos", "seed"))
        file = None if folder is None else folder / "stream.nc"
        with common.interruptible(file):
            result = streaming_context(
                ss.load_model(model, device=device, dtype=dtype),
                texts,
                tokens=tokens,
                windows=[] if windows == "none" else common.numbers("--windows", windows),
                sinks=common.numbers("--sinks", sinks),
                designated=_designated(designated),
                counted=common.some("--counted", counted),
                full=full,
                quantise=() if quantise == "none" else common.some("--quantise", quantise),
                recent=recent,
                chunk=chunk,
                bos=bos,
                seed=seed,
                file=file,
                progress=common.progress_wanted(),
            )
        written = result.save(folder / "stream") if folder is not None else []
    remark = ""
    if designated == "auto" and "designated 255" not in result.kept:
        remark = "Too few tokens follow position 255, so a position two thirds along is designated."
    common.tell(result, written, json, remark)


def _designated(option: str) -> list[int] | str | None:
    named: dict[str, str | None] = {"none": None, "auto": "auto"}
    return named[option] if option in named else common.numbers("--designated", option)

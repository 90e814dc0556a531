"""`sinkscope precision`: what low precision costs, and what must stay in full precision."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def precision(
    context: common.Context,
    model: common.Model,
    schemes: Annotated[
        str,
        typer.Option(
            help="Comma-separated schemes FORMAT-RANGE, such as int8-tensor, int8-token, "
            "fp8-channel or int4-group64, optionally with -asym and -static."
        ),
    ] = "int8-tensor,int8-token,fp8-tensor,int4-group64-asym",
    tensors: Annotated[
        str,
        typer.Option(
            help="Comma-separated: all, or some of attn_in, key, value, z, mlp_in, neurons; "
            "key,value is a KV cache alone."
        ),
    ] = "all",
    sinks: Annotated[
        str,
        typer.Option(help="Positions to keep as sinks; auto: the tokens that a scan marks."),
    ] = "auto",
    first: Annotated[
        str,
        typer.Option(
            help="Comma-separated numbers of first tokens to keep for comparison, or none."
        ),
    ] = "1,4",
    mapped: Annotated[
        str,
        typer.Option(
            "--map", help="Scheme of the map of layers and tensors; auto: the first one; none."
        ),
    ] = "auto",
    map_prompts: Annotated[
        int, typer.Option(min=1, help="Number of prompts of the map, the first ones.")
    ] = 2,
    tolerance: Annotated[
        float,
        typer.Option(min=0, help="KL above which a layer's tensor is in the keep list [nat]."),
    ] = 0.01,
    calibration: Annotated[
        str,
        typer.Option(
            help="Text for the ranges of static schemes, as --texts; auto: code, or prose if "
            "--texts is code."
        ),
    ] = "auto",
    weights: Annotated[
        str,
        typer.Option(
            help="Quantise the blocks' weights too, in runs of their own, by torchao: int8-channel,"
            "int4-group32, or none."
        ),
    ] = "none",
    texts: common.Texts = "prose",
    prompts: common.Prompts = 8,
    length: common.Length = 128,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Measure what quantised activations, keys and values cost, and what to keep of them.

    Weights are quantised with --weights only, which needs torchao. With --out, writes
    precision.json, precision.csv, precision.html, precision.keep.json (tokens, channels and layers
    to keep in full precision) and precision.nc. The last one is written while the command runs, and
    the same command continues from it after an interruption.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.precision import precision as measure
        from sinkscope.metrics.quantisation import Scheme

        names = common.some("--schemes", schemes)
        recipe = dict(prompts=prompts, length=length, bos=bos, seed=seed)
        source = common.prompts_of(context, texts, **recipe)
        stand_in = None
        if any(Scheme.parse(name).static for name in names):
            other = "prose" if texts == "code" else "code"
            other = other if calibration == "auto" else calibration
            stand_in = ss.texts(other) if common.is_exact(other) else ss.texts(other, **recipe)
        file = None if folder is None else folder / "precision.nc"
        with common.interruptible(file):
            result = measure(
                ss.load_model(model, device=device, dtype=dtype),
                source,
                schemes=names,
                tensors=None if tensors == "all" else common.some("--tensors", tensors),
                sinks=None if sinks == "auto" else common.numbers("--sinks", sinks),
                first=() if first == "none" else common.numbers("--first", first),
                calibration=stand_in,
                mapped={"auto": "", "none": None}.get(mapped, mapped),
                map_prompts=map_prompts,
                tolerance=tolerance,
                weights=() if weights == "none" else common.some("--weights", weights),
                file=file,
                progress=common.progress_wanted(),
            )
        written = result.save(folder / "precision") if folder is not None else []
    common.tell(result, written, json)

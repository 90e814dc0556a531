"""`sinkscope transplant`: whether a sink matters by the attention it absorbs or by what it adds."""

from __future__ import annotations

from typing import Annotated

import typer

from sinkscope.cli import _common as common


def transplant(
    context: common.Context,
    model: common.Model,
    donor: Annotated[
        str,
        typer.Option(
            help="own (each prompt's own sink), mean (over the prompts), or a .json file with the "
            "donors' token ids."
        ),
    ] = "own",
    keep_sink: Annotated[
        bool, typer.Option("--keep-sink", help="Do not erase the hosts' own sink first.")
    ] = False,
    texts: common.Texts = "prose",
    prompts: common.Prompts = 4,
    length: common.Length = 64,
    bos: common.Bos = "auto",
    seed: common.Seed = 0,
    device: common.Device = None,
    dtype: common.Dtype = None,
    out: common.Out = None,
    json: common.Json = False,
) -> None:
    """Give prompts without a sink the keys, the values, or both, of a donor's sink.

    With --out, writes transplant.json, transplant.csv and transplant.html.
    """
    folder = common.writable_folder(out)
    with common.quiet_stdout(), common.locked_folder(folder):
        import sinkscope as ss
        from sinkscope.experiments.transplant import transplant as measure

        given = ss.read_token_ids(donor) if common.is_exact(donor) else donor
        result = measure(
            ss.load_model(model, device=device, dtype=dtype),
            common.prompts_of(context, texts, prompts=prompts, length=length, bos=bos, seed=seed),
            given,
            erase=not keep_sink,
            progress=common.progress_wanted(),
        )
        written = result.save(folder / "transplant") if folder is not None else []
    common.tell(result, written, json)

"""Where the sink is made: take a block's attention or FFN output away at the sink, and look on.

Guo et al. (2410.13835, their table for Llama-3.1-8B): without the FFN of blocks 0 or 1 the residual
peak is gone, without any attention it stays. Here every block is removed in turn, and the residual
peak and the sink attention are read after every layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from sinkscope.capabilities import capabilities
from sinkscope.experiments import _measure, _result
from sinkscope.experiments._traced import PeakTrace
from sinkscope.interventions import RemoveOutput, SetActivation
from sinkscope.interventions._base import check_layers
from sinkscope.models import load_model
from sinkscope.texts import Texts

__all__ = ["MODES", "PARTS", "PeakTrace", "trace_peak"]

PARTS = {"attention": "attn", "ffn": "mlp"}
MODES = ("zero", "typical", "mean")


def trace_peak(
    model: Any,
    texts: Any,
    *,
    sink: int = 0,
    blocks: Iterable[int] | None = None,
    parts: Iterable[str] = ("attention", "ffn"),
    modes: Iterable[str] = MODES,
    progress: bool = True,
) -> PeakTrace:
    """Remove attention or FFN output of each block at the sink, and read the sink in every layer.

    Costs one pass over the texts for each block, part and mode; a few short prompts are enough.

    Args:
        model: A bridge, or anything that `load_model` takes.
        texts: Prompts of equal length.
        sink: The sink position.
        blocks: Which blocks to remove; all by default.
        parts: Of "attention" and "ffn".
        modes: What takes the place of what is removed. "zero"; "typical", the part's mean output
            at the other positions, as if the sink were one of them; or "mean", its mean at the
            sink over the prompts, which leaves what all prompts share (Sun et al. 2402.17762 find
            that this changes nothing).
        progress: Whether to draw a progress bar.

    Raises:
        TextError: If the prompts differ in length or end before the sink.
        UnsupportedError: If the model shows no attention or FFN outputs; or a part or mode is
            unknown, or none is named.
    """
    model = load_model(model)
    can = capabilities(model)
    prompts = _measure.even(model, texts, sink)
    chosen = check_layers(None if blocks is None else tuple(blocks), can.n_layers)
    parts = _measure.chosen(parts, tuple(PARTS), "parts")
    modes = _measure.chosen(modes, MODES, "modes")
    outputs = _typical(model, prompts, sink, parts)
    untouched = _read(model, prompts, sink)
    without: list[dict[str, Tensor]] = []
    total = len(chosen) * len(parts) * len(modes)
    with tqdm(total=total, unit="removal", disable=not progress, leave=False) as bar:
        for block in chosen:
            for part in parts:
                for mode in modes:
                    with _removal(model, block, part, mode, sink, outputs):
                        without.append(_read(model, prompts, sink))
                    bar.update()
    shape = len(chosen), len(parts), len(modes)
    stacked = {
        name: torch.stack([one[name] for one in without]).unflatten(0, shape) for name in untouched
    }
    return PeakTrace(
        about=_result.about(model, prompts),
        sink=sink,
        blocks=chosen,
        parts=parts,
        modes=modes,
        **untouched,
        **{f"{name}_without": x for name, x in stacked.items()},
    )


def _read(model: Any, prompts: Texts, sink: int) -> dict[str, Tensor]:
    """Peak and sink attention in every layer, of the model as it is now."""
    wanted = {"norm": _measure.RESIDUAL_NORM, "attention": _measure.TO_SINKS}
    found = _measure.measure(model, prompts, wanted, [sink])
    norm = found["norm"]
    return {
        "peak": norm[..., sink],
        "peak_ratio": norm[..., sink] / _measure.median_of_others(norm, [sink]),
        "attention": found["attention"],
    }


def _typical(
    model: Any, prompts: Texts, sink: int, parts: Iterable[str]
) -> dict[tuple[str, str], Float[Tensor, "layer dim"]]:
    """What each part puts out on average, at the sink and elsewhere, by part and mode."""

    def others(x: Tensor, batch: Any) -> Tensor:
        return (x.float().sum(1) - x[:, sink].float()) / (x.shape[1] - 1)

    found: dict[tuple[str, str], Tensor] = {}
    for part in parts:
        signal = f"{PARTS[part]}_out"
        wanted = {
            "mean": _measure.at(signal, sink),
            "typical": _measure.Quantity(signal, others),
        }
        for mode, x in _measure.measure(model, prompts, wanted, [sink]).items():
            found[part, mode] = x.mean(0)
    return found


def _removal(
    model: Any, block: int, part: str, mode: str, sink: int, outputs: dict[Any, Tensor]
) -> Any:
    """The intervention that removes a part of a block at the sink."""
    if mode == "zero":
        return RemoveOutput(model, block, PARTS[part], sink)
    return SetActivation(
        model, block, None, sink, outputs[part, mode][block], at=f"{PARTS[part]}_out"
    )

"""What `Conditions` found, in a table and in sentences."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope._summary import table_as_text
from sinkscope.experiments import _result

if TYPE_CHECKING:
    from sinkscope.experiments._conditions import Conditions


Dims = frozenset[tuple[int, int]]
"""Pairs of layer and dim."""


def summary(found: Conditions) -> str:
    """How to read the table, the table, and a sentence or two for each change."""
    usual = _dims(found, 0, 0)
    parts = [_head(found), _table(found)]
    parts += [f"Non-mixture dims of position 0, {found.names[0]}: {_listed(usual)}."]
    parts += [
        f"{found.starts[index]} start, {change}: {_sentence(found, index, usual)}"
        for index, change in enumerate(found.changes)
        if change != "unchanged"
    ]
    return "\n".join(parts)


def _head(found: Conditions) -> str:
    return (
        f"Attention: what {found.seeing} pay to a position, mean over heads and {found.where}. "
        "Peak: residual norm over the median of the other positions, after the layer where it is "
        f"highest. Drain: value norm over the mean of the others, mean over {found.where}. "
        "95 % intervals over prompts."
    )


def _table(found: Conditions) -> str:
    rows = []
    for index, (start, change) in enumerate(zip(found.starts, found.changes, strict=True)):
        for target, position in enumerate((0, found.position)):
            row = [
                "" if target else f"{start}, {change}",
                str(position),
                _result.estimate(found.attention_to(index, target)).to_decimals(3),
                str(_result.estimate(found.highest_peak(index, position))),
                _result.estimate(found.drain(index, position)).to_decimals(3),
            ]
            rows.append(row)
    return table_as_text(["start, change", "at", "attention", "peak", "drain"], rows)


def _sentence(found: Conditions, index: int, usual: Dims) -> str:
    """What changed against the same start unchanged."""
    before, p = found.reference(index), found.position
    moves = [
        f"{where} {float(found.attention_to(before, target).mean()):.3f} → "
        f"{float(found.attention_to(index, target).mean()):.3f}"
        for target, where in ((1, f"attention to {p}"), (0, "to 0"))
    ]
    dims = _dims(found, index, 1)
    same = "the same as those of 0" if dims and dims == usual else _listed(dims)
    words = [f"{', '.join(moves)}; non-mixture dims of {p}: {same}."]
    change = found.loss_change(index)
    if change is not None:
        after = change["after_it"]
        unsure = ", which these prompts do not tell from 0" if after.low <= 0 <= after.high else ""
        words.append(f"The loss of the tokens after {p} changes by {after.signed()} nat{unsure}.")
    return " ".join(words)


def _dims(found: Conditions, index: int, target: int) -> Dims:
    return frozenset((layer, dim) for layer, dim, _ in found.nonmixture_dims(index, target))


def _listed(dims: Dims) -> str:
    """Dims with the layers that write them: "507 (layers 11, 28 and 29)"."""
    layers: dict[int, list[str]] = {}
    for layer, dim in sorted(dims):
        layers.setdefault(dim, []).append(str(layer))
    told = [
        f"{dim} (layer{'s' if len(where) > 1 else ''} {_result.listed(where)})"
        for dim, where in layers.items()
    ]
    return _result.listed(told) or "none"

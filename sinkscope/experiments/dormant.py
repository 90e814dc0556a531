"""Heads that sleep on one kind of text and work on another (Guo et al. 2410.13835).

`dormancy` scans a model on several kinds of text, names the heads that park their attention on the
sink on one kind and not on another, and on request asks the only judge there is, the loss, whether
they then do nothing.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capabilities import capabilities
from sinkscope.errors import TextError
from sinkscope.experiments import _partial, _result
from sinkscope.experiments._dormancy import Dormancy
from sinkscope.experiments._partway import with_loss, with_predictions
from sinkscope.experiments._statistics import max_t
from sinkscope.experiments.removal import MODES, Removal, removal
from sinkscope.interventions._base import check_mode
from sinkscope.models import load_model
from sinkscope.report import SinkReport, load_report
from sinkscope.scan import scan
from sinkscope.texts import Texts, TextSource, as_texts, texts

__all__ = ["Dormancy", "Removal", "dormancy", "removal"]

METRICS = ("sink_attention", "values", "head_outputs", "entropy")
"""What a scan has to measure for the thirteen inactivity scores."""


@dataclass(frozen=True)
class _Request:
    """What every domain is measured with."""

    sinks: Any
    seed: int
    out: Path | None
    progress: bool

    def file(self, *name: str) -> Path | None:
        """A file of the folder that results are kept in."""
        if self.out is None:
            return None
        plain = "-".join(re.sub(r"[^\w.]+", "_", part) for part in name)
        return self.out / f"{plain}.nc"


def dormancy(
    model: Any,
    domains: Mapping[str, Any] | Iterable[str] = ("prose", "code"),
    *,
    prompts: int = 16,
    length: int = 256,
    bos: str = "auto",
    remove: str | Sequence[str] = (),
    remove_prompts: int | None = None,
    parked: float = 0.5,
    drop: float = 0.25,
    level: float = 0.05,
    sinks: Any = (0,),
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Dormancy:
    """Which heads are dormant on one kind of text and active on another.

    A head is named where its mean sink attention is above `parked` on one kind, lower by at least
    `drop` on the other, and the difference is significant after correction for the number of heads
    and of pairs of domains (`_statistics.max_t`).

    Args:
        model: A bridge, or anything that `load_model` takes.
        domains: Kinds of text by name: anything that a scan takes. Names alone are sources of
            `texts`.
        prompts: Prompts of each domain that is given as a source.
        length: Their tokens.
        bos: Their BOS policy.
        remove: Also remove every head in turn, and put "zero", "mean" or "resample" (or several of
            them) in its place; see `removal`. The costly part.
        remove_prompts: On how many prompts of each domain; all by default. The heads that differ
            between domains are removed on all prompts in any case.
        parked: Mean sink attention above which a head counts as dormant [probability].
        drop: How much less counts as active [probability].
        level: Probability of naming even one head wrongly.
        sinks: See `scan`.
        seed: Of texts, permutations and draws.
        out: A folder that keeps what is measured as it comes, and where an interrupted run
            continues.
        progress: Whether to draw progress bars.

    Raises:
        TextError: With fewer than two domains, or two prompts of one; if a prompt has a single
            token, or heads are to be removed on no prompt.
        UnsupportedError: If the model cannot show what the scores need; or, with `remove`, has no
            loss or cannot start at any of its blocks.
        ReportError: If the folder holds results of another model, text or setting; or hooks or
            interventions are in force, which a folder cannot tell apart.
    """
    model = load_model(model)
    folder = _partial.kept_in(out, model)
    modes = tuple(check_mode(mode, MODES) for mode in _names(remove))
    if modes:
        with_loss(capabilities(model))
    if remove_prompts is not None and remove_prompts < 1:
        raise TextError(
            f"Heads cannot be removed on {remove_prompts} prompts; give 1 or more, or None for all."
        )
    recipes = sources(domains, prompts=prompts, length=length, bos=bos, seed=seed)
    kinds = {name: recipe.tokenize(model).right_padded() for name, recipe in recipes.items()}
    _check(kinds)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    once = isinstance(sinks, Iterable) and not isinstance(sinks, str)
    request = _Request(list(sinks) if once else sinks, seed, folder, progress)
    reports = {name: _report(model, name, kind, request) for name, kind in kinds.items()}
    found = Dormancy(
        about=_about(model, kinds),
        reports=reports,
        p_values=_p_values(reports, seed),
        removals={},
        parked=parked,
        drop=drop,
        level=level,
    )
    suspects = [(head["layer"], head["head"]) for head in found.differing()]
    removals = {
        mode: {
            name: removal(
                model,
                kind,
                mode,
                heads=_to_remove(reports[name], suspects, remove_prompts),
                seed=seed,
                file=request.file("removal", mode, name),
                progress=progress,
            )
            for name, kind in kinds.items()
        }
        for mode in modes
    }
    return dataclasses.replace(found, removals=removals)


def _names(wanted: str | Iterable[str]) -> tuple[str, ...]:
    return (wanted,) if isinstance(wanted, str) else tuple(wanted)


def sources(
    domains: Mapping[str, Any] | Iterable[str], *, prompts: int, length: int, bos: str, seed: int
) -> dict[str, TextSource | Texts]:
    """Kinds of text by name; exact token ids keep the prompts and lengths that they have.

    Raises:
        TextError: If one is no text.
    """
    named = domains if isinstance(domains, Mapping) else {name: name for name in _names(domains)}
    found = {}
    for name, source in named.items():
        if not isinstance(source, str | Path):
            found[name] = as_texts(source)
        elif Path(source).suffix == ".json":
            found[name] = texts(source)
        else:
            found[name] = texts(source, prompts=prompts, length=length, bos=bos, seed=seed)
    return found


def _check(kinds: Mapping[str, Texts]) -> None:
    if len(kinds) < 2:
        raise TextError(
            "dormancy compares kinds of text; name at least two, such as prose and code."
        )
    for name, kind in kinds.items():
        if len(kind) < 2:
            raise TextError(
                f"dormancy needs at least two prompts of each kind; {name} is {kind!r}."
            )
        with_predictions(kind, name)


def _to_remove(
    report: SinkReport, suspects: list[tuple[int, int]], prompts: int | None
) -> Bool[Tensor, "prompt layer head"]:
    """All heads on the first prompts, and the suspects on all."""
    heads = torch.zeros_like(report["sink_attention"], dtype=torch.bool)
    heads[:prompts] = True
    for layer, head in suspects:
        heads[:, layer, head] = True
    return heads


def _about(model: Any, kinds: Mapping[str, Texts]) -> str:
    each = ", ".join(f"{len(kind)} × {name}" for name, kind in kinds.items())
    one, *_ = kinds.values()
    line = _result.about(model, one)
    return f"{line.rpartition(' · ')[0]} · {each}"


def _report(model: Any, name: str, kind: Texts, request: _Request) -> SinkReport:
    """Scan a domain, unless that has been done."""
    file = request.file(name)
    if file is None:
        return _scanned(model, kind, request)
    asked = _partial.asked_of(model, kind, sinks=str(request.sinks))
    beside = file.with_suffix(".asked.json")
    if file.exists():
        found = json.loads(beside.read_text(encoding="utf-8")) if beside.exists() else {}
        _partial.check_same(found, asked, file)
        return load_report(file)
    report = _scanned(model, kind, request)
    # The report comes last: where it is, what was asked is too.
    _partial.write_whole(beside, json.dumps(asked, indent=1))
    report.save(file)
    return report


def _scanned(model: Any, kind: Texts, request: _Request) -> SinkReport:
    report = scan(model, kind, metrics=METRICS, sinks=request.sinks, progress=request.progress)
    return report.to("cpu")


def _p_values(
    reports: Mapping[str, SinkReport], seed: int
) -> dict[tuple[str, str], Float[Tensor, "layer head"]]:
    """Corrected for heads by the largest t, and for pairs of domains by Bonferroni."""
    pairs = list(itertools.combinations(reports, 2))
    return {
        (one, other): (
            max_t(reports[one]["sink_attention"], reports[other]["sink_attention"], seed=seed)
            * len(pairs)
        ).clamp(max=1)
        for one, other in pairs
    }

"""Heads that are dormant on one kind of text and active on another.

Guo, Pai, Bai, Jiao, Jordan and Mei 2024, "Active-Dormant Attention Heads" (arXiv 2410.13835).

1. Scan the model on each kind of text (a domain).
2. A head is a sink head on a domain if its mean sink attention exceeds a threshold. It is reported
   if it is a sink head on one domain, its sink attention is lower by a margin on another, and the
   difference is significant: Welch's t of each head against the largest |t| over heads when prompts
   are exchanged at random (`statistics.max_t`), and Bonferroni over pairs of domains.
3. On request, ablate every head and test whether its effect on the loss is smaller where it is
   dormant: sink attention alone does not show that a head is inactive.
4. Report how well each inactivity score ranks heads by the effect of their ablation.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.capture.scan import scan
from sinkscope.errors import ReportError, TextError
from sinkscope.experiments import result as _result
from sinkscope.experiments.ablation import MODES, Ablation, ablate_heads
from sinkscope.experiments.partial_forward import Partway, with_predictions
from sinkscope.experiments.result import Result, stacked, tidy
from sinkscope.experiments.resume import Kept, file_stem, kept_in, request_of
from sinkscope.interventions.base import check_mode
from sinkscope.metrics.heads import INACTIVE_IF, is_active_dormant, is_dormant
from sinkscope.models.load import load_model
from sinkscope.output import counted, listed, locked, number
from sinkscope.prompts.recipes import TextSource
from sinkscope.prompts.texts import as_texts, texts
from sinkscope.prompts.tokens import Texts
from sinkscope.renamed import argument, attribute, warn
from sinkscope.report.report import SinkReport
from sinkscope.statistics import bootstrap, estimate, max_t, rank_correlation

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

METRICS = ("sink_attention", "values", "head_outputs", "entropy")
"""Metrics that the thirteen inactivity scores need."""
FIELDS = ("sink_attention", "attention_entropy", "head_output_norm", "honor")
"""Fields of the report beside the thirteen scores."""


_NAMED = 6
"""Number of heads that the summary lists."""


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class Dormancy(Result):
    """Heads on several kinds of text, and the effect of ablating them there.

    Attributes:
        reports: The scan of each domain.
        p_values: p of a difference in sink attention, by pair of domains, corrected for heads and
            pairs [layer head].
        ablations: By mode, then domain; empty where nothing was ablated.
        sink_threshold: Mean sink attention above which a head is a sink head, hence counts as
            dormant [probability].
        drop: How much lower sink attention has to be to count as active [probability].
        level: Family-wise error rate [probability].
    """

    QUESTION = "Which heads are dormant on one kind of text and active on another?"

    reports: dict[str, SinkReport]
    p_values: dict[tuple[str, str], Tensor]
    ablations: dict[str, dict[str, Ablation]]
    sink_threshold: float
    drop: float
    level: float

    removals = attribute("removals", "ablations")
    parked = attribute("parked", "sink_threshold")

    def dormant(self, domain: str) -> Tensor:
        """The sink heads of a domain: mean sink attention above `sink_threshold` [layer head]."""
        return is_dormant(self.reports[domain].mean("sink_attention"), self.sink_threshold)

    def differing(self) -> list[dict[str, Any]]:
        """The heads that are dormant on one domain and active on another, largest drop first.

        Returns:
            Records of layer, head, dormant_on, active_on, the sink attention on either with its
            interval, and p; after an ablation, for each mode, on either domain the cost (mean
            change of the loss) and the effect (mean absolute change in a prompt, since a head that
            helps in one prompt and harms in another is active), and p of a difference in effect,
            corrected for the heads of this list. `confirmed`: the effect is significantly larger
            where the head is active. Effects are compared in units of each domain's
            `typical_effect`; otherwise a kind of text on which every head matters more would
            confirm them all.
        """
        heads = []
        for (one, other), p in self.p_values.items():
            for here, there in ((one, other), (other, one)):
                heads += self._dormant_here(here, there, p)
        for mode, ablated in self.ablations.items():
            _add_costs(heads, ablated, mode, self)
        return sorted(heads, key=_drop, reverse=True)

    def _dormant_here(self, here: str, there: str, p: Tensor) -> list[dict[str, Any]]:
        """Return the heads that are dormant on one domain and active on the other."""
        one, other = (self.reports[name]["sink_attention"] for name in (here, there))
        heads = is_active_dormant(one, other, self.sink_threshold, self.drop) & (p < self.level)
        return [
            {
                "layer": layer,
                "head": head,
                "dormant_on": here,
                "active_on": there,
                "sink_attention": (
                    estimate(one[:, layer, head]),
                    estimate(other[:, layer, head]),
                ),
                "p": float(p[layer, head]),
            }
            for layer, head in heads.nonzero().tolist()
        ]

    def to_frame(self) -> pd.DataFrame:
        """One row per head and domain.

        Returns:
            domain, layer, head; sink_attention, attention_entropy, head_output_norm, honor and the
            thirteen inactivity scores, each with its 95 % interval in ``…_low`` and ``…_high``;
            dormant (on this domain); differs (dormant on one domain and active on another, the same
            in all rows of a head) and p (the smallest over pairs); after an ablation
            ``loss_change_MODE`` with its interval.
        """
        return self._table({})

    def _table(self, prompts: Mapping[str, Any]) -> pd.DataFrame:
        """Return `to_frame` for some prompts of each domain; for all prompts by default."""
        pieces = []
        p = torch.stack(list(self.p_values.values())).amin(dim=0)
        differs = torch.zeros_like(p, dtype=torch.bool)
        for head in self.differing():
            differs[head["layer"], head["head"]] = True
        for domain, report in self.reports.items():
            layers, heads = differs.shape
            some = prompts.get(domain, slice(None))
            columns: dict[str, Any] = {}
            for name, x in _per_head(report).items():
                columns |= _with_ends(name, x[some])
            columns["dormant"] = self.dormant(domain).flatten().numpy()
            columns["differs"], columns["p"] = differs.flatten().numpy(), p
            for mode, ablated in self.ablations.items():
                columns |= _with_ends(f"loss_change_{mode}", ablated[domain].loss_change[some])
            axes = {"domain": [domain], "layer": range(layers), "head": range(heads)}
            pieces.append(tidy(axes, **columns))
        return stacked(pieces)

    def ablation_frame(self, mode: str) -> pd.DataFrame:
        """`to_frame`, with one mode's costs as loss_change, as `plot.ablation_effect` takes it.

        All columns are of the prompts on which every head was ablated, as in `prediction`.

        Args:
            mode: Mode of the ablation.

        Raises:
            ReportError: If heads were not ablated in this mode.
        """
        prefix = f"loss_change_{mode}"
        names = {f"{prefix}{end}": f"loss_change{end}" for end in ("", "_low", "_high")}
        return self._table(self._whole(mode)).rename(columns=names).assign(mode=mode)

    def removal_frame(self, mode: str) -> pd.DataFrame:
        """Deprecated: the old name of `ablation_frame`."""
        warn("Dormancy.removal_frame()", "ablation_frame()")
        return self.ablation_frame(mode)

    def _whole(self, mode: str) -> dict[str, Bool[Tensor, "prompt"]]:
        """The prompts of each domain on which every head was ablated."""
        return {
            domain: ~self._by_head(domain, ablated.loss_change).isnan().any(dim=1)
            for domain, ablated in self._ablated(mode).items()
        }

    def _by_head(
        self, domain: str, x: Float[Tensor, "prompt layer head"]
    ) -> Float[Tensor, "prompt layer_head"]:
        """The heads of all layers that attend, side by side."""
        return x[:, list(self.reports[domain].settings.attending)].flatten(1)

    def prediction(self, mode: str, of: str = "cost") -> pd.DataFrame:
        """How well each score ranks heads by the effect of their ablation.

        Args:
            mode: Mode of the ablation.
            of: "cost", the mean change of the loss; or "effect", the mean absolute change in a
                prompt, whether the head helped or harmed.

        Returns:
            score, domain, Spearman's rho over heads with its 95 % interval over prompts (low,
            high), and `expected`, the sign it has if inactive heads have small effects.

        Raises:
            ReportError: If heads were not ablated in this mode, or `of` is unknown.
        """
        import pandas as pd

        if of not in ("cost", "effect"):
            raise ReportError(f"An ablation has no {of!r}; choose 'cost' or 'effect'.")
        rows = []
        for domain, whole in self._whole(mode).items():
            change = self._by_head(domain, self.ablations[mode][domain].loss_change)
            change = change if of == "cost" else change.abs()
            for name, x in _per_head(self.reports[domain]).items():
                if name in FIELDS[1:]:
                    continue
                rho = rank_correlation(self._by_head(domain, x)[whole], change[whole])
                sign = -1 if INACTIVE_IF.get(name, "above") == "above" else 1
                rows.append(
                    {"score": name, "domain": domain, "rho": rho.mean, "low": rho.low}
                    | {"high": rho.high, "expected": sign}
                )
        return pd.DataFrame(rows)

    def typical_effect(self, mode: str) -> dict[str, float]:
        """Absolute change of a prompt's loss when the median head is ablated, by domain [nat].

        Mean over the prompts on which every head was ablated; nan if there are none.

        Args:
            mode: Mode of the ablation.

        Raises:
            ReportError: If heads were not ablated in this mode.
        """
        effects = {}
        for domain, whole in self._whole(mode).items():
            effect = self._by_head(domain, self.ablations[mode][domain].loss_change).abs()
            effects[domain] = float(effect[whole].quantile(0.5, dim=1).mean())
        return effects

    def _ablated(self, mode: str) -> dict[str, Ablation]:
        if mode not in self.ablations:
            raise ReportError(
                f"No head was ablated with mode {mode!r} here; call dormancy(..., remove={mode!r})."
            )
        return self.ablations[mode]

    def figures(self) -> dict[str, go.Figure]:
        """One domain against another, head by head; cost against sink attention, by mode."""
        from sinkscope.plot import ablation_effect, domain_scatter

        frame = self.to_frame()
        figures = {
            f"{one}-{other}": domain_scatter(frame, one, other, about=self.about)
            for one, other in self.p_values
        }
        for mode in self.ablations:
            counts = {int(whole.sum()) for whole in self._whole(mode).values()}
            on = " or ".join(counted(n, "prompt") for n in sorted(counts))
            line = f"{self.about} · ablated: {mode}, on {on} of each"
            figures[f"ablation-{mode}"] = ablation_effect(self.ablation_frame(mode), about=line)
        return figures

    def statistics(self) -> dict[str, Any]:
        """Counts, the heads that differ, and how well scores predict the effect of ablation."""
        return {
            "heads": int((~next(iter(self.p_values.values())).isnan()).sum()),
            "dormant": {domain: int(self.dormant(domain).sum()) for domain in self.reports},
            "significant": {
                f"{one} / {other}": int((p < self.level).sum())
                for (one, other), p in self.p_values.items()
            },
            "differing": self.differing(),
            "prediction": {
                mode: {
                    of: self.prediction(mode, of).to_dict("records") for of in ("cost", "effect")
                }
                for mode in self.ablations
            },
            "typical_effect": {mode: self.typical_effect(mode) for mode in self.ablations},
            "baseline_loss": {
                mode: {domain: estimate(one.loss) for domain, one in ablated.items()}
                for mode, ablated in self.ablations.items()
            },
        }

    def summary(self) -> str:
        """The dormant heads of each domain, whether the loss agrees, and what predicts it."""
        return _summary(self)


@argument("parked", "sink_threshold")
def dormancy(
    model: Any,
    domains: Mapping[str, Any] | Iterable[str] = ("prose", "code"),
    *,
    prompts: int = 16,
    length: int = 256,
    bos: str = "auto",
    remove: str | Sequence[str] = (),
    remove_prompts: int | None = None,
    sink_threshold: float = 0.5,
    drop: float = 0.25,
    level: float = 0.05,
    sinks: Any = (0,),
    seed: int = 0,
    out: str | Path | None = None,
    progress: bool = True,
) -> Dormancy:
    """Find heads that are dormant on one kind of text and active on another.

    A head is reported if its mean sink attention is above `sink_threshold` on one kind, lower by at
    least `drop` on the other, and the difference is significant after correction for the number of
    heads and of pairs of domains (`statistics.max_t`).

    Args:
        model: A bridge, or anything that `load_model` takes.
        domains: Kinds of text by name: anything that a scan takes. Names alone are sources of
            `texts`.
        prompts: Prompts of each domain that is given as a source.
        length: Tokens of each of these prompts.
        bos: BOS policy of these prompts.
        remove: Also ablate every head in turn, with "zero", "mean" or "resample" (or several of
            them) in its place; see `ablate_heads`. This takes most of the time.
        remove_prompts: On how many prompts of each domain; all by default. The heads that differ
            between domains are ablated on all prompts in any case.
        sink_threshold: Mean sink attention above which a head counts as dormant [probability].
        drop: How much lower sink attention has to be to count as active [probability].
        level: Family-wise error rate [probability].
        sinks: See `scan`.
        seed: Seed of texts, permutations and draws.
        out: A folder in which each result is saved as soon as it is measured, and from which an
            interrupted run continues.
        progress: Whether to draw progress bars.

    Returns:
        The scan of each domain, the tests between them, and the ablations.

    Raises:
        TextError: With fewer than two domains, or two prompts of one; if a prompt has a single
            token, or heads are to be ablated on no prompt.
        UnsupportedError: If the model cannot show what the scores need; or, with `remove`, has no
            loss or cannot start at any of its blocks.
        ReportError: If the folder holds results of another model, text or setting, another process
            is writing to it, or hooks or interventions are in force, which a folder cannot record.
    """
    model = load_model(model)
    folder = kept_in(out, model)
    modes = tuple(check_mode(mode, MODES) for mode in _names(remove))
    if modes:
        Partway(model)  # raise errors before the scans rather than after them
    if remove_prompts is not None and remove_prompts < 1:
        raise TextError(
            f"Heads cannot be ablated on {remove_prompts} prompts; give 1 or more, or None for all."
        )
    recipes = sources(domains, prompts=prompts, length=length, bos=bos, seed=seed)
    kinds = {name: recipe.tokenize(model).right_padded() for name, recipe in recipes.items()}
    _check(kinds)
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    once = isinstance(sinks, Iterable) and not isinstance(sinks, str)
    request = _Request(list(sinks) if once else sinks, seed, folder, progress)
    with nullcontext() if folder is None else locked(folder):
        reports = {name: _report(model, name, kind, request) for name, kind in kinds.items()}
        result = Dormancy(
            about=_about(model, kinds),
            reports=reports,
            p_values=_p_values(reports, seed),
            ablations={},
            sink_threshold=sink_threshold,
            drop=drop,
            level=level,
        )
        differing = [(head["layer"], head["head"]) for head in result.differing()]
        ablations = {
            mode: {
                name: ablate_heads(
                    model,
                    kind,
                    mode,
                    heads=_to_ablate(reports[name], differing, remove_prompts),
                    seed=seed,
                    file=request.file("ablation", mode, name),
                    progress=progress,
                )
                for name, kind in kinds.items()
            }
            for mode in modes
        }
    return dataclasses.replace(result, ablations=ablations)


@dataclass(frozen=True)
class _Request:
    """Options that all domains share."""

    sinks: Any
    seed: int
    out: Path | None
    progress: bool

    def file(self, *name: str) -> Path | None:
        """Return the path of a result in the output folder."""
        if self.out is None:
            return None
        return self.out / f"{'-'.join(map(file_stem, name))}.nc"


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
    result = {}
    for name, source in named.items():
        if not isinstance(source, str | Path):
            result[name] = as_texts(source)
        elif Path(source).suffix == ".json":
            result[name] = texts(source)
        else:
            result[name] = texts(source, prompts=prompts, length=length, bos=bos, seed=seed)
    return result


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


def _to_ablate(
    report: SinkReport, differing: list[tuple[int, int]], prompts: int | None
) -> Bool[Tensor, "prompt layer head"]:
    """All heads on the first prompts, and those that differ on all."""
    heads = torch.zeros_like(report["sink_attention"], dtype=torch.bool)
    heads[:prompts, list(report.settings.attending)] = True
    for layer, head in differing:
        heads[:, layer, head] = True
    return heads


def _about(model: Any, kinds: Mapping[str, Texts]) -> str:
    each = ", ".join(f"{len(kind)} × {name}" for name, kind in kinds.items())
    one, *_ = kinds.values()
    line = _result.about(model, one)
    return f"{line.rpartition(' · ')[0]} · {each}"


def _report(model: Any, name: str, kind: Texts, request: _Request) -> SinkReport:
    """Scan a domain, or load its saved report."""
    file = request.file(name)
    request_now = {} if file is None else request_of(model, kind, sinks=request.sinks)
    with Kept(SinkReport, file, request_now) as kept:
        report = kept.found or _scanned(model, kind, request)
        if kept.found is None:
            kept.write(report)
    return report


def _scanned(model: Any, kind: Texts, request: _Request) -> SinkReport:
    report = scan(model, kind, metrics=METRICS, sinks=request.sinks, progress=request.progress)
    return report.to("cpu")


def _p_values(
    reports: Mapping[str, SinkReport], seed: int
) -> dict[tuple[str, str], Float[Tensor, "layer head"]]:
    """Return p corrected for heads by the largest t, and for pairs of domains by Bonferroni."""
    pairs = list(itertools.combinations(reports, 2))
    return {
        (one, other): (
            max_t(reports[one]["sink_attention"], reports[other]["sink_attention"], seed=seed)
            * len(pairs)
        ).clamp(max=1)
        for one, other in pairs
    }


def _per_head(report: SinkReport) -> dict[str, Float[Tensor, "prompt layer head"]]:
    """Return every field and score of the heads on a domain, by name."""
    return {name: report[name] for name in FIELDS} | report.inactivity_scores()


def _with_ends(name: str, x: Float[Tensor, "prompt layer head"]) -> dict[str, Tensor]:
    mean, low, high = bootstrap(x)
    return {name: mean, f"{name}_low": low, f"{name}_high": high}


def _drop(head: Mapping[str, Any]) -> float:
    """Return how much lower the sink attention is where the head is active."""
    dormant, active = head["sink_attention"]
    return dormant.mean - active.mean


def _add_costs(
    heads: list[dict[str, Any]], ablated: Mapping[str, Ablation], mode: str, result: Dormancy
) -> None:
    """Add to the records the effects of ablation where a head is dormant and where it is active."""
    typical = result.typical_effect(mode).items()
    unit = {domain: effect if effect > 0 else 1.0 for domain, effect in typical}  # nan is not
    pairs = {(head["dormant_on"], head["active_on"]) for head in heads}
    for pair in pairs:
        own = [head for head in heads if (head["dormant_on"], head["active_on"]) == pair]
        layers, numbers = ([head[at] for head in own] for at in ("layer", "head"))
        dormant, active = (ablated[domain].loss_change[:, layers, numbers] for domain in pair)
        units = unit[pair[0]], unit[pair[1]]
        # Each pair and direction is a family of its own: Bonferroni over them.
        p = (max_t(active.abs() / units[1], dormant.abs() / units[0]) * len(pairs)).clamp(max=1)
        for index, head in enumerate(own):
            changes = dormant[:, index], active[:, index]
            effects = tuple(estimate(change.abs()) for change in changes)
            more = effects[1].mean / units[1] > effects[0].mean / units[0]
            head[mode] = {
                "cost": tuple(estimate(change) for change in changes),
                "effect": effects,
                "p": float(p[index]),
                "confirmed": bool(more and p[index] < result.level),
            }


def _summary(result: Dormancy) -> str:
    facts = result.statistics()
    counts = [f"{n} of {facts['heads']} on {domain}" for domain, n in facts["dormant"].items()]
    lines = [
        f"Sink heads (sink attention above {result.sink_threshold:g}): {listed(counts)}.",
        *(_pair(result, pair, n) for pair, n in facts["significant"].items()),
        _differing(result, facts["differing"]),
    ]
    for mode, tables in facts["prediction"].items():
        if facts["differing"]:
            lines.append(_confirmed(facts["differing"], mode, facts["typical_effect"][mode]))
        lines += [_prediction(mode, of, rows) for of, rows in tables.items()]
    return "\n".join(line for line in lines if line)


def _pair(result: Dormancy, pair: str, n: int) -> str:
    return (
        f"{pair}: sink attention differs in {counted(n, 'head')} (max-t permutation test over "
        f"prompts, family-wise error {result.level:.0%})."
    )


def _differing(result: Dormancy, heads: list[dict[str, Any]]) -> str:
    what = f"dormant on one and active on another (lower by {result.drop:g} or more)"
    if not heads:
        return f"No head is {what}."
    some = []
    for head in heads[:_NAMED]:
        here, there = (f"{attention.mean:.2f}" for attention in head["sink_attention"])
        kinds = f"{head['dormant_on']} {here}, {head['active_on']} {there}"
        some.append(f"{head['layer']}.{head['head']} ({kinds})")
    more = f", and {len(heads) - _NAMED} more" if len(heads) > _NAMED else ""
    return f"{len(heads)} {'is' if len(heads) == 1 else 'are'} {what}: {', '.join(some)}{more}."


def _confirmed(heads: list[dict[str, Any]], mode: str, typical: dict[str, float]) -> str:
    confirmed = [head for head in heads if head[mode]["confirmed"]]
    usual = ", ".join(f"{domain} {number(effect)}" for domain, effect in typical.items())
    text = (
        f"Ablation ({mode}) confirms {len(confirmed)} of {len(heads)}: its effect on a prompt's "
        f"loss is larger where the head is active, relative to the median head ({usual} nat)."
    )
    if not confirmed:
        return text

    def ratio(head: dict[str, Any]) -> float:
        dormant, active = head[mode]["effect"]
        return active.mean / dormant.mean

    some = []
    for head in sorted(confirmed, key=ratio, reverse=True)[:_NAMED]:
        dormant, active = (number(effect.mean) for effect in head[mode]["effect"])
        kinds = f"{head['dormant_on']} {dormant}, {head['active_on']} {active} nat"
        some.append(f"{head['layer']}.{head['head']} ({kinds})")
    return f"{text} Most: {listed(some)}."


_OF = {"cost": "the mean effect of ablation ({})", "effect": "its mean absolute effect ({})"}


def _prediction(mode: str, of: str, rows: list[dict[str, Any]]) -> str:
    """How well sink attention ranks heads, and which score ranks them best."""
    sentences = []
    for domain in dict.fromkeys(row["domain"] for row in rows):
        own = [row for row in rows if row["domain"] == domain]
        sink = next(row for row in own if row["score"] == "sink_attention")
        best = max(own, key=lambda row: row["rho"] * row["expected"])
        sentence = f"on {domain} sink attention ρ = {_interval(sink)}"
        if best is not sink:
            sentence += f", best {best['score']} ρ = {_interval(best)}"
        sentences.append(sentence)
    return f"Rank correlation with {_OF[of].format(mode)}: {'; '.join(sentences)}."


def _interval(row: dict[str, Any]) -> str:
    return f"{number(row['rho'])} [{number(row['low'])}, {number(row['high'])}]"

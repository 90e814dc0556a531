"""Quantities derived from a report: means with intervals; notable heads, dims and tokens."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.output import listed, plain
from sinkscope.report.chance import QUANTITIES, WITH_NULLS
from sinkscope.report.chance import chance_levels as levels_of
from sinkscope.report.fields import SinkFields, metric_of
from sinkscope.report.labelled import to_numpy
from sinkscope.statistics import Interval, bootstrap, mean_over_prompts
from sinkscope.validation import probability, real_number, shown, whole_number

_BESIDE = ("honor", "attention_entropy", "sink_logit_gap")
_PER_HEAD = ("prompt", "layer", "head")


class SinkQuantities(SinkFields):
    """The fields of a scan, with methods for quantities derived from them."""

    # -- over prompts ----------------------------------------------------------------------------

    def mean(self, name: str) -> Tensor:
        """Mean of a field over the prompts in which it is defined.

        A field without a prompt dimension is returned unchanged.

        Raises:
            ReportError: if the field is unknown or was not measured.
        """
        figures = self[name]
        if "prompt" not in self.variables()[name].dims:
            return figures
        return mean_over_prompts(figures if figures.is_floating_point() else figures.float())

    def interval(
        self, name: str, level: float = 0.95, resamples: int = 2000, seed: int = 0
    ) -> Interval:
        """Mean over prompts with its bootstrap interval.

        Args:
            name: a field with a prompt dimension.
            level: probability between the ends.
            resamples: number of bootstrap resamples of the prompts.
            seed: seed of the draws.

        Returns:
            (mean, low, high), each with the field's dimensions except the prompt.

        Raises:
            ReportError: if the field was not measured or is stored as a mean over prompts.
        """
        figures = self[name]
        if "prompt" not in self.variables()[name].dims:
            raise ReportError(
                f"{name} is stored as a mean over prompts, so it has no interval; only fields with "
                "a prompt dimension have one, such as sink_attention."
            )
        figures = figures if figures.is_floating_point() else figures.float()
        return bootstrap(figures, level, resamples, seed)

    # -- heads, dims, tokens ---------------------------------------------------------------------

    def top_heads(self, n: int = 10, by: str = "sink_attention") -> list[dict[str, Any]]:
        """The heads with the largest mean of a field, strongest first.

        Args:
            n: number of heads.
            by: a field with the dimensions prompt, layer and head.

        Returns:
            Records of layer, head, the field's mean with the low and high ends of its 95 %
            interval, and, where measured, honor, attention_entropy, sink_logit_gap and
            value_drain (of the head's kv_head).
        """
        n = whole_number("n", n, at_least=1, error=ReportError)
        mean, low, high = (end.cpu() for end in self.interval(by))
        if self.variables()[by].dims != _PER_HEAD:
            raise ReportError(
                f"Heads are ranked by a field with the dimensions {' '.join(_PER_HEAD)}, but {by} "
                f"has {' '.join(self.variables()[by].dims)}."
            )
        beside = {name: self.mean(name).cpu() for name in _BESIDE if name in self.measured()}
        drain = None if self.value_drain is None else self.mean("value_drain").cpu()
        heads = mean.shape[1]
        records = []
        for index in mean.flatten().nan_to_num(-torch.inf).argsort(descending=True)[:n].tolist():
            layer, head = divmod(index, heads)
            record = {"layer": layer, "head": head, by: float(mean[layer, head])}
            record |= {"low": float(low[layer, head]), "high": float(high[layer, head])}
            record |= {
                name: float(means[layer, head]) for name, means in beside.items() if name != by
            }
            if drain is not None:
                kv_head = head // self.settings.heads_per_kv_head
                record["value_drain"] = float(drain[layer, kv_head])
            records.append(record)
        return records

    def massive_activations(self) -> list[dict[str, Any]]:
        """The massive activations as records of prompt, layer, position, dim, value and ratio."""
        if self.massive is None:
            raise ReportError(self._not_measured("massive"))
        names = self.massive.measured("entry")
        columns = [self.massive[name].tolist() for name in names]
        return [dict(zip(names, entry, strict=True)) for entry in zip(*columns, strict=True)]

    def nonmixture_dims(
        self, over_median: float = 100.0, over_mixed: float = 10.0, share: float = 0.5
    ) -> list[dict[str, Any]]:
        """Non-mixture dims: FFN-output dims whose value at the sink is an outlier.

        This is an operational definition, because the rule of the original paper (Yan et al. 2024)
        is not public. The rule for one prompt is `sinkscope.metrics.ffn.nonmixture_dims`.

        Args:
            over_median: lower bound on |x| at the sink over the median |x| over dims.
            over_mixed: lower bound on |x| at the sink over the largest |x| of any mixed position.
            share: minimum share of prompts in which both bounds are exceeded.

        Returns:
            Records of layer, dim, value (mean over prompts), over_median, over_mixed (means) and
            share, largest |value| first.

        Raises:
            ReportError: if FFN outputs were not measured, or `over_median` is so low that in some
                prompt more dims may pass than the scan stored.
        """
        over_median = real_number("over_median", over_median, at_least=0, error=ReportError)
        over_mixed = real_number("over_mixed", over_mixed, at_least=0, error=ReportError)
        share = real_number("share", share, at_least=0, at_most=1, error=ReportError)
        shares = self._standing_out(over_median, over_mixed)
        means = {
            "value": self["ffn_sink_mean"],
            "over_median": self["ffn_over_median"],
            "over_mixed": self["ffn_over_mixed"],
            "share": shares,
        }
        passing = (shares >= share) & (shares > 0)
        layers, dims = (index.tolist() for index in passing.nonzero(as_tuple=True))
        columns = {name: figures[passing].tolist() for name, figures in means.items()}
        records = [
            {"layer": layer, "dim": dim} | {name: column[row] for name, column in columns.items()}
            for row, (layer, dim) in enumerate(zip(layers, dims, strict=True))
        ]
        return sorted(records, key=lambda record: -abs(record["value"]))

    def _standing_out(self, over_median: float, over_mixed: float) -> Float[Tensor, "layer dim"]:
        """The share of prompts in which each dim passes the rule of `nonmixture_dims`."""
        from sinkscope.metrics.ffn import nonmixture_dims as stands_out

        median = self["ffn_sink_median"]
        if self.ffn_sink is not None:
            x, mixed = self["ffn_sink"], self["ffn_mixed_max"]
            return stands_out(x, mixed, median, over_median, over_mixed).float().mean(0)
        x, mixed, dim = (self[f"ffn_largest_{name}"] for name in ("sink", "mixed", "dim"))
        mean = self["ffn_sink_mean"]
        lowest = x[..., -1].abs() > over_median * median  # a dim that was not stored may pass
        if x.shape[-1] < mean.shape[-1] and bool(lowest.any()):
            raise ReportError(
                f"over_median is {over_median:g}, which more than {x.shape[-1]} dims of a prompt "
                "exceed, but no more were stored; scan again with 'ffn_dims' among metrics=, or "
                "choose a larger over_median."
            )
        passing = stands_out(x, mixed, median, over_median, over_mixed)
        prompts, layers, ranks = passing.shape
        index = dim.long().clamp(min=0).permute(1, 0, 2).reshape(layers, prompts * ranks)
        flat = passing.float().permute(1, 0, 2).reshape(layers, prompts * ranks)
        return torch.zeros_like(mean).scatter_add_(1, index, flat.to(mean.dtype)) / prompts

    def inactivity_scores(self) -> dict[str, Float[Tensor, "prompt layer head"]]:
        """The thirteen scores of Sandoval-Segura et al. 2025 by name, including HONOR (AHON-LN).

        LTHON-LL is our addition to their LTHON-LN. `sinkscope.metrics.heads.INACTIVE_IF` states on
        which side of a threshold a head is inactive.
        """
        from sinkscope.metrics.heads import inactivity_scores

        return inactivity_scores(
            first_token_attention=self["first_token_attention"],
            attention_entropy=self["attention_entropy"],
            first_value_norm=self["first_value_norm"],
            mean_value_norm=self["mean_value_norm"],
            last_output_norm=self["last_output_norm"],
            head_output_norm=self["head_output_norm"],
        )

    def sink_heads(self, epsilon: float | None = None) -> Bool[Tensor, "layer head"]:
        """The sink heads: heads whose sink attention, averaged over prompts, exceeds ε.

        The summary, the head map, the page and the explorer all use this definition. Heads with
        undefined sink attention in every prompt are not sink heads.

        Args:
            epsilon: threshold [probability]; by default that of the scan.

        Raises:
            ReportError: if `sink_attention` was not measured.
        """
        threshold = self.settings.epsilon if epsilon is None else epsilon
        return self.mean("sink_attention") > threshold

    def chance_levels(self, quantity: str = "sink_attention") -> list[dict[str, Any]]:
        """Chance level under each null of a scan with ``nulls=``, and how many heads exceed it.

        p-values are one-sided and corrected for the number of heads (layers); those of heads are
        the fields p_initial, p_random and p_shuffled, and of KV heads p_initial_value_drain and
        p_random_value_drain.

        Args:
            quantity: "sink_attention" (heads), "residual_peak" (layers) or "value_drain" (KV
                heads, which a sink makes small).

        Returns:
            Records of null, draws, low, median and high (quantiles 0.025, 0.5 and 0.975, over
            draws, of the largest value over heads or layers, the smallest of a drain), tested and
            significant (how many heads or layers, and of how many p is at most 0.05). Peaks are
            not tested against random positions: position 0 attends to itself alone, so that its
            norm differs from theirs before any training.

        Raises:
            ReportError: If no null was drawn for it.
        """
        if quantity not in QUANTITIES:
            raise ReportError(
                f"Nulls are drawn for {listed(QUANTITIES)}, not for {shown(quantity)}."
            )
        if not (records := levels_of(self, quantity)):
            raise ReportError("No null was drawn; scan with nulls=20, for example.")
        return records

    def sink_rate_at(self, epsilon: float) -> float:
        """Sink rate of Gu et al. at any ε: share of (prompt, layer, head) above it [share].

        Computed for the first sink from `sink_importance`, so it is exact for every ε.
        """
        epsilon = probability("epsilon", epsilon, error=ReportError)
        importance = self["sink_importance"]
        defined = ~importance.isnan()
        return float(((importance > epsilon) & defined).sum() / defined.sum())

    def token_mask(
        self, residual_ratio: float = 10.0, attention: float = 0.3
    ) -> Bool[Tensor, "prompt position"]:
        """Mask of sink and outlier tokens, to exclude from training SAEs or probes or quantising.

        A token is marked if it is a sink, that is, its received attention averaged over all layers
        and heads exceeds `attention`; or an outlier, that is, after some layer the norm of its
        residual state exceeds `residual_ratio` times that layer's median. A criterion that was not
        measured is ignored. Position 0 gets no special treatment; padding is never marked.

        Args:
            residual_ratio: threshold of `residual_outlier`.
            attention: threshold of `received_peak`.

        Raises:
            ReportError: if neither was measured.
        """
        residual_ratio = real_number(
            "residual_ratio", residual_ratio, at_least=0, error=ReportError
        )
        attention = real_number("attention", attention, at_least=0, error=ReportError)
        if self.received_peak is None and self.residual_outlier is None:
            self._require("received_peak")
        marked = torch.zeros_like(self.mask)
        if self.received_peak is not None:
            marked |= (self.received_peak > attention).to(marked.device)
        if self.residual_outlier is not None:
            marked |= (self.residual_outlier > residual_ratio).to(marked.device)
        return marked & self.mask

    def _not_measured(self, name: str) -> str:
        if name in WITH_NULLS:
            return f"{name} was not measured: scan again with nulls=20, for example."
        metric = metric_of(name)
        if metric is None or metric in self.settings.metrics:
            return f"{name} was not measured: it is not defined for this model."
        return (
            f"{name} was not measured: scan again with the metric {metric!r} among metrics= "
            f"(this scan measured {', '.join(self.settings.metrics) or 'none'})."
        )


# -- a report as plain values, as printed by ``sinkscope scan --json`` -----------------------------

# Inputs of nonmixture_dims, which is written instead: values for every layer and dim.
_LEFT_OUT = ("ffn", "ffn_dims")


def plain_report(report: SinkQuantities) -> dict[str, Any]:
    """Every measured field as nested lists, by name.

    `sink_attention` and fields of single tokens, such as `tokens`, have a value per prompt; other
    fields are averaged over prompts. `massive_activations` and `nonmixture_dims` are lists of
    records. Fields that were not measured are left out; nan and inf are None, as JSON lacks them.
    """
    values: dict[str, Any] = {"settings": report.settings.to_dict()}
    if report.token_text is not None:
        values["token_text"] = report.token_text
    for name in report.measured():
        if report.variables()[name].metric in _LEFT_OUT:
            continue
        dims = report.variables()[name].dims
        whole = name == "sink_attention" or "position" in dims or "prompt" not in dims
        values[name] = nested(report[name] if whole else report.mean(name))
    if report.massive is not None:
        values["massive_activations"] = plain(report.massive_activations())
    if report.ffn_sink_mean is not None:
        values["nonmixture_dims"] = plain(report.nonmixture_dims())
    return values


def nested(tensor: Tensor) -> list[Any]:
    """The tensor as nested lists of numbers, each with the fewest digits that restore its value."""
    figures = to_numpy(tensor)
    if figures.dtype.kind != "f":
        return figures.tolist()
    flat = [
        float(text) if math.isfinite(figure) else None
        for text, figure in zip(figures.ravel().astype(str), figures.ravel(), strict=True)
    ]
    boxed = np.empty(figures.shape, dtype=object)
    boxed[...] = np.array(flat, dtype=object).reshape(figures.shape)
    return boxed.tolist()

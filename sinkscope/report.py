"""The result of a scan, and what one asks of it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope._bootstrap import Interval, bootstrap, mean_over_prompts
from sinkscope._fields import MassiveActivations, SinkFields
from sinkscope._metric_of import metric_of
from sinkscope._settings import Settings, library_versions
from sinkscope.errors import ReportError

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

__all__ = [
    "Interval",
    "MassiveActivations",
    "Settings",
    "SinkReport",
    "library_versions",
    "load_report",
]


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SinkReport(SinkFields):
    """Everything one scan measured: named tensors, with units and provenance.

    Attributes are tensors on the scan's device, or None where the scan did not measure them; the
    list is in `sinkscope._fields`. Figures that are cheap to keep for every prompt have a prompt
    dimension, so that `interval` can say how sure their mean is; the others are means over prompts,
    and `prompts_at` (for positions), `prompts_with_sink_at` (for `cosine_to_sink`) and
    `prompts_in_bucket` say over how many. A figure that a prompt does not define (a mean over the
    queries after the sink, where there is none) is nan.

    Example:
        >>> report = scan(model, texts("prose"))                        # doctest: +SKIP
        >>> report.sink_attention                                       # [prompt layer head]
        >>> report.interval("sink_attention").low                       # [layer head]
        >>> report.to_frame("sink_attention", "honor")
        >>> report.save("prose.nc")
    """

    # -- as tables and files ---------------------------------------------------------------------

    def to_frame(self, *names: str) -> pd.DataFrame:
        """A tidy frame: one row an observation, one column a dimension, then one a field.

        Args:
            names: fields of equal dimensions, or "massive" for the massive activations.

        Returns:
            Columns named by dimension and by field with unit, such as "sink_attention
            [probability]". Rows of single tokens also have the token's text, and none is padding.

        Raises:
            ReportError: a field that is unknown or was not measured, or dimensions that differ.
        """
        frame = super().to_frame(*names)
        if not {"prompt", "position"} <= set(frame):
            return frame
        real = self.mask.cpu().numpy()[frame["prompt"], frame["position"]]
        frame = frame.loc[real].reset_index(drop=True)
        if self.token_text is not None:
            places = zip(frame["prompt"], frame["position"], strict=True)
            column = list(frame).index("position") + 1
            frame.insert(column, "token", [self.token_text[p][i] for p, i in places])
        return frame

    def to_xarray(self) -> xr.Dataset:
        """Every measured field as an xarray Dataset.

        Variables have their dimensions, ``units`` and ``about``; the tokens' text is a coordinate
        [prompt position], "" where padded; the settings are attributes.
        """
        dataset = super().to_xarray()
        settings = self.settings.to_dict()
        versions = settings.pop("versions")
        dataset.attrs = {
            name: value if type(value) in (str, int, float) else json.dumps(value)
            for name, value in settings.items()
        } | {f"version_{library}": version for library, version in versions.items()}
        if self.token_text is None:
            return dataset
        positions = self.mask.shape[1]
        padded = [[*row, *[""] * (positions - len(row))] for row in self.token_text]
        return dataset.assign_coords(token=(("prompt", "position"), padded))

    def save(self, path: str | Path) -> Path:
        """Write the report to a ``.nc`` (netCDF 4) file, all of it or nothing; see `load_report`.

        Raises:
            ReportError: another suffix, or a path that cannot be written.
        """
        from sinkscope._netcdf import save

        return save(self, path)

    def to_dict(self) -> dict[str, Any]:
        """All figures as plain values, ready for JSON; see `sinkscope._plain.plain_report`."""
        from sinkscope._plain import plain_report

        return plain_report(self)

    def to_json(self) -> str:
        """One JSON object of all figures; nan and inf are null."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_html(self) -> str:
        """One interactive page with everything inside: no kernel, no request, no other file."""
        from sinkscope.plot.page import to_html

        return to_html(self)

    def merge(self, other: SinkReport) -> SinkReport:
        """The report of both reports' prompts, as if they had been scanned together.

        Prompts are laid end to end; means over prompts are weighted by how many they are over.
        Prompts of the two may differ in length.

        Raises:
            ReportError: where a setting that changes the meaning of the figures differs (the
                sentence names the first), only one report has a field, or `other` is no report.
        """
        from sinkscope._merge import merged_fields

        if not isinstance(other, SinkReport):
            raise ReportError(f"merge() takes a report of a scan, not {other!r:.80}.")
        settings = self.settings.merge(other.settings)
        if (self.massive is None) != (other.massive is None):
            raise ReportError(
                "These reports cannot be merged because only one of them has massive; scan both "
                "with the same metrics."
            )
        massive, text = self.massive, None
        if self.massive is not None and other.massive is not None:
            massive = self.massive.followed_by(other.massive, prompts=self.sizes["prompt"])
        if self.token_text is not None and other.token_text is not None:
            text = [*self.token_text, *other.token_text]
        return SinkReport(
            settings=settings, token_text=text, massive=massive, **merged_fields(self, other)
        )

    # -- over prompts ----------------------------------------------------------------------------

    def mean(self, name: str) -> Tensor:
        """Mean of a field over the prompts that define it; what has no prompts is given as it is.

        Raises:
            ReportError: a field that is unknown or was not measured.
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
            resamples: how many times the prompts are drawn anew.
            seed: of the draws.

        Returns:
            (mean, low, high), each with the field's dimensions but the prompt.

        Raises:
            ReportError: a field that was not measured or is a mean over prompts already.
        """
        figures = self[name]
        if "prompt" not in self.variables()[name].dims:
            raise ReportError(
                f"{name} is kept as a mean over prompts, so there is no interval to give; fields "
                "with a prompt dimension have one, such as sink_attention."
            )
        figures = figures if figures.is_floating_point() else figures.float()
        return bootstrap(figures, level, resamples, seed)

    # -- heads, dims, tokens ---------------------------------------------------------------------

    def top_heads(self, n: int = 10, by: str = "sink_attention") -> list[dict[str, Any]]:
        """The heads with the largest mean of a field, strongest first.

        Args:
            n: how many.
            by: a field with the dimensions prompt, layer and head.

        Returns:
            Records of layer, head, the field's mean with the low and high ends of its 95 %
            interval, and what else was measured of: honor, attention_entropy, sink_logit_gap,
            value_drain (of the head's kv_head).
        """
        from sinkscope._records import top_heads

        return top_heads(self, n, by)

    def massive_activations(self) -> list[dict[str, Any]]:
        """The massive activations as records of prompt, layer, position, dim, value and ratio."""
        from sinkscope._records import massive_activations

        return massive_activations(self)

    def nonmixture_dims(
        self, over_median: float = 100.0, over_mixed: float = 10.0, share: float = 0.5
    ) -> list[dict[str, Any]]:
        """FFN-output dims in which the sink stands out from dims and from positions.

        Operational, ours: the seed paper's rule (Yan et al. 2024) is not public. The rule for one
        prompt is `sinkscope.metrics.ffn.nonmixture_dims`.

        Args:
            over_median: |x| at the sink over the median |x| over dims has to exceed this.
            over_mixed: |x| at the sink over the largest |x| of any mixed position, likewise.
            share: in at least this share of prompts.

        Returns:
            Records of layer, dim, value (mean over prompts), over_median, over_mixed (means) and
            share, largest |value| first.
        """
        from sinkscope._records import nonmixture_dims

        return nonmixture_dims(self, over_median, over_mixed, share)

    def inactivity_scores(self) -> dict[str, Float[Tensor, "prompt layer head"]]:
        """The thirteen scores of Sandoval-Segura et al. 2025 by name, among them HONOR (AHON-LN).

        `sinkscope.metrics.heads.INACTIVE_IF` says which side of a threshold is inactive.
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

    def sink_rate_at(self, epsilon: float) -> float:
        """Gu's sink rate of the first sink at any ε: share of (prompt, layer, head) above it.

        Exact for every ε, because `sink_importance` keeps prompts, layers and heads [share].
        """
        importance = self["sink_importance"]
        defined = ~importance.isnan()
        return float(((importance > epsilon) & defined).sum() / defined.sum())

    def token_mask(
        self, residual_ratio: float = 10.0, attention: float = 0.3
    ) -> Bool[Tensor, "prompt position"]:
        """Sink and outlier tokens, to leave out when training SAEs or probes, or to quantise apart.

        A token is marked if it is a sink, that is, its received attention averaged over all layers
        and heads exceeds `attention`; or an outlier, that is, after some layer the norm of its
        residual state exceeds `residual_ratio` times that layer's median. What was not measured
        does not mark. Position 0 is not marked for being first, and padding never is.

        Args:
            residual_ratio: threshold of `residual_outlier`.
            attention: threshold of `received_peak`.

        Raises:
            ReportError: where neither was measured.
        """
        if self.received_peak is None and self.residual_outlier is None:
            self._require("received_peak")
        marked = torch.zeros_like(self.mask)
        if self.received_peak is not None:
            marked |= (self.received_peak > attention).to(marked.device)
        if self.residual_outlier is not None:
            marked |= (self.residual_outlier > residual_ratio).to(marked.device)
        return marked & self.mask

    # -- for people ------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from sinkscope._summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from sinkscope._summary import as_html

        return as_html(self)

    def _not_measured(self, name: str) -> str:
        from sinkscope.capture.observers import OBSERVERS

        metric = name if name in OBSERVERS else metric_of(name)
        if metric is None or metric in self.settings.metrics:
            return f"{name} was not measured: it does not exist for this model."
        return (
            f"{name} was not measured: scan again with the metric {metric!r} among metrics= "
            f"(this scan had {', '.join(self.settings.metrics) or 'none'})."
        )


def load_report(path: str | Path) -> SinkReport:
    """Read a report that `SinkReport.save` wrote; its tensors are on the CPU.

    Raises:
        ReportError: a file that is missing, damaged, of another kind, or from a newer sinkscope.
    """
    from sinkscope._netcdf import load

    return load(SinkReport, path)

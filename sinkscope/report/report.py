"""The result of a scan."""

from __future__ import annotations

import dataclasses
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sinkscope.errors import ReportError
from sinkscope.report.quantities import SinkQuantities

if TYPE_CHECKING:
    import pandas as pd
    import xarray as xr

    from sinkscope.report.patterns import HeadPatterns

_PAGE = "sinkscope.html.report_page"
"""The module that renders a report as a page, imported by name, as it is in a higher layer."""


class SinkReport(SinkQuantities):
    """The result of a scan: named tensors with units and provenance.

    Attributes are tensors on the scan's device, or None if the scan did not measure them; they are
    listed in `sinkscope.report.fields`. Values that are cheap to store for every prompt have a
    prompt dimension, from which `interval` computes confidence intervals. The others are means over
    prompts, whose numbers are in `prompts_at` (for positions), `prompts_with_sink_at` (for
    `cosine_to_sink`) and `prompts_in_bucket`. A value that is undefined in a prompt (a mean over
    the queries after the sink, if there are none) is nan.

    Example:
        >>> report = scan(model, texts("prose"))                        # doctest: +SKIP
        >>> report.sink_attention                                       # [prompt layer head]
        >>> report.interval("sink_attention").low                       # [layer head]
        >>> report.to_frame("sink_attention", "honor")
        >>> report.save("prose.nc")
    """

    # -- as tables and files ---------------------------------------------------------------------

    def to_frame(self, *names: str) -> pd.DataFrame:
        """A tidy frame: one row per observation, one column per dimension, then one per field.

        Args:
            names: fields of equal dimensions, or "massive" for the massive activations.

        Returns:
            Columns named by dimension and by field with unit, such as "sink_attention
            [probability]". Fields with prompt and position also have a column with the token's
            text, and no rows for padding.

        Raises:
            ReportError: if a field is unknown or was not measured, or dimensions differ.
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

    def heads(self, level: float = 0.95) -> pd.DataFrame:
        """One row per head: means over prompts with intervals, for every field of heads.

        Args:
            level: probability between the ends of the bootstrap intervals.

        Returns:
            layer, head, kv_head, sink_head (see `sink_heads`), then for each measured field with
            the dimensions prompt, layer and head or kv_head three columns: ``honor``,
            ``honor_low``, ``honor_high``. Values of KV heads are repeated for each query head of
            the group. ``attrs`` has "units" and "about" by column, "level", "model", "text" and
            "weights".
        """
        from sinkscope.report.features import heads

        return heads(self, level)

    def features(self, *names: str) -> pd.DataFrame:
        """One row of features per prompt, for probes and classifiers.

        Args:
            names: fields with a prompt and no position. The default features are the keys that
                receive the most attention from each head, with their positions and value norms
                (metric "top_received"; Binkowski et al. 2026, arXiv 2604.10697), sink attention,
                value drains and residual peaks.

        Returns:
            One column per entry, named by field and coordinates, such as ``top_received_L5H3R0``
            (layer 5, head 3, rank 0, the strongest) or ``value_drain_L5KV1``; the index is the
            prompt. Values that are undefined for a model or a prompt are nan. ``attrs`` has
            "units", "about" and "not_measured": default fields that were not measured, each with
            its metric.

        Raises:
            ReportError: if a named field is unknown, was not measured or has positions, or if none
                of the default ones was measured.
        """
        from sinkscope.report.features import features

        return features(self, *names)

    def head_differences(
        self,
        other: SinkReport,
        name: str = "sink_attention",
        level: float = 0.95,
        seed: int = 0,
    ) -> pd.DataFrame:
        """Compare each head between this text and another one, with unpaired prompts.

        Args:
            other: report of other prompts on the same model.
            name: field with the dimensions prompt, layer and head or kv_head; with sink_attention
                the difference is the sink divergence of Surgery (2026, arXiv 2602.05228).
            level: probability between the ends; p-values below 1 - level count as significant.
            seed: seed of the resamples and permutations.

        Returns:
            One row per head: layer, head, means on "this" and the "other" text, their "difference"
            with "low" and "high" (bootstrap), "p" (corrected for all heads, see
            `sinkscope.statistics.max_t`; nan if the field is undefined in some prompt), and the
            share of pairs of prompts in which this text is "higher" and "lower". ``attrs`` has the
            counts of heads: "heads_higher", "heads_lower", "heads_equal", "heads_undefined",
            "significantly_higher", "significantly_lower".

        Raises:
            ReportError: if models or interventions differ, or the field is unsuitable.
            TextError: if a text has fewer than two prompts.
        """
        from sinkscope.report.features import head_differences

        return head_differences(self, other, name, level, seed)

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
        """Write the report to a ``.nc`` (netCDF 4) file atomically; see `load_report`.

        Raises:
            ReportError: if the suffix is not .nc, or the path cannot be written.
        """
        from sinkscope.report.netcdf import save

        return save(self, path)

    def to_dict(self) -> dict[str, Any]:
        """All values as JSON types; see `quantities.plain_report`."""
        from sinkscope.report.quantities import plain_report

        return plain_report(self)

    def to_json(self) -> str:
        """All values as one JSON object; nan and inf are null."""
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_html(self, patterns: HeadPatterns | None = None) -> str:
        """Render the report as one self-contained interactive HTML page.

        Args:
            patterns: attention patterns of the first prompts, which are not part of a report; see
                `sinkscope.capture.patterns.head_patterns`. By default the page shows none.
        """
        return importlib.import_module(_PAGE).to_html(self, patterns)

    def merge(self, other: SinkReport) -> SinkReport:
        """Merge two reports of different prompts, as if these had been scanned together.

        Prompts are concatenated; means over prompts are weighted by their numbers of prompts.
        Prompts of the two may differ in length.

        Raises:
            ReportError: if a setting that affects the meaning of the values differs (the message
                names the first), only one report has a field, or `other` is not a report.
        """
        from sinkscope.report.chance import derived
        from sinkscope.report.merge import merged_fields

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
        merged = type(self)(
            settings=settings, token_text=text, massive=massive, **merged_fields(self, other)
        )
        return dataclasses.replace(merged, **derived(merged))

    # -- display ---------------------------------------------------------------------------------

    def __repr__(self) -> str:
        from sinkscope.report.summary import as_text

        return as_text(self)

    def _repr_html_(self) -> str:
        from sinkscope.report.summary import as_html

        return as_html(self)


def load_report(path: str | Path) -> SinkReport:
    """Load a report saved by `SinkReport.save`; its tensors are on the CPU.

    Args:
        path: path of the ``.nc`` file.

    Returns:
        The report, equal to the saved one.

    Raises:
        ReportError: if the file is missing, damaged, of another kind, or from a newer sinkscope.
    """
    from sinkscope.report.netcdf import load

    return load(SinkReport, path)

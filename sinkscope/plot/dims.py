"""Channels in which the sink stands out: non-mixture dimensions and massive activations."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import plotly.graph_objects as go
import torch
from jaxtyping import Float
from plotly.subplots import make_subplots
from torch import Tensor

from sinkscope.errors import ReportError
from sinkscope.output import number
from sinkscope.plot.bins import Bins, bins
from sinkscope.plot.figure import finish, layer_ticks
from sinkscope.plot.labels import plain_about
from sinkscope.plot.scales import WHOLE, log_bar, log_colours, log_range, log_scale
from sinkscope.plot.theme import Palette, Theme, palette
from sinkscope.plot.values import checked_index, require_known, require_report
from sinkscope.report.labelled import to_numpy
from sinkscope.statistics import bootstrap

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport


def nonmixture_dims(
    report: SinkReport,
    layer: int | None = None,
    *,
    over_median: float = 100.0,
    over_mixed: float = 10.0,
    share: float = 0.5,
    top: int = 10,
    theme: Theme = None,
) -> go.Figure:
    """FFN output of a layer at the sink against all mixed positions (Yan et al., Fig. 1).

    On the left every dim: the sink's value, and how far any mixed position reaches either way. On
    the right the largest dims in size, with 95 % intervals over prompts. Dims that pass the rule of
    `SinkReport.nonmixture_dims` (operational, ours) are labelled in bold.

    Args:
        report: The report of a scan.
        layer: The layer; by default the one with the largest dim that passes the rule, or else that
            in which the sink stands out most from the mixed positions.
        over_median: The rule's thresholds, as `SinkReport.nonmixture_dims` takes them: over the
            median of the dims,
        over_mixed: over the largest of the mixed positions,
        share: and the share of prompts in which a dim has to pass both.
        top: Largest number of dims on the right, of those that were kept for every prompt.
        theme: "light", "dark", or the default.

    Returns:
        Two panels: every dim of the layer's FFN output, and the dims that stand out most.

    Raises:
        ReportError: If FFN outputs were not measured, there is no such layer, or, without a given
            layer, no prompt has a mixed position.
    """
    require_report("report", report)
    layer = checked_index(report, "layer", layer)
    dims = report.nonmixture_dims(over_median, over_mixed, share)
    layer = standout_layer(report, dims) if layer is None else layer
    passing = {r["dim"] for r in dims if r["layer"] == layer}
    value, reach = (to_numpy(report[f"ffn_{of}_mean"][layer]) for of in ("sink", "mixed"))
    largest, sink, mixed = _largest_dims(report, layer, value, top)
    colours = palette(theme)
    places = bins(len(value))
    every = f"every dim, maxima of {len(places.first):,} bins" if places.binned else "every dim"
    figure = make_subplots(
        1, 2, column_widths=[0.62, 0.38], horizontal_spacing=0.14,
        subplot_titles=[every, f"the {len(largest)} largest, in size"],
    )  # fmt: skip
    _every_dim(figure, places, value, reach, colours)
    for dim in largest[:3]:
        text = f"<b>{dim}</b>" if dim in passing else str(dim)
        figure.add_annotation(
            x=dim, y=value[dim], text=text, showarrow=False, yshift=10 if value[dim] > 0 else -10,
            row=1, col=1,
        )  # fmt: skip
    names = [f"<b>{dim}</b>" if dim in passing else str(dim) for dim in largest]
    for figures, name, colour in (
        (sink.abs(), "sink", colours.sink),
        (mixed, "largest of the mixed positions", colours.other),
    ):
        mean, low, high = (to_numpy(end) for end in bootstrap(figures))
        figure.add_bar(
            x=names, y=mean, name=name, showlegend=False, marker_color=colour, row=1, col=2,
            error_y=dict(
                symmetric=False, array=high - mean, arrayminus=mean - low, thickness=1,
                color=colours.ink,
            ),
            hovertemplate=f"{name}, dim %{{x}}<br>|FFN output| [activation]: %{{y:,.4~r}}"
            "<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="dim", tickformat=WHOLE, col=1)
    figure.update_xaxes(title_text="dim", type="category", dtick=1, col=2)
    figure.update_yaxes(title_text="FFN output [activation]", tickformat=WHOLE, col=1)
    means = np.stack([np.abs(value[largest]), reach[largest]])
    figure.update_yaxes(
        title_text="|FFN output| [activation]", col=2,
        **log_scale(np.append(means, means.min() / 10)), range=log_range(means),
    )  # fmt: skip
    figure.update_annotations(font_size=13)
    figure.update_layout(legend=dict(y=1.07))
    listed = ", ".join(map(str, sorted(passing))) or "none"
    title = f"Non-mixture dims of layer {layer}: {listed}"
    rule = f"over {over_median:g} × median, {over_mixed:g} × mixed"
    about = f"{plain_about(report.settings)} · {rule}"
    return finish(figure, title, about, theme, height=480)


def standout_layer(report: SinkReport, dims: list[dict[str, Any]]) -> int:
    """Return the layer whose FFN output stands out most at the sink, given the passing dims."""
    if dims:
        return dims[0]["layer"]
    require_known(report, "ffn_mixed_mean")
    sink, mixed = (to_numpy(report[f"ffn_{of}_mean"]) for of in ("sink", "mixed"))
    sink, mixed = np.abs(sink).max(axis=1), mixed.max(axis=1)
    # If both norms are zero, as with zero weights, nothing stands out.
    ratio = np.divide(sink, mixed, out=np.zeros_like(sink), where=(sink > 0) & ~np.isnan(mixed))
    return int(ratio.argmax())


def _largest_dims(
    report: SinkReport, layer: int, value: np.ndarray, top: int
) -> tuple[np.ndarray, Float[Tensor, "prompt dim"], Float[Tensor, "prompt dim"]]:
    """Return the dims of a layer with the largest mean, and the values of every prompt there.

    If only the largest dims of each prompt were kept, use those that all prompts with a sink share.
    """
    order = np.argsort(-np.nan_to_num(np.abs(value)))
    if report.ffn_sink is not None:
        chosen = torch.from_numpy(order[:top])
        return order[:top], *(
            report[name][:, layer, chosen].float() for name in ("ffn_sink", "ffn_mixed_max")
        )
    kept = report["ffn_largest_dim"][:, layer]
    has_sink = kept[:, 0] >= 0
    times = torch.bincount(kept[has_sink].flatten(), minlength=len(value))
    shared = to_numpy(times == has_sink.sum())
    dims = order[shared[order]][:top]
    at = (kept[:, None, :] == torch.from_numpy(dims)[:, None].to(kept)).float().argmax(dim=2)
    by_prompt = (
        report[f"ffn_largest_{of}"][:, layer].float().gather(1, at) for of in ("sink", "mixed")
    )
    return dims, *by_prompt


def massive_activations(report: SinkReport, *, top: int = 20, theme: Theme = None) -> go.Figure:
    """Map of the massive activations over layers and dims (rule of Sun et al. 2402.17762).

    Args:
        report: The report of a scan.
        top: Dims to draw, those with the largest activations.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are layers, columns the dims with the largest activations.

    Raises:
        ReportError: If massive activations were not measured.
    """
    require_report("report", report)
    if report.massive is None:
        raise ReportError(report._not_measured("massive"))
    frame = report.to_frame("massive")
    value, ratio = "value [activation]", "ratio [ratio]"
    frame["size"] = frame[value].abs()
    largest = frame.groupby("dim")["size"].max()
    dims = largest.nlargest(top).index.tolist()
    cells = frame[frame["dim"].isin(dims)].groupby(["dim", "layer"])
    prompts = report.sizes["prompt"]
    grid = np.full((len(dims), report.settings.n_layers), np.nan)
    hover = np.full(grid.shape, "", dtype=object)
    for (dim, layer), rows in cells:
        place = dims.index(dim), int(layer)
        grid[place] = rows["size"].max()
        at = ", ".join(str(p) for p in sorted(rows["position"].unique())[:6])
        hover[place] = (
            f"largest value: {number(rows.loc[rows['size'].idxmax(), value])}<br>"
            f"{rows['prompt'].nunique()} of {prompts} prompts, position {at}<br>"
            f"up to {number(rows[ratio].max())} × the median"
        )
    z, low, high = log_colours(grid)
    low = min(low, high - 1)  # a decade at least, or a hundredth more is as far as blue from yellow
    rows = 24 * max(len(dims), 4)  # pixels
    bar = dict(title=dict(text="largest |value| [activation]", side="right"))
    figure = go.Figure(
        go.Heatmap(
            y=[str(dim) for dim in dims], z=z, zmin=low, zmax=high, text=hover,
            xgap=1, ygap=1, hoverongaps=False, colorbar=bar | log_bar(low, high, rows),
            hovertemplate="layer %{x}, dim %{y}<br>%{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(
        title_text="layer", range=[-0.5, grid.shape[1] - 0.5], showgrid=False,
        **layer_ticks(grid.shape[1]),
    )  # fmt: skip
    figure.update_yaxes(title_text="dim", type="category", autorange="reversed", showgrid=False)
    if not dims:
        _empty(figure)
    passing = int(report.massive.count.sum())
    kept = f", the {len(frame):,} largest" if len(frame) < passing else ""
    drawn = f", the {len(dims)} largest drawn" if len(dims) < len(largest) else ""
    word = "dim" if len(largest) == 1 else "dims"
    title = (
        f"Massive activations: {passing:,}{kept} in {len(largest)} {word}{drawn}"
        if len(frame)
        else "Massive activations: none passes the rule"
    )
    return finish(figure, title, report.settings, theme, height=230 + rows)


def _empty(figure: go.Figure) -> None:
    """Add a sentence to a figure with nothing to draw."""
    figure.data = ()
    figure.update_xaxes(visible=False).update_yaxes(visible=False)
    figure.add_annotation(
        text="No activation is above 100 and above 1,000 times the median of its hidden state.",
        showarrow=False, x=0, xref="paper", xanchor="left", y=1, yref="paper", yanchor="top",
    )  # fmt: skip


def _every_dim(
    figure: go.Figure, places: Bins, value: np.ndarray, reach: np.ndarray, colours: Palette
) -> None:
    """The sink's FFN output over all dims, and the reach of the mixed positions behind it.

    Each curve draws its own largest dim of a bin, which may differ.
    """
    dims, reached = places.argmax(np.abs(value)), places.argmax(reach)
    for sign, name in ((1, "largest of the mixed positions, either way"), (-1, "")):
        figure.add_scatter(
            x=reached, y=sign * reach[reached], mode="lines", name=name, showlegend=sign > 0,
            line=dict(color=colours.other, width=1), hoverinfo="skip", row=1, col=1,
        )  # fmt: skip
    figure.add_bar(
        x=dims, y=value[dims], name="sink, mean over prompts", marker_color=colours.sink,
        width=max(1.0, len(value) / 300), row=1, col=1, customdata=reach[dims],
        hovertemplate="dim %{x}<br>FFN output at the sink [activation]: %{y:,.4~r}<br>"
        "largest of the mixed positions: %{customdata:,.4~r}<extra></extra>",
    )  # fmt: skip

"""Curves over training: how sinks, drains and peaks grow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from sinkscope.output import number
from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped, in_words
from sinkscope.plot.lines import band
from sinkscope.plot.scales import log_scale
from sinkscope.plot.theme import Palette, Theme, faded, palette

if TYPE_CHECKING:
    import pandas as pd


_MOST = {"sink": 1.0}  # the largest possible value of a phenomenon; none can be negative
_RISKS = ("backcopy_excess", "bigram_excess")


def mitigations(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """A cell per run and phenomenon: whether it is present, its mean and interval over seeds.

    The frame is what `sinkscope.bb.summarise` gives, one row per cell:

    ==================== ===== ===================================================================
    column               type  meaning
    ==================== ===== ===================================================================
    attention, optimizer str   what was trained; together the row's name
    phenomenon           str   such as "sink", "drain", "peak"; one column each
    mean, low, high      float over seeds, with the 95 % interval (nan for one seed)
    present              str   "yes", "no" or "unclear"; with a question mark for one seed
    ==================== ===== ===================================================================

    Args:
        frame: As above.
        about: A line on the training: layers, steps, seeds.
        theme: "light", "dark", or the default.

    Returns:
        One heatmap: rows are runs, columns phenomena; every cell has its verdict in words.

    Raises:
        ReportError: If a column is missing.
    """
    columns = ("attention", "optimizer", "phenomenon", "mean", "low", "high", "present")
    frames.need(frame, "mitigations", *columns)
    colours = palette(theme)
    runs = list(dict.fromkeys(zip(frame["attention"], frame["optimizer"], strict=True)))
    kinds = list(dict.fromkeys(frame["phenomenon"]))
    level = np.full((len(runs), len(kinds)), np.nan)
    text = np.full(level.shape, "", dtype=object)
    for row in frame.itertuples():
        place = runs.index((row.attention, row.optimizer)), kinds.index(row.phenomenon)
        level[place] = {"yes": 1.0, "no": 0.0}.get(row.present.rstrip("?"), 0.5)
        interval = _interval(row.phenomenon, row.low, row.high)
        text[place] = f"<b>{escaped(row.present)}</b>, {number(row.mean)}{interval}"
    scale = [[0, faded(colours.other, 0.35)], [0.5, faded(colours.faint, 0.25)]]
    figure = go.Figure(
        go.Heatmap(
            x=[escaped(kind) for kind in kinds],
            y=[escaped(" · ".join(run)) for run in runs],
            z=level, zmin=0, zmax=1, colorscale=[*scale, [1, faded(colours.sink, 0.55)]],
            showscale=False, xgap=2, ygap=2, text=text, texttemplate="%{text}",
            textfont=dict(color=colours.ink, size=12),
            hovertemplate="%{y}<br>%{x}: %{text}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_xaxes(side="top", showgrid=False, title_text="phenomenon")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    title = "Which attention and optimiser grow which phenomenon"
    finish(figure, title, about, theme, height=180 + 52 * len(runs))
    return figure.update_layout(margin_t=130)


def _interval(phenomenon: str, low: float, high: float) -> str:
    """A cell's second line; an interval beyond the possible range means too few seeds."""
    if np.isnan(low):
        return ""
    if low < 0 or high > _MOST.get(phenomenon, np.inf):
        return "<br>too few seeds"
    return f"<br>{number(low)} to {number(high)}"


def knockout_risks(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Bars: both risks of a trained model, unchanged and under every intervention.

    The frame is what `sinkscope.bb.knockouts` gives, one row per intervention:

    ============================== ===== =========================================================
    column                         type  meaning
    ============================== ===== =========================================================
    intervention                   str   such as "none", "zero attention", "zero feed-forward"
    layer, head                    int   where; -1 where it has none
    backcopy_excess, bigram_excess float risk over the Bayes optimum [nat]
    ============================== ===== =========================================================

    Args:
        frame: As above.
        about: A line on the training.
        theme: "light", "dark", or the default.

    Returns:
        Two bars per intervention, the excess of the backcopy risk and that of the bigram risk.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "knockout_risks", "intervention", "layer", "head", *_RISKS)
    colours = palette(theme)
    names = [_where(*row) for row in frame[["intervention", "layer", "head"]].itertuples(False)]
    figure = go.Figure()
    for risk, colour in zip(_RISKS, (colours.sink, colours.other), strict=True):
        figure.add_bar(
            y=names, x=frame[risk], orientation="h", name=in_words(risk), marker_color=colour,
            hovertemplate=f"%{{y}}<br>{in_words(risk)} [nat]: %{{x:.4~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="excess risk [nat]")
    figure.update_yaxes(autorange="reversed", showgrid=False)
    return finish(figure, "What each part carries", about, theme, height=160 + 40 * len(names))


def _where(intervention: str, layer: int, head: int) -> str:
    parts = [str(intervention)]
    parts += [f"layer {layer}"] if layer >= 0 else []
    parts += [f"head {head}"] if head >= 0 else []
    return escaped(", ".join(parts))


_DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
LOG_METRICS = ("backcopy_risk", "bigram_excess", "backcopy_excess")


def training_curves(
    frame: pd.DataFrame,
    metrics: Sequence[str] | None = None,
    *,
    about: About,
    laws: pd.DataFrame | None = None,
    log_steps: bool = True,
    columns: int = 3,
    theme: Theme = None,
) -> go.Figure:
    """One panel per metric against the training step; runs by colour, fitted laws dashed.

    The frame is tidy, one row per observation; it is what `sinkscope.bb` logs:

    ============ ====== ==========================================================================
    column       type   meaning
    ============ ====== ==========================================================================
    step         int    optimiser step
    metric       str    what was measured, such as "sink_attention", "logit_gap", "value_norm"
    layer, head  int    -1 where the metric has none; one line for each pair
    value        float  the value
    run          str    name of a run (optional); one colour each
    seed         int    seed of a run (optional): the seeds of one run are averaged, with the 95 %
                        interval of the mean over seeds, and each seed faint behind it
    ============ ====== ==========================================================================

    Args:
        frame: As above.
        metrics: Metrics to draw, in the order of the panels; by default all in the frame.
        about: A line on the training; for checkpoints of a pretrained model its settings.
        laws: Fitted laws: a frame with the columns metric, step, value, law (for example "a + b ln
            t"), and run where the curves have it. Drawn dashed.
        log_steps: Whether the steps' axis is logarithmic; step 0 is then left out.
        columns: Panels in a row.
        theme: "light", "dark", or the default.

    Returns:
        One panel per metric against the step; one colour per run, with a band where there are
        several seeds.

    Raises:
        ReportError: If a column or a metric is missing.
    """
    frames.need(frame, "training_curves", "step", "metric", "value")
    frame = _complete(frame)
    wanted = list(metrics) if metrics is not None else list(dict.fromkeys(frame["metric"]))
    colours = palette(theme)
    named = _told_apart(frame[frame["metric"].isin(wanted)])
    columns = min(columns, len(wanted))
    lines = -(-len(wanted) // columns)
    figure = make_subplots(
        lines, columns, shared_xaxes=True, horizontal_spacing=0.08,
        vertical_spacing=min(0.12, 0.4 / lines),
        subplot_titles=[frames.label_of(metric) for metric in wanted],
    )  # fmt: skip
    for index, metric in enumerate(wanted):
        place = dict(row=index // columns + 1, col=index % columns + 1)
        rows = frames.pick(frame, "metric", metric)
        rows = rows[rows["step"] > 0] if log_steps else rows
        _curves(figure, rows, metric, place, colours, named)
        if laws is not None:
            fitted = _complete(frames.need(laws, "training_curves(laws=…)", "metric", "law"))
            _fits(figure, fitted[fitted["metric"] == metric], metric, place, colours)
        if metric in LOG_METRICS:
            figure.update_yaxes(**log_scale(rows["value"].to_numpy()), **place)
    figure.update_annotations(font_size=13)
    figure.update_xaxes(**(dict(type="log", dtick=1) if log_steps else dict(type="linear")))
    figure.update_xaxes(title_text="training step", row=lines)
    return finish(figure, "Over training", about, theme, height=180 + 240 * lines)


def _complete(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with the optional columns filled in."""
    defaults = {"run": "", "seed": 0, "layer": -1, "head": -1}
    return frame.assign(**{name: value for name, value in defaults.items() if name not in frame})


def _curves(
    figure: go.Figure,
    rows: pd.DataFrame,
    metric: str,
    place: dict[str, int],
    colours: Palette,
    named: set[str],
) -> None:
    """Draw runs by colour; a single run by head in colour, several by head in dashes."""
    runs = list(dict.fromkeys(rows["run"]))
    heads = list(dict.fromkeys(zip(rows["layer"], rows["head"], strict=True)))
    for (run, layer, head), line in rows.groupby(["run", "layer", "head"], sort=False):
        one = heads.index((layer, head))
        several = len(runs) > 1
        colour = colours.series[(runs.index(run) if several else one) % len(colours.series)]
        name = _name(run, layer, head) or in_words(metric)
        entry = _name(
            run if "run" in named else "",
            layer if "layer" in named else -1,
            head if "head" in named else -1,
        )
        label = frames.label_of(metric)
        if line["seed"].nunique() > 1:
            _seeds(figure, line, f"{name}, seed", label, faded(colour, 0.4), place)
        curve = frames.over_prompts(line.assign(prompt=line["seed"]), "step")
        band(
            figure, curve["step"], (curve["mean"], curve["low"], curve["high"]), name=name,
            entry=entry, colour=colour, label=label, along="step",
            dash=_DASHES[one % len(_DASHES)] if several else None,
            showlegend=entry != "" and not _drawn(figure, entry), **place,
        )  # fmt: skip


def _seeds(
    figure: go.Figure,
    line: pd.DataFrame,
    name: str,
    label: str,
    colour: str,
    place: dict[str, int],
) -> None:
    """Draw each seed faintly behind the mean."""
    for seed, own in line.groupby("seed"):
        figure.add_scatter(
            x=own["step"], y=own["value"], mode="lines", showlegend=False,
            line=dict(width=1, color=colour),
            hovertemplate=f"{name} {seed}, step %{{x}}<br>{label}: %{{y:.4~g}}<extra></extra>",
            **place,
        )  # fmt: skip


def _fits(
    figure: go.Figure,
    laws: pd.DataFrame,
    metric: str,
    place: dict[str, int],
    colours: Palette,
) -> None:
    for (run, law), fitted in laws.groupby(["run", "law"], sort=False):
        name = escaped(" ".join(filter(None, (str(run), str(law)))))
        figure.add_scatter(
            x=fitted["step"], y=fitted["value"], mode="lines", name=name,
            showlegend=not _drawn(figure, name), legendgroup=name,
            line=dict(color=colours.ink, dash="dash", width=1.5),
            hovertemplate=f"{name}, step %{{x}}<br>{frames.label_of(metric)}: %{{y:.4~g}}"
            "<extra></extra>",
            **place,
        )  # fmt: skip


def _told_apart(frame: pd.DataFrame) -> set[str]:
    """Return what a legend has to name: runs if there are several, otherwise layers and heads."""
    if frame["run"].nunique() > 1:
        return {"run"}
    of_heads = frame[frame["head"] >= 0]
    many = {"layer": frame[frame["layer"] >= 0]["layer"].nunique() > 1}
    many["head"] = bool((of_heads.groupby("layer")["head"].nunique() > 1).any())
    return {name for name, several in many.items() if several}


def _name(run: str, layer: int, head: int) -> str:
    """Return a line's name from what distinguishes it."""
    parts = [str(run)] if run else []
    parts += [f"layer {layer}"] if layer >= 0 else []
    parts += [f"head {head}"] if head >= 0 else []
    return escaped(" ".join(parts))


def _drawn(figure: go.Figure, name: str) -> bool:
    return any(trace.name == name and trace.showlegend for trace in figure.data)

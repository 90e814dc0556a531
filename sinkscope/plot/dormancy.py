"""Heads on two kinds of text, the effect of ablating them, and of ablating many at once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import plotly.graph_objects as go

from sinkscope.errors import ReportError
from sinkscope.plot import frames
from sinkscope.plot.figure import ROOM, finish, layer_bar
from sinkscope.plot.labels import About, escaped, heading, in_words, with_unit
from sinkscope.plot.lines import band
from sinkscope.plot.scales import squeezed, ticks, unit_for
from sinkscope.plot.theme import SEQUENTIAL, Theme, faded, palette

if TYPE_CHECKING:
    import pandas as pd

RANDOM = "random"
_NAMED = 12  # heads of a scatter that are labelled; the others are named in the hover
_PERCENT = 0.01  # up to here the axis of relative losses is linear


def domain_scatter(
    frame: pd.DataFrame,
    x: str,
    y: str,
    metric: str = "sink_attention",
    *,
    about: About,
    theme: Theme = None,
) -> go.Figure:
    """A dot per head: its sink attention on one kind of text against another.

    The frame is tidy, one row per head and domain:

    ====================== ===== =================================================================
    column                 type  meaning
    ====================== ===== =================================================================
    layer, head            int   the head
    domain                 str   kind of text, for example "prose" or "code"
    {metric}               float mean over prompts of that metric on that domain
    {metric}_low, …_high   float ends of its 95 % interval (optional, for error bars)
    differs                bool  whether the head is dormant on one domain and active on another,
                                 after the correction for many heads (optional, the same in all
                                 rows of a head): drawn as a ring, the twelve that differ most
                                 with their names
    ====================== ===== =================================================================

    Args:
        frame: As above.
        x: Domain along x.
        y: Domain along y.
        metric: The column to draw.
        about: Settings of one of the reports, or a line with model, T, BOS and ε.
        theme: "light", "dark", or the default.

    Returns:
        A dot per head, coloured by its layer, and the line on which both kinds of text agree.

    Raises:
        ReportError: If a column or a domain is missing.
    """
    frames.need(frame, "domain_scatter", "layer", "head", "domain", metric)
    one, other = (
        frames.pick(frame, "domain", domain).set_index(["layer", "head"]) for domain in (x, y)
    )
    other = other.reindex(one.index)
    colours = palette(theme)
    unit = frames.unit_of(metric)
    differs = one.get("differs", False) & np.ones(len(one), dtype=bool)
    gap = (one[metric] - other[metric]).abs().where(differs, -1)
    named = set(gap[differs].nlargest(_NAMED).index)
    names = [f"L{where[0]} H{where[1]}" if where in named else "" for where in one.index]
    figure = go.Figure(
        go.Scatter(
            x=one[metric],
            y=other[metric],
            mode="markers+text",
            text=names,
            textposition=_beside(one[metric].to_numpy(), np.asarray(differs)),
            customdata=np.array(one.index.to_list()),
            error_x=_ends(one, metric, faded(colours.faint, 0.35)),
            error_y=_ends(other, metric, faded(colours.faint, 0.35)),
            marker=dict(
                size=8,
                color=one.index.get_level_values("layer"),
                colorscale=SEQUENTIAL,
                showscale=True,
                colorbar=layer_bar(int(one.index.get_level_values("layer").max()) + 1),
                line=dict(
                    width=np.where(differs, 2.5, 0.5),
                    color=np.where(differs, colours.sink, colours.paper),
                ),
            ),
            hovertemplate="layer %{customdata[0]}, head %{customdata[1]}<br>"
            f"{escaped(x)}: %{{x:.3~g}}<br>{escaped(y)}: %{{y:.3~g}}<extra></extra>",
            showlegend=False,
        )
    )
    _diagonal(figure, np.concatenate([one[metric], other[metric]]), unit, colours.faint)
    label = in_words(metric)
    figure.update_xaxes(title_text=with_unit(f"{label} on {escaped(x)}", unit))
    figure.update_yaxes(title_text=with_unit(f"{label} on {escaped(y)}", unit))
    of = f"{len(one)} head{'' if len(one) == 1 else 's'}"
    title = f"{heading(metric)} of {of}: {escaped(x)} against {escaped(y)}"
    if "differs" in one:
        title += f", {int(differs.sum())} dormant on one only"
    return finish(figure, title, about, theme, height=560)


def ablation_effect(
    frame: pd.DataFrame,
    metric: str = "sink_attention",
    *,
    about: About,
    theme: Theme = None,
) -> go.Figure:
    """A dot per head: the cost of ablating it against its sink attention.

    The frame is tidy, one row per head and domain:

    ======================================= ===== ================================================
    column                                  type  meaning
    ======================================= ===== ================================================
    layer, head                             int   the head
    domain                                  str   kind of text; one colour each
    {metric}                                float what runs along x, such as sink_attention
    loss_change                             float loss without the head minus the loss with it [nat]
    loss_change_low, loss_change_high       float ends of its 95 % interval (optional)
    ======================================= ===== ================================================

    The title gives Spearman's rank correlation for each domain. The axis of the cost is linear
    around zero and logarithmic beyond, so that heads whose ablation lowers the loss are shown too.

    Args:
        frame: As above; one mode of ablation (zero, mean or resample), named in `about`.
        metric: Column along x.
        about: Settings of the report, or a line with model, T, BOS and ε.
        theme: "light", "dark", or the default.

    Returns:
        A dot per head and kind of text, one colour per kind of text.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "ablation_effect", "layer", "head", "domain", metric, "loss_change")
    colours = palette(theme)
    figure = go.Figure()
    correlations = []
    unit = unit_for(frame["loss_change"])
    for index, (domain, rows) in enumerate(frame.groupby("domain", sort=False)):
        name = escaped(str(domain))
        rank = rows[metric].rank().corr(rows["loss_change"].rank())
        correlations.append(f"{name} ρ = {rank:.2f}")
        figure.add_scatter(
            x=rows[metric], y=squeezed(rows["loss_change"], unit), mode="markers", name=name,
            customdata=rows[["layer", "head", "loss_change"]].to_numpy(),
            error_y=_ends(_squeezed_costs(rows, unit), "loss_change", faded(colours.faint, 0.35)),
            marker=dict(size=7, opacity=0.8, color=colours.series[index % len(colours.series)]),
            hovertemplate=f"layer %{{customdata[0]}}, head %{{customdata[1]}} on {name}<br>"
            f"{frames.label_of(metric)}: %{{x:.3~g}}<br>loss change [nat]: %{{customdata[2]:.3~g}}"
            "<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text=frames.label_of(metric))
    figure.update_yaxes(
        title_text="loss change without the head [nat]", **ticks(frame["loss_change"], unit)
    )
    title = f"Cost of ablating a head ({', '.join(correlations)})"
    return finish(figure, title, about, theme, height=520)


def loss_by_share_ablated(
    frame: pd.DataFrame, *, about: About, tolerance: float = 0.01, theme: Theme = None
) -> go.Figure:
    """Loss against the share of heads that a score sets to zero; random heads for comparison.

    Draws each prompt's loss minus its baseline loss, as a share of the mean baseline, since prompts
    differ in loss far more than ablation changes it. The axis is linear up to 1 % and logarithmic
    beyond. Scores are in the order of their mean height, the best first.

    The frame is tidy, one row per observation:

    ============== ===== =========================================================================
    column         type  meaning
    ============== ===== =========================================================================
    score          str   inactivity score that chose the heads, such as "AHON-LN"; "random" for
                         the baseline; "none" is not needed (share_ablated 0 says it)
    share_ablated  float share of heads whose output was zeroed, per input, 0 to 1; 0 is needed
    loss           float mean loss [nat]
    prompt         int   prompt (optional: then lines get intervals)
    ============== ===== =========================================================================

    Args:
        frame: As above.
        about: Settings of the report, or a line with model, T, BOS and ε.
        tolerance: Share of the baseline loss that is allowed; drawn as a line.
        theme: "light", "dark", or the default.

    Returns:
        One line per score against the share of heads that are zero, with a band for its interval;
        random heads dotted.

    Raises:
        ReportError: If a column is missing, or the baseline loss.
    """
    frames.need(frame, "loss_by_share_ablated", "score", "share_ablated", "loss")
    if "prompt" not in frame:
        frame = frame.assign(prompt=0)
    frame = _relative(frame)
    colours = palette(theme)
    figure = go.Figure()
    curves = {
        score: frames.over_prompts(rows, "share_ablated", "change")
        for score, rows in frame.groupby("score")
    }
    heights = {
        score: squeezed(curve["mean"], _PERCENT).mean() + (np.inf if score == RANDOM else 0)
        for score, curve in curves.items()
    }
    for index, score in enumerate(sorted(curves, key=heights.__getitem__)):
        curve, random = curves[score], score == RANDOM
        ends = curve[["mean", "low", "high"]].to_numpy()
        name = escaped(str(score))
        lap, place = divmod(index, len(colours.series))  # more scores than colours: dashes
        band(
            figure, curve["share_ablated"], tuple(squeezed(ends, _PERCENT).T), name=name,
            label="", along="", colour=colours.ink if random else colours.series[place],
            dash="dot" if random else (None, "dash", "longdashdot")[lap % 3],
        )  # fmt: skip
        figure.data[-1].update(
            customdata=ends,
            hovertemplate=f"{name}, %{{x:.1%}} of heads ablated<br>loss %{{customdata[0]:+.2%}}"
            "<br>95 % interval: %{customdata[1]:+.2%} to %{customdata[2]:+.2%}<extra></extra>",
        )
    figure.add_hline(
        float(squeezed(tolerance, _PERCENT)), line=dict(color=colours.faint, dash="dash", width=1),
        annotation_text=f"baseline + {tolerance:.0%}", annotation_position="bottom right",
    )  # fmt: skip
    figure.update_xaxes(title_text="share of heads set to zero", tickformat=".0%")
    drawn = np.concatenate([curve["mean"] for curve in curves.values()])
    figure.update_yaxes(title_text="change of the loss", **ticks(drawn, _PERCENT, "{:+.0%}".format))
    finish(figure, "Loss with inactive heads ablated", about, theme, height=560)
    legend = dict(orientation="v", x=1.02, xanchor="left", y=1, yanchor="top", yref="paper")
    return figure.update_layout(legend=legend, height=560, margin=dict(t=ROOM, b=56))


def _relative(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the frame with `change`, each loss minus its prompt's baseline [share of the mean].

    Raises:
        ReportError: If a prompt's baseline loss is missing.
    """
    baseline = frame[frame["share_ablated"] == 0].groupby("prompt")["loss"].mean()
    if not frame["prompt"].isin(baseline.index).all():
        raise ReportError(
            "loss_by_share_ablated compares with the baseline loss: give every prompt a row whose "
            "share_ablated is 0."
        )
    change = frame["loss"] - frame["prompt"].map(baseline)
    return frame.assign(change=change / baseline.mean())


def _squeezed_costs(rows: pd.DataFrame, unit: float) -> pd.DataFrame:
    columns = [f"loss_change{end}" for end in ("", "_low", "_high") if f"loss_change{end}" in rows]
    return rows.assign(**{name: squeezed(rows[name], unit) for name in columns})


def _ends(rows: pd.DataFrame, column: str, colour: str) -> dict[str, object] | None:
    """Error bars from the interval's columns, where the frame has them."""
    low, high = f"{column}_low", f"{column}_high"
    if low not in rows or high not in rows:
        return None
    return dict(
        symmetric=False, array=rows[high] - rows[column], arrayminus=rows[column] - rows[low],
        color=colour, thickness=1, width=0,
    )  # fmt: skip


def _beside(along: np.ndarray, named: np.ndarray) -> list[str]:
    """Positions of labels, which alternate along x so that neighbours do not overlap."""
    turns = ("top center", "bottom center", "middle right", "middle left")
    places = np.full(len(along), turns[0], dtype=object)
    for turn, index in enumerate(sorted(np.flatnonzero(named), key=along.__getitem__)):
        places[index] = turns[turn % len(turns)]
    return places.tolist()


def _diagonal(figure: go.Figure, values: np.ndarray, unit: str | None, colour: str) -> None:
    """The line on which both domains agree."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        raise ReportError("domain_scatter was given no finite value.")
    low, high = (0.0, 1.0) if unit in ("probability", "share") else (finite.min(), finite.max())
    figure.add_shape(
        type="line", x0=low, y0=low, x1=high, y1=high, layer="below",
        line=dict(color=colour, dash="dot", width=1),
    )  # fmt: skip

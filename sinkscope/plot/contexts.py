"""Long contexts: the effect of keeping a few sink positions (StreamingLLM, 2309.17453)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import plotly.graph_objects as go

from sinkscope.plot import frames
from sinkscope.plot.figure import finish
from sinkscope.plot.labels import About, escaped, in_words
from sinkscope.plot.scales import log_scale
from sinkscope.plot.theme import Theme, palette

if TYPE_CHECKING:
    import pandas as pd


_LEVEL = "everything"


def perplexity_along(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Perplexity block by block along a text, one line per set of kept positions.

    Shows where a model breaks down: once its window no longer includes the sink, or beyond the
    trained context (as in the first figures of StreamingLLM, 2309.17453).

    The frame is tidy, one row per setting and block of tokens:

    ========== ===== ==========================================================================
    column     type  meaning
    ========== ===== ==========================================================================
    kept       str   what stays visible beside the window; one line each, in the order of their
                     first appearance; "everything" is drawn dashed
    position   float middle of the block
    perplexity float of the block
    ========== ===== ==========================================================================

    Args:
        frame: As above.
        about: A line with model, number of tokens, window and how positions were counted.
        theme: "light", "dark", or the default.

    Returns:
        One line per set of kept positions, against the position in the text.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "perplexity_along", "kept", "position", "perplexity")
    colours = palette(theme)
    figure = go.Figure()
    index = 0
    for kept, rows in frame.groupby("kept", sort=False):
        name = escaped(str(kept))
        line: dict[str, object] = dict(color=colours.faint, dash="dash")
        if kept != _LEVEL:
            # The first lines are the widest, so that lines remain visible where they coincide.
            width = max(1.5, 5.5 - index)
            line = dict(color=colours.series[index % len(colours.series)], width=width)
            index += 1
        figure.add_scatter(
            x=rows["position"], y=rows["perplexity"], mode="lines", name=name, line=line,
            hovertemplate=f"{name}, around token %{{x:,.0f}}<br>perplexity: %{{y:,.4~g}}"
            "<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="position in the text", tickformat=",d")
    figure.update_yaxes(
        title_text="perplexity of a block", **log_scale(frame["perplexity"].to_numpy())
    )
    return finish(figure, "Perplexity along a long text", about, theme, height=480)


def perplexity_by_window(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Perplexity of a long text against the window, one line per set of kept positions.

    The frame is tidy, one row per setting:

    ================================= ===== ======================================================
    column                            type  meaning
    ================================= ===== ======================================================
    kept                              str   what stays visible beside the window, such as "0
                                            sinks", "4 sinks", "designated 255"; one line each,
                                            in the order of their first appearance
    window                            int   recent positions that a query sees; -1 for a model
                                            that sees everything, drawn as a dashed level
    perplexity                        float of the text
    perplexity_low, perplexity_high   float ends of its 95 % interval (optional)
    tokens_per_second, kv_megabytes   float shown in the hover (optional)
    ================================= ===== ======================================================

    Args:
        frame: As above.
        about: A line with model, number of tokens and how positions were counted.
        theme: "light", "dark", or the default.

    Returns:
        One line per set of kept positions, against the size of the window.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "perplexity_by_window", "kept", "window", "perplexity")
    colours = palette(theme)
    figure = go.Figure()
    extras = [name for name in ("tokens_per_second", "kv_megabytes") if name in frame]
    lines = [f"<br>{in_words(n)}: %{{customdata[{i}]:,.4~g}}" for i, n in enumerate(extras)]
    windowed = frame[frame["window"] > 0]
    windows = sorted(windowed["window"].unique().tolist())
    for index, (kept, rows) in enumerate(windowed.groupby("kept", sort=False)):
        name = escaped(str(kept))
        rows = rows.sort_values("window")
        figure.add_scatter(
            x=rows["window"], y=rows["perplexity"], mode="lines+markers", name=name,
            # The first lines are the widest, so that lines remain visible where they coincide.
            line=dict(
                color=colours.series[index % len(colours.series)], width=max(1.5, 5.5 - index)
            ),
            marker_size=max(5, 11 - index),
            customdata=rows[extras].to_numpy() if extras else None,
            error_y=_ends(rows),
            hovertemplate=f"{name}, window %{{x:,}}<br>perplexity: %{{y:,.4~g}}{''.join(lines)}"
            "<extra></extra>",
        )  # fmt: skip
    for _, row in frame[frame["window"] < 0].iterrows():
        name = escaped(str(row["kept"]))
        figure.add_scatter(
            x=windows, y=[row["perplexity"]] * len(windows), mode="lines", name=name,
            line=dict(color=colours.faint, dash="dash"),
            hovertemplate=f"{name}<br>perplexity: %{{y:,.4~g}}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(
        title_text="window [positions]", type="log", tickvals=windows,
        ticktext=[f"{window:,}" for window in windows],
    )  # fmt: skip
    figure.update_yaxes(title_text="perplexity", **log_scale(frame["perplexity"].to_numpy()))
    return finish(figure, "Perplexity of a long text through a window", about, theme, height=480)


def perplexity_by_scheme(frame: pd.DataFrame, *, about: About, theme: Theme = None) -> go.Figure:
    """Perplexity of a long text whose old keys and values are quantised, by scheme and tokens kept.

    The frame is that of `experiments.streaming_context`, one row per setting:

    ================================= ===== ======================================================
    column                            type  meaning
    ================================= ===== ======================================================
    kept                              str   tokens kept in full precision, such as "0 sinks" or
                                            "pivots"; one line each, in the order of their first
                                            appearance
    scheme                            str   how the others are stored, along x, most bits first;
                                            "" for full precision, drawn as a dashed level
    bits                              float of the scheme
    perplexity                        float of the text
    perplexity_low, perplexity_high   float ends of its 95 % interval (optional)
    ================================= ===== ======================================================

    Args:
        frame: As above.
        about: A line with model, number of tokens and how many are not quantised.
        theme: "light", "dark", or the default.

    Returns:
        One line per rule, against the scheme.

    Raises:
        ReportError: If a column is missing.
    """
    frames.need(frame, "perplexity_by_scheme", "kept", "scheme", "bits", "perplexity")
    colours = palette(theme)
    stored = frame[frame["scheme"] != ""].sort_values("bits", ascending=False, kind="stable")
    schemes = [escaped(str(scheme)) for scheme in dict.fromkeys(stored["scheme"])]
    figure = go.Figure()
    order = list(dict.fromkeys(frame.loc[frame["scheme"] != "", "kept"]))
    for index, kept in enumerate(order):
        rows, name = stored[stored["kept"] == kept], escaped(str(kept))
        colour = colours.series[index % len(colours.series)]
        figure.add_scatter(
            x=[escaped(str(scheme)) for scheme in rows["scheme"]], y=rows["perplexity"],
            mode="lines+markers", name=f"{name} kept",
            # The first lines are the widest, so that lines remain visible where they coincide.
            line=dict(color=colour, width=max(1.5, 5.5 - index)), marker_size=max(5, 11 - index),
            error_y=_ends(rows),
            hovertemplate=f"%{{x}}, {name} kept<br>perplexity: %{{y:,.4~g}}<extra></extra>",
        )  # fmt: skip
    for _, row in frame[frame["scheme"] == ""].iterrows():
        figure.add_scatter(
            x=schemes, y=[row["perplexity"]] * len(schemes), mode="lines",
            name="full precision", line=dict(color=colours.faint, dash="dash"),
            hovertemplate="full precision<br>perplexity: %{y:,.4~g}<extra></extra>",
        )  # fmt: skip
    figure.update_xaxes(title_text="keys and values before the window", type="category")
    figure.update_yaxes(title_text="perplexity", **log_scale(frame["perplexity"].to_numpy()))
    title = "Perplexity with a quantised KV cache"
    return finish(figure, title, about, theme, height=480)


def _ends(rows: pd.DataFrame) -> dict[str, object] | None:
    if "perplexity_low" not in rows or "perplexity_high" not in rows:
        return None
    return dict(
        symmetric=False,
        array=rows["perplexity_high"] - rows["perplexity"],
        arrayminus=rows["perplexity"] - rows["perplexity_low"],
        thickness=1,
    )

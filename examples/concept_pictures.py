"""Draw a small picture of each concept, from one model: the pictures of docs/concepts.md.

python examples/concept_pictures.py docs/concepts     # two minutes on two CPU cores; needs Chromium
"""

import sys
from pathlib import Path

import plotly.graph_objects as go

import sinkscope as ss
from sinkscope.report.headline import peak_block

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/concepts")
folder.mkdir(exist_ok=True)
story = (
    "The sun had set behind the hills, and the two travellers still had a long way to go. The "
    "older one stopped, looked back at the road and said that they should find a place to sleep "
    "before it grew dark."
)
SINK, OTHERS = "#2f7ed8", "#9aa1ab"  # seen on white and on black

model = ss.load_model("smollm2-135m")
prose = ss.texts("prose", prompts=8, length=128)
report = ss.scan(model, prose, progress=False)
told = ss.scan(model, ss.texts([story]), metrics=["all", "ffn_dims"], progress=False)
heads = told.heads()
typical = heads.loc[(heads.sink_attention - 0.5).abs().idxmin()]
layer, head = int(typical["layer"]), int(typical["head"])
writer = peak_block(report)
attention = f"blocks.{layer}.attn"
names = [f"{attention}.hook_pattern", f"{attention}.hook_attn_scores"]
_, cache = model.run_with_cache(
    told.tokens, names_filter=[*names, f"blocks.{writer}.hook_resid_post"]
)
pattern, scores = (cache[name][0, head].float() for name in names)


def draw(name: str, x: str, y: str, *traces: go.Scatter | go.Bar | go.Heatmap, **layout) -> None:
    """Write a figure of 320 by 210 pixels without a background."""
    figure = go.Figure(traces)
    figure.update_layout(
        width=320, height=210,
        margin=dict(l=50, r=layout.pop("margin_r", 8), t=8, b=38),
        showlegend=False, bargap=0.1,
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        font=dict(size=11, color="#7d8590"), **layout,
    )  # fmt: skip
    axis = dict(showgrid=False, zeroline=False, showline=True, linecolor=OTHERS, ticks="outside")
    figure.update_xaxes(title=dict(text=x, standoff=6), **axis)
    figure.update_yaxes(title=dict(text=y, standoff=6), **axis)
    if layout.get("yaxis_type") == "log":
        figure.update_yaxes(dtick=1)
    figure.write_image(folder / f"{name}.svg")


def bars(values) -> go.Bar:
    """Bars by position, the first one marked."""
    colours = [SINK] + [OTHERS] * (len(values) - 1)
    return go.Bar(y=values.tolist(), marker=dict(color=colours, line_width=0))


def level(y: float, colour: str) -> dict:
    """A horizontal line."""
    line = dict(color=colour, dash="dot")
    return dict(type="line", x0=0, x1=1, xref="x domain", y0=y, y1=y, line=line)


def beside(y: float, text: str, colour: str) -> dict:
    """The name of a line, right of it."""
    return dict(x=1.02, xref="x domain", xanchor="left", y=y, text=text, showarrow=False,
                align="left", font=dict(size=10, color=colour))  # fmt: skip


def points(x, y) -> go.Scatter:
    """One point for each head."""
    marker = dict(color=SINK, size=4, opacity=0.6)
    x, y = x.flatten().tolist(), y.flatten().tolist()
    return go.Scatter(x=x, y=y, mode="markers", marker=marker)


seen = pattern.masked_fill(pattern == 0, float("nan"))
scale = [[0, "rgba(47,126,216,0.06)"], [1, SINK]]
draw("sink", "key", "query", go.Heatmap(z=seen.tolist(), colorscale=scale, showscale=False),
     yaxis_autorange="reversed")  # fmt: skip
draw("importance", "key", "received attention", bars(told.received_attention[layer, head]))
grid = [i / 100 for i in range(1, 100)]
draw(
    "sink-rate", "ε", "sink rate",
    go.Scatter(x=grid, y=[report.sink_rate_at(e) for e in grid], line=dict(color=SINK)),
    shapes=[dict(type="line", x0=0.3, x1=0.3, y0=0, y1=1, yref="y domain",
                 line=dict(color=OTHERS, dash="dot"))],
)  # fmt: skip
first = pattern[:, 0]
draw(
    "awft", "query", "attention to the first token",
    go.Scatter(y=first.tolist(), mode="lines+markers", line=dict(color=OTHERS),
               marker=dict(color=[SINK] + [OTHERS] * (len(first) - 1), size=6)),
    shapes=[level(float(first.mean()), SINK)], yaxis_range=[0, 1.05], margin_r=45,
    annotations=[beside(float(first.mean()), "AWFT", SINK)],
)  # fmt: skip
last = scores[-1]
rest = float(last[1:-1].mean())
draw(
    "delta-logit", "key", "logit of the last query", bars(last),
    shapes=[level(float(last[0]), SINK), level(rest, OTHERS)], margin_r=55,
    annotations=[beside(float(last[0]), "sink", SINK), beside(rest, "mean of<br>the others", OTHERS)],
)  # fmt: skip
kv_head = head // told.settings.heads_per_kv_head
draw("drain", "position", "value norm", bars(told.value_norm[layer, kv_head]))
per_kv = report.mean("value_drain").repeat_interleave(report.settings.heads_per_kv_head, dim=1)
draw("waiver", "sink attention", "value drain", points(report.mean("sink_attention"), per_kv),
     yaxis_type="log")  # fmt: skip
draw("honor", "sink attention", "HONOR",
     points(report.mean("sink_attention"), report.mean("honor")))  # fmt: skip
code = ss.scan(model, ss.texts("code", prompts=8, length=128), metrics="core", progress=False)
draw(
    "dormant-head", "sink attention on prose", "on code",
    points(report.mean("sink_attention"), code.mean("sink_attention")),
    go.Scatter(x=[0, 1], y=[0, 1], mode="lines", line=dict(color=OTHERS, dash="dot")),
)  # fmt: skip
sink, median = report.mean("sink_residual_norm"), report.mean("median_residual_norm")
draw(
    "peak", "block", "residual norm",
    go.Scatter(y=median.tolist(), line=dict(color=OTHERS)),
    go.Scatter(y=sink.tolist(), line=dict(color=SINK)), yaxis_type="log",
)  # fmt: skip
state = cache[f"blocks.{writer}.hook_resid_post"][0, 0].float().abs()
draw("massive-activation", "dimension", f"|x| after block {writer}",
     go.Scatter(y=state.tolist(), mode="lines", line=dict(color=SINK, width=1)))  # fmt: skip
own, mixed = told.ffn_sink[0, writer].abs(), told.ffn_mixed_max[0, writer]
draw(
    "non-mixture-dimension", "dimension", f"|FFN output|, block {writer}",
    go.Scatter(y=own.tolist(), mode="lines", line=dict(color=SINK, width=1)),
    go.Scatter(y=mixed.tolist(), mode="lines", line=dict(color=OTHERS, width=1)), yaxis_type="log",
)  # fmt: skip
print(f"wrote {len(list(folder.glob('*.svg')))} pictures into {folder}")

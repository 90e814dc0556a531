"""Make the README's picture: one head's pattern, the map of all heads, the residual norm by layer.

python examples/readme_picture.py docs/smollm2.png     # a minute on two CPU cores; needs Chromium
"""

import sys

from plotly.subplots import make_subplots

import sinkscope as ss
from sinkscope.report.headline import peak_block

target = sys.argv[1] if len(sys.argv) > 1 else "docs/smollm2.png"
story = (
    "The sun had set behind the hills, and the two travellers still had a long way to go. The "
    "older one stopped, looked back at the road and said that they should find a place to sleep "
    "before it grew dark."
)
model = ss.load_model("smollm2-135m")
texts = ss.texts("prose", prompts=16, length=256)
report = ss.scan(model, texts, metrics=["sink_attention", "residual"])

tokens = ss.texts([story]).tokenize(model).tokens
strongest = report.top_heads(1)[0]
layer, head = strongest["layer"], strongest["head"]
_, cache = model.run_with_cache(tokens, names_filter=f"blocks.{layer}.attn.hook_pattern")
pattern = cache["pattern", layer][0, head].numpy()

sink, median = report.mean("sink_residual_norm"), report.mean("median_residual_norm")
peak = report.mean("residual_peak")
writes = peak_block(report)
share = report.sink_heads().float().mean()

figure = make_subplots(
    1,
    3,
    subplot_titles=(
        f"Layer {layer}, head {head}: nearly every<br>token attends to the first",
        f"All {report.sink_attention[0].numel()} heads: {share:.0%} pay the first<br>"
        f"token more than {report.settings.epsilon:g} of their attention",
        f"Block {writes} writes the peak:<br>residual norm × {float(peak.max()):.0f}",
    ),
)
blues = dict(colorscale="Blues", zmin=0, zmax=1, showscale=False)
figure.add_heatmap(z=pattern, row=1, col=1, **blues)
figure.add_heatmap(z=report.mean("sink_attention").cpu().numpy(), row=1, col=2, **blues)
figure.data[1].update(showscale=True, colorbar=dict(x=0.605, thickness=10))
for name, norm, colour in (("the others", median, "#6b7078"), ("first token", sink, "#08519c")):
    figure.add_scatter(
        y=norm.cpu().numpy(), name=name, line=dict(color=colour, width=3), row=1, col=3
    )
    last = int(len(norm) * 0.6)
    figure.add_annotation(
        x=last, y=float(norm[last].log10()), text=name, font=dict(color=colour, size=15),
        yshift=14, showarrow=False, row=1, col=3,
    )  # fmt: skip
figure.update_xaxes(title="key position", domain=[0, 0.27], row=1, col=1)
figure.update_yaxes(title="query position", autorange="reversed", row=1, col=1)
figure.update_xaxes(title="head", dtick=1, domain=[0.335, 0.6], row=1, col=2)
figure.update_yaxes(title="layer", autorange="reversed", row=1, col=2)
figure.update_xaxes(title="layer", domain=[0.74, 1], row=1, col=3)
figure.update_yaxes(title="residual norm", type="log", dtick=1, row=1, col=3)
for title, centre in zip(figure.layout.annotations, (0.135, 0.4675, 0.87), strict=False):
    title.x = centre
figure.update_layout(
    template="plotly_white", width=1200, height=430, showlegend=False,
    font=dict(size=14), margin=dict(l=60, r=20, t=60, b=55),
)  # fmt: skip
figure.write_image(target, scale=2)
print(f"wrote {target}")

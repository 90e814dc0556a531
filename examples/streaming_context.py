"""What must SmolLM2 keep of a long text besides a window of the last 256 tokens?

    python examples/streaming_context.py [TEXT.txt]

printed, with Python 3.11 (the text of its manual differs a little between versions):

smollm2-135m · T = 1,536 · BOS: auto (none) · 1 × prose · from token 260 on
everything      perplexity 16.9, 70.8 MB of keys and values
0 sinks         perplexity 31.2, 11.8 MB of keys and values, loss +0.61 [+0.49, +0.74] nat
1 sink          perplexity 18.7, 11.8 MB of keys and values, loss +0.10 [+0.04, +0.17] nat
4 sinks         perplexity 18.7, 11.9 MB of keys and values, loss +0.10 [+0.04, +0.17] nat
200 as it is    perplexity 31.2, 11.8 MB of keys and values, loss +0.61 [+0.49, +0.73] nat
designated 200  perplexity 18.7, 11.8 MB of keys and values, loss +0.10 [+0.03, +0.17] nat

(Loss per token, minus that with full attention.) A single sink is enough, and it need not be the
first token: a token from the middle that attends only to itself works as well. The same token
without the mask has no effect.
"""

import sys

import sinkscope as ss
from sinkscope.experiments.streaming_context import streaming_context

found = streaming_context(
    ss.load_model("smollm2-135m"),
    sys.argv[1] if len(sys.argv) > 1 else "prose",
    tokens=1536,
    windows=[256],
    sinks=[0, 1, 4],
    designated=200,
    counted=["cache"],
    progress=False,
)
print(f"{found.about} · from token {found.after} on")
for row in found.statistics()["settings"]:
    over = row["loss_over_everything"]
    print(
        f"{row['kept']:14}  perplexity {row['perplexity_after']:.1f}, "
        f"{row['kv_megabytes']:4.1f} MB of keys and values"
        + (f", loss {over.signed(2)} nat" if over else "")
    )

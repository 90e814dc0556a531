"""Can one choose the token that a model uses as its sink?

    python examples/waiver.py

printed, with Python 3.11 (the text of its manual differs a little between versions):

smollm2-135m position 64 sees itself alone  attention to 64: 0.005 → 0.275, to 0: 0.517 → 0.282
smollm2-135m position 64 stands at 0        attention to 64: 0.005 → 0.002, to 0: 0.517 → 0.513
minilm-l6    position 64 sees itself alone  attention to 64: 0.004 → 0.002, to 0: 0.248 → 0.249
minilm-l6    position 64 stands at 0        attention to 64: 0.004 → 0.160, to 0: 0.248 → 0.160

A mask makes a sink in SmolLM2, a position's vector in MiniLM; neither has an effect in the other.
(Attention of the other tokens, in SmolLM2 of those after 64; mean over the later half of the layers.
"Stands at 0": with the position vector of 0, in SmolLM2 rotated as if it stood there.)
"""

import sinkscope as ss
from sinkscope.experiments.waiver import position_embeddings, structured_mask

P = 64
ways = {
    "sees itself alone": lambda model, texts: structured_mask(
        model, texts, P, starts=["given"], progress=False
    ),
    "stands at 0": lambda model, texts: position_embeddings(
        model, texts, P, starts=["given"], changes=["first replaced"], progress=False
    ),
}
for name in ("smollm2-135m", "minilm-l6"):
    model = ss.load_model(name)
    texts = ss.texts("prose", prompts=4, length=128)
    for way, move in ways.items():
        found = move(model, texts)
        (was_0, was_p), (is_0, is_p) = (
            [found.attention_to(condition, target).mean() for target in (0, 1)]
            for condition in (0, 1)
        )
        print(
            f"{name:12} position {P} {way:17}  attention to {P}: {was_p:.3f} → {is_p:.3f}, "
            f"to 0: {was_0:.3f} → {is_0:.3f}"
        )

"""Which of SmolLM2-135M's heads are dormant on code and active on prose, and does the loss agree?

    python examples/dormant_heads.py

printed, with Python 3.11 (the text of its manual differs a little between versions):

18.8: sink attention 0.96 on prose, 1.00 on code; without it a loss moves by 0.0003 and 0.0003 nat
 7.1: sink attention 0.36 on prose, 0.64 on code; without it a loss moves by 0.0052 and 0.0031 nat
 5.7: sink attention 0.31 on prose, 0.59 on code; without it a loss moves by 0.0116 and 0.0071 nat
 7.2: sink attention 0.38 on prose, 0.62 on code; without it a loss moves by 0.0051 and 0.0134 nat
 5.5: sink attention 0.36 on prose, 0.61 on code; without it a loss moves by 0.0045 and 0.0101 nat

The head that is a sink head on both has no effect at all. Of the four that are sink heads only on
code, two have a smaller effect there and two a larger one: sink attention alone does not show that
a head is inactive.
"""

import sinkscope as ss
from sinkscope.experiments.ablation import ablate_heads

model = ss.load_model("smollm2-135m")
kinds = {name: ss.texts(name, prompts=24, length=96) for name in ("prose", "code")}
sink = {
    name: ss.scan(model, texts, metrics="sink_attention", progress=False).mean("sink_attention")
    for name, texts in kinds.items()
}
always = (sink["prose"] * sink["code"]).flatten().topk(1).indices
sometimes = (sink["code"] - sink["prose"]).flatten().topk(4).indices
heads = [divmod(at, model.cfg.n_heads) for at in (*always.tolist(), *sometimes.tolist())]
effect = {
    name: ablate_heads(model, texts, "resample", heads=heads, progress=False)
    .loss_change.abs()
    .mean(0)
    for name, texts in kinds.items()
}
for head in heads:
    print(
        f"{head[0]:2}.{head[1]}: sink attention {sink['prose'][head]:.2f} on prose, "
        f"{sink['code'][head]:.2f} on code; without it a loss moves by "
        f"{effect['prose'][head]:.4f} and {effect['code'][head]:.4f} nat"
    )

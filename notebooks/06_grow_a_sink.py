# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 6 · Grow a sink
#
# Five lessons dissected a grown model. Now we grow one from nothing, on a task so small that we
# know its every secret, and watch the sink come up. Then we change one line of the architecture
# and see whether it still does.
#
# The task is **Bigram-Backcopy** of Guo et al. (arXiv 2410.13835). It was made to need a head that
# is badly needed now and then, and has nothing to do in between. Lesson 5 met such a head in the
# wild.
#
# **Goals.** After this lesson you can
#
# * train a model that grows a sink, and say why it does,
# * test each part of the explanation by clamping it,
# * name changes to attention that prevent a sink, and what they cost.
#
# **Before.** Lesson [1](01_what_is_an_attention_sink.ipynb); lesson [5](05_dormant_heads.ipynb) helps.
#
# **Time.** About 90 minutes in class, with the predictions and two exercises.

# %%
import pandas as pd
import torch

import sinkscope as ss
from sinkscope import bb

# %% [markdown]
# ## The task
#
# Sequences of characters. Two rules:
#
# * After most characters the next one is drawn from a **bigram** table, $P(x_{t+1} \mid x_t)$. Look
#   up the current character; no need to look back.
# * After a **trigger** (the three most frequent characters) comes a **backcopy**: $x_{t+1} =
#   x_{t-1}$. Now you must look back one place.
#
# Every sequence starts with a BOS token, which means nothing and is never a target.

# %%
task = bb.BigramBackcopy()
symbols = [*task.source.symbols, "<s>", "<d>"]
tokens = task.sample(prompts=2, length=64, seed=3)

print("triggers:", [symbols[i] for i in task.triggers])
for row in tokens.tolist():
    print("".join(symbols[i] for i in row).replace("\n", "↵"))

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# at = tokens[:, 1:-1]  # every position that has a predecessor and a successor
# after_trigger = task.is_trigger[at]
# assert (tokens[:, 2:] == tokens[:, :-2])[after_trigger].all(), "a trigger is followed by a copy"
# ```
#
# </details>

# %% [markdown]
# Because the task is a Markov chain, everything about it can be computed exactly: how often a
# trigger stands, and the lowest loss that anybody can reach.

# %%
exact = task.statistics(64)
print(f"{exact.trigger_share:.0%} of the queries are triggers")
print(f"entropy where the bigram rules: {exact.bigram_entropy:.2f} nat; at triggers: 0")
print(f"lowest possible loss: {exact.bayes_loss:.3f} nat")

# %% [markdown]
# The model: one block, **one head**, learned positions. Its feed-forward network can store the
# bigram table. The head is needed for the copy.
#
# > **Predict.** On trigger queries the head should attend to the previous token. Where will it
# > look on all the other queries, two thirds of them, where it is not needed? Nobody tells it.
#
# This trains on two CPU cores, in well under a minute. (`measure_every=25`: the sink, drain and
# risks are measured as it goes.)

# %%
guess = {"attention to BOS": None}  # numbers in the place of None

# %% tags=["reveal"]
classroom = bb.TrainConfig.classroom(steps=450, measure_every=25)
softmax = bb.train(classroom, device="cpu")

curves = bb.dynamics(softmax, metrics=None)
panels = ["sink_attention", "trigger_attention", "backcopy_excess",
          "logit_gap", "value_drain", "residual_norm"]  # fmt: skip
about = "Bigram-Backcopy · 1 layer, 1 head, width 64 · AdamW · one seed"
ss.plot.training_curves(curves, panels, about=about, log_steps=False)

# %% tags=["reveal"]
log = softmax.to_frame().set_index(["metric", "step"])["value"]
start, end = log.xs(0, level="step"), log.xs(450, level="step")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"attention to BOS": end["sink_attention"]},
    "attention of the other queries to BOS [probability]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert start["sink_attention"] < 0.1 < 0.85 < end["sink_attention"]
# assert end["trigger_attention"] < 0.05, "at triggers it does not look at BOS at all"
# assert end["value_drain"] < 0.35 < 0.8 < start["value_drain"]
# assert end["backcopy_excess"] < 0.05 and end["bigram_excess"] < 0.1
# ```
#
# </details>

# %% [markdown]
# There it is, out of random weights, in 450 steps. Read the panels together:
#
# * `sink_attention` (on non-trigger queries): from 0.06, which is uniform, to above 0.9. BOS never
#   taught anybody anything, and is the most attended token there is.
# * `trigger_attention`, the same head on trigger queries: to 0. The head switches between work and
#   sleep, from token to token. **Active-dormant.**
# * `backcopy_excess`: the loss above the best possible at triggers, to almost 0. The task is
#   solved.
# * `logit_gap`, $s_{i0} - \operatorname{mean}_j s_{ij}$, keeps rising after everything is solved.
# * `value_drain`, $\lVert W_O v_0 \rVert$ over the others': falls to about a quarter. Attention
#   that goes to BOS fetches little. (Lesson 1 found 0.24 in SmolLM2.)
#
# See it in one sequence:

# %%
bridge = bb.to_bridge(softmax.model, task=task)  # from here on it is a model like any other
with torch.inference_mode():
    _, cache = bridge.run_with_cache(tokens)
characters = [symbols[i].replace("\n", "↵") for i in tokens[0].tolist()]
ss.plot.attention_pattern(cache["pattern", 0][0, 0], characters, about=about, title="The only head")

# %% [markdown]
# Rows of triggers (space, e, t) have their bright cell beside the diagonal, all the others in
# column 0.
#
# ## Why BOS, and why at all?
#
# Take the parts away, one at a time, and watch the two halves of the loss.
#
# > **Predict.** (a) Zero the head: which half of the task suffers? (b) Force *all* of its attention
# > onto BOS at every query: does the bigram half suffer? (c) Force the textbook pattern: previous
# > token at triggers, BOS elsewhere.

# %%
guess = ""  # (a), (b), (c)?

# %% tags=["reveal"]
sample = task.sample(prompts=64, length=64, seed=7)
knockouts = bb.knockouts(softmax.model, task, sample)
ss.plot.knockout_risks(knockouts, about=about)

# %% tags=["reveal"]
risks = knockouts.set_index("intervention")[["backcopy_excess", "bigram_excess"]]
print(risks.round(3))

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert risks.loc["zero attention", "backcopy_excess"] > 3
# assert risks.loc["zero attention", "bigram_excess"] < 0.15
# assert risks.loc["all on BOS", "bigram_excess"] < 0.15
# assert risks.loc["clean pattern"].max() < 0.15
# ```
#
# </details>

# %% [markdown]
# Without the head, the copies are lost, and the bigram half does not notice: there the head did
# *nothing*, and "all on BOS" is how it does nothing.
#
# That is the mechanism in a nutshell. On non-trigger queries the head's output is noise, so
# gradient descent wants it to be zero. A softmax cannot be zero. It can point at one token, and
# that token's value can shrink. Which one? It should be in reach of every query, and nobody's
# business. BOS is both.
#
# Guo et al. add that the two halves feed each other: more attention on BOS makes its value worth
# shrinking, a smaller value makes BOS a better place to park. They call it **mutual
# reinforcement**. Hold one half still and train the other (`bb.reinforcement`, some minutes; three
# seeds in `sinkscope/bb/README.md`), and only half of it shows. With all logits held, the value of
# BOS grows instead of shrinking: the sink drives the drain. With the value held, the logit grows
# *further*, not less: here the sink does not need the drain.
#
# ## The cure: let a head be silent
#
# If the cause is that a softmax row must sum to one, drop that. ReLU attention gives
#
# $$A_{ij} = \frac{\max(0, s_{ij})}{\text{number of keys that } i \text{ sees}},$$
#
# whose rows may be all zero. One word in the configuration changes.
#
# > **Predict.** Sink attention after 450 steps? The sink's *value*? And does the model still solve
# > the task?

# %%
guess = {"sink_attention": None, "value_drain": None}  # numbers in the place of None

# %% tags=["reveal"]
relu = bb.train(classroom.replace(attention="relu"), device="cpu")

both = bb.dynamics([softmax, relu], metrics=None)
ss.plot.training_curves(both, panels, about=about, log_steps=False)

# %% tags=["reveal"]
cured = relu.to_frame().set_index(["metric", "step"])["value"].xs(450, level="step")
names = ["sink_attention", "spare_attention", "value_drain", "backcopy_excess", "bigram_excess"]
print(pd.DataFrame({"softmax": end[names], "relu": cured[names]}).round(3))

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(cured),
    "after 450 steps [probability, ratio]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert cured["sink_attention"] < 0.05
# assert cured["value_drain"] > end["value_drain"]
# assert cured["backcopy_excess"] < 0.05 and cured["bigram_excess"] < 0.1
# ```
#
# </details>

# %% [markdown]
# The sink is gone, the task is solved as well as before, and BOS keeps more of its value.
# (`spare_attention` is what a row has left to one: here a head is silent instead of parked.) So a
# sink is not something that language needs. It is what a softmax does when there is nothing to do.
#
# A word of care. This is one seed, a few hundred steps, and a world with 67 tokens. The table in
# `sinkscope/bb/README.md` has more seeds, the paper's size and eight kinds of attention, and says
# where the picture is less tidy than here.
#
# ## What one layer cannot show
#
# Look at `residual_norm` above: it grows. But in a one-layer model every token's norm grows, and
# BOS does not stand out. A residual *peak* takes depth: somebody has to write it, and later layers
# have to read it. Training that takes a GPU, so sinkscope carries one that was trained: `bb-3l`,
# three layers, the paper's settings, 8,000 steps, with its log.

# %%
recipe = bb.packaged_recipe("bb-3l")
history = pd.DataFrame(recipe["log"], columns=recipe["log_columns"])
deep = "bb-3l · 3 layers, 1 head each, width 256 · AdamW · 8,000 steps"
ss.plot.training_curves(
    history, ["sink_attention", "value_drain", "residual_norm", "residual_peak"],
    about=deep, columns=2,
)  # fmt: skip

# %%
last = history[history["step"] == 8000].set_index(["metric", "layer"])["value"]
print(last.unstack().loc[["sink_attention", "value_drain", "residual_peak"], [0, 1, 2]].round(2))

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert last["sink_attention", 2] > 0.9 and last["value_drain", 2] < 0.1
# assert last["residual_peak", 0] > 1.8 and last["residual_peak", 2] < 1
# assert last["sink_attention", 0] < 0.2
# ```
#
# </details>

# %% [markdown]
# The work is divided as in SmolLM2. Layer 0 has no sink; it *makes* the peak (twice the others'
# norm; do not expect a hundredfold in so small a world). Layer 2 has the sink and the drain, and
# what it puts out takes the peak away again.
#
# Theory has a say about the speed. As a softmax saturates, the gradient that drives the logit dies
# away, so the gap should grow like $\ln t$. Adam divides that decay out, so the norm should grow
# like $t$.
#
# > **Predict.** The gap of *our* model, from step 100 on, and the norm of BOS after layer 0 of
# > `bb-3l`, from step 1,000 on: which of $\ln t$, $\sqrt t$ and $t$ fits each best?

# %%
guess = ""  # which law for which quantity?

# %% tags=["reveal"]
ours, _ = bb.growth_laws(softmax.to_frame(), metrics=("logit_gap",), start=100)
theirs, _ = bb.growth_laws(history, start=1000)
norm = theirs.query("metric == 'residual_norm' and layer == 0")
deep_gap = theirs.query("metric == 'logit_gap' and layer == 2")
for name, fits in {"our gap": ours, "bb-3l's norm": norm, "bb-3l's gap": deep_gap}.items():
    print(f"{name:14}", {fit.law: round(fit.r_squared, 3) for fit in fits.itertuples()})

# %% tags=["reveal"]
quality = ours.set_index("law")["r_squared"]

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert quality["log"] > 0.95 and quality["log"] > quality["linear"]
# assert norm.iloc[0]["law"] == "linear" and norm.iloc[0]["r_squared"] > 0.95  # best first
# assert deep_gap.iloc[0]["law"] != "log"
# ```
#
# </details>

# %% [markdown]
# Ours grows like $\ln t$, and the norm of `bb-3l` in a straight line, as predicted. (With plain
# SGD it does not, and the sink comes all the same: the peak is Adam's doing, the sink is the
# softmax's. That comparison takes minutes on a GPU; it is in the README of the laboratory.) The
# gap of the three-layer model does *not* follow $\ln t$; no simple law fits it well. The theory is
# about one layer.
#
# Finally, the grown model is a model like any other:

# %%
model = ss.load_model("bb-3l")
report = ss.scan(model, bb.task_texts(prompts=8, length=128))
report

# %%
sink_attention = report.sink_attention[:, 2].mean().item()

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert report.top_heads(1)[0]["layer"] == 2
# assert report.value_drain[:, 2].mean() < 0.15
# assert abs(sink_attention / (1 - exact.trigger_share) - 1) < 0.05
# ```
#
# </details>

# %% [markdown]
# The scan says 0.71 where the log above said 0.99. No contradiction: the log looked at non-trigger
# queries only, the scan at all, and 29 % of the queries are triggers, for which this head works. A
# number below one need not mean a weaker sink. It can be a head that wakes up now and then.
#
# ## What to take with you
#
# * A sink grows from nothing within a hundred steps, where a head is needed now and then and a
#   softmax forbids it to be silent.
# * The sink drives the drain. Whether the drain drives the sink, as theory has it, we could not
#   confirm.
# * Let a row sum to less than one (ReLU) and the sink does not come; the task is solved all the
#   same.
# * A residual peak needs depth, and Adam.
#
# ## Exercises

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
from sinkscope.attention import operators

PARKED = last["trigger_attention", 2]
ANSWERS = {  # exercise: (answer, hint)
    1: (
        float(
            exact.trigger_share * knockouts.loc[1, "backcopy_risk"]
            + (1 - exact.trigger_share) * knockouts.loc[1, "bigram_risk"]
        ),
        "Weigh the two risks of the row `zero attention` with how often each kind of query comes.",
    ),
    2: (
        "less than 0.1" if PARKED < 0.1 else "more than 0.1",
        "history has it as trigger_attention, layer 2, at the last step.",
    ),
    3: ("BOS", "bb.train(classroom.replace(attention='off-by-one')), then compare both columns."),
    4: (
        operators.off_by_one(
            torch.linspace(-2, 2, 16).reshape(4, 4), torch.ones(4, 4, dtype=torch.bool).tril()
        )[3, 0].item(),
        "Subtract the largest of 0 and the scores before exp; the 1 is divided likewise.",
    ),
}
solved = set()


def check(exercise, answer):
    """Say how an exercise stands: numbers may be 2 % off."""
    expected, hint = ANSWERS[exercise]
    if answer is None:
        return print(f"Exercise {exercise}: put your answer in the place of None.")
    if isinstance(expected, float):
        right = abs(answer - expected) <= 0.02 * abs(expected)
    else:
        right = answer == expected
    solved.update({exercise} if right else set())
    print(f"Exercise {exercise}: {'right.' if right else f'not yet. {hint}'}")


# %% [markdown]
# **1.** What is the loss per token, over all queries, of the trained model with its head zeroed?
# Use `risks`-like columns `backcopy_risk` and `bigram_risk` of `knockouts`, and
# `exact.trigger_share`.

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# zeroed = knockouts[knockouts["intervention"] == "zero attention"].iloc[0]
# share = task.is_trigger[sample[:, :-1]].double().mean().item()  # counted, not computed
# answer_1 = share * zeroed["backcopy_risk"] + (1 - share) * zeroed["bigram_risk"]
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** In `bb-3l`, does the sink head (layer 2) look at BOS on *trigger* queries more or less than
# 0.1? Find out from its pattern: `cache["pattern", 2]` of `model` on `task.sample(...)`, at the
# rows where `task.is_trigger[tokens]`. Answer "less than 0.1" or "more than 0.1".

# %%
answer_2 = None

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# with torch.inference_mode():
#     _, cache = model.run_with_cache(sample)
# to_bos = cache["pattern", 2][:, 0, :, 0][task.is_trigger[sample]].mean().item()
# answer_2 = "less than 0.1" if to_bos < 0.1 else "more than 0.1"
#
# check(2, answer_2)
# ```
#
# </details>

# %% [markdown]
# **3.** *Softmax off by one*, $A_{ij} = e^{s_{ij}} / (1 + \sum_j e^{s_{ij}})$, gives a head a place
# outside the sequence to send attention to. Its logit is fixed at 0. Train one
# (`attention="off-by-one"`). Where does the idle head park: on `"BOS"`, or in the `"spare place"`?
# Predict first; this one surprises.

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# spare = bb.train(classroom.replace(attention="off-by-one"), device="cpu")
# ended = spare.to_frame().set_index(["metric", "step"])["value"].xs(450, level="step")
# print(ended[["sink_attention", "spare_attention"]].round(3).to_string())
# answer_3 = "BOS" if ended["sink_attention"] > ended["spare_attention"] else "spare place"
# # Permission to be silent is not enough. BOS was there, its logit can rise without bound, and the
# # logit of the spare place cannot: whoever is ahead stays ahead. (One seed, 450 steps; in models
# # pretrained this way Xiao et al., arXiv 2309.17453, Table 3, see an improvement, not a cure.)
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** (harder) Write softmax off by one itself, for scores `[query key]` under a causal mask,
# so that it neither overflows at a score of 1,000 nor lets hidden keys count. What does query 3
# of `scores` pay to key 0?

# %%
scores = torch.linspace(-2, 2, 16).reshape(4, 4)


def my_off_by_one(scores):
    """exp(s_ij) / (1 + sum over visible keys of exp(s_ij))."""
    raise NotImplementedError


answer_4 = None  # my_off_by_one(scores)[3, 0].item()


check(4, answer_4)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# def my_off_by_one(scores):
#     visible = torch.ones_like(scores, dtype=torch.bool).tril()
#     scores = scores.masked_fill(~visible, -torch.inf)
#     largest = scores.amax(-1, keepdim=True).clamp(min=0)  # the extra logit is 0
#     weights = (scores - largest).exp()
#     return weights / ((-largest).exp() + weights.sum(-1, keepdim=True))
#
#
# assert my_off_by_one(torch.full((4, 4), 1000.0)).isfinite().all()
# answer_4 = my_off_by_one(scores)[3, 0].item()
#
# check(4, answer_4)
# assert solved == set(ANSWERS)
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. Why does the gap keep growing when the attention has long saturated?
# 2. ReLU attention grows no sink here. What would you measure before you used it in a large model?
# 3. Which part of the story needs more than one layer?
#
# ## Read on
#
# * Tianyu Guo, Druv Pai, Yu Bai, Jiantao Jiao, Michael I. Jordan and Song Mei (2024), *Active-Dormant
#   Attention Heads*, arXiv 2410.13835
# * Xiangming Gu, Tianyu Pang, Chao Du and others (2024), *When Attention Sink Emerges in Language
#   Models: An Empirical View*, arXiv 2410.10781
# * Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han and Mike Lewis (2023), *Efficient Streaming
#   Language Models with Attention Sinks*, arXiv 2309.17453

# %% [markdown]
# This was the last lesson. Take a model of your own, and start again at
# [2 · Find the sinks of a model](02_find_the_sinks_of_a_model.ipynb).

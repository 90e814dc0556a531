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
# The first five lessons examined trained models. Now we train one from scratch, on a task so small
# that it can be solved exactly, and follow the sink as it forms. Then we change one line of the
# architecture and test whether it still forms.
#
# The task is **Bigram-Backcopy** of Guo et al. (arXiv 2410.13835). It requires a head at some
# queries only; at the others the head has nothing to do. Lesson 5 found such a head in a pretrained
# model.
#
# **Goals.** After this lesson you can
#
# * train a model that forms a sink, and say why it does,
# * test each part of the explanation by clamping it,
# * name changes to attention that prevent a sink, and what they cost.
#
# **Prerequisites.** Lesson [1](01_what_is_an_attention_sink.ipynb); lesson
# [5](05_dormant_heads.ipynb) helps.
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
# * After most characters the next one is drawn from a **bigram** table, $P(x_{t+1} \mid x_t)$. The
#   current character is enough; earlier ones are not needed.
# * After a **trigger** (the three most frequent characters) comes a **backcopy**: $x_{t+1} =
#   x_{t-1}$. This needs the previous character.
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
# Because the task is a Markov chain, its properties can be computed exactly: how frequent triggers
# are, and the lowest possible loss.

# %%
exact = task.statistics(64)
print(f"{exact.trigger_share:.0%} of the queries are triggers")
print(f"entropy at non-triggers: {exact.bigram_entropy:.2f} nat; at triggers: 0")
print(f"lowest possible loss: {exact.bayes_loss:.3f} nat")

# %% [markdown]
# The model: one block, **one head**, learned positions. Its feed-forward network can store the
# bigram table. The head is needed for the copy.
#
# > **Predict.** On trigger queries the head should attend to the previous token. Where will it
# > look on all the other queries, two thirds of them, where it is not needed? Nobody tells it. How
# > much of their attention, 0 to 1, will go to BOS?
#
# This trains on two CPU cores, in well under a minute. (`measure_every=25`: sink, drain and risks
# are measured during training.)

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
# The sink forms from random weights in 450 steps. The panels show:
#
# * `sink_attention` (on non-trigger queries): from 0.06, which is uniform, to above 0.9. BOS
#   carries no information, yet it receives most attention.
# * `trigger_attention`, the same head on trigger queries: to 0. The head switches between active
#   and dormant from token to token: it is **active-dormant.**
# * `backcopy_excess`: the loss above the best possible at triggers, to almost 0. The task is
#   solved.
# * `logit_gap`, $s_{i0} - \operatorname{mean}_j s_{ij}$, keeps rising after everything is solved.
# * `value_drain`, $\lVert W_O v_0 \rVert$ over the others': falls to about a quarter. Attention to
#   BOS contributes little. (Lesson 1 found 0.24 in SmolLM2.)
#
# In one sequence:

# %%
bridge = bb.to_bridge(softmax.model, task=task)  # from here on it is a model like any other
with torch.inference_mode():
    _, cache = bridge.run_with_cache(tokens)
characters = [symbols[i].replace("\n", "↵") for i in tokens[0].tolist()]
ss.plot.attention_pattern(cache["pattern", 0][0, 0], characters, about=about, title="The only head")

# %% [markdown]
# In rows of triggers (space, e, t) the bright cell is beside the diagonal, in all others in column
# 0.
#
# ## Why BOS, and why at all?
#
# Ablate the parts one at a time, and measure the two parts of the loss.
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
# Without the head, the copies fail, but the bigram risk does not change: at non-triggers the head
# had *no* effect, and attention to BOS is how it has none.
#
# This is the mechanism. On non-trigger queries the head's output is noise, so gradient descent
# drives it towards zero. A softmax row cannot be zero, but it can concentrate on one token, whose
# value can shrink. That token should be visible to every query and not needed otherwise. BOS is
# both.
#
# Guo et al. add that the two halves feed each other: more attention to BOS rewards a smaller value
# there, and a smaller value makes attention to BOS more harmless. They call it **mutual
# reinforcement**. With one of the two clamped while the other trains (`bb.reinforcement`, a few
# minutes; three seeds in `sinkscope/bb/README.md`), only half of this is confirmed. With all logits
# clamped, the value of BOS grows instead of shrinking: the sink drives the drain. With the value
# clamped, the logit grows *more*, not less: here the sink does not need the drain.
#
# ## A mitigation: rows that need not sum to one
#
# If the cause is that a softmax row must sum to one, drop that. ReLU attention gives
#
# $$A_{ij} = \frac{\max(0, s_{ij})}{\text{number of keys that } i \text{ sees}},$$
#
# whose rows may be all zero. One word in the configuration changes.
#
# > **Predict.** How much sink attention, 0 to 1, will there be after 450 steps? How large will the
# > sink's *value* be, as a ratio to the others' (1 means equal)? And does the model still solve the
# > task?

# %%
guess = {"sink_attention": None, "value_drain": None}  # numbers in the place of None

# %% tags=["reveal"]
relu = bb.train(classroom.replace(attention="relu"), device="cpu")

both = bb.dynamics([softmax, relu], metrics=None)
ss.plot.training_curves(both, panels, about=about, log_steps=False)

# %% tags=["reveal"]
with_relu = relu.to_frame().set_index(["metric", "step"])["value"].xs(450, level="step")
names = ["sink_attention", "spare_attention", "value_drain", "backcopy_excess", "bigram_excess"]
print(pd.DataFrame({"softmax": end[names], "relu": with_relu[names]}).round(3))

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(with_relu),
    "after 450 steps [probability, ratio]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert with_relu["sink_attention"] < 0.05
# assert with_relu["value_drain"] > end["value_drain"]
# assert with_relu["backcopy_excess"] < 0.05 and with_relu["bigram_excess"] < 0.1
# ```
#
# </details>

# %% [markdown]
# The sink is gone, the task is solved as well as before, and the value of BOS shrinks less.
# (`spare_attention`, the off-sequence mass, is one minus the row's sum: the head attends to nothing
# instead of BOS.) So the task does not need a sink; it is a consequence of the softmax when a head
# is not needed.
#
# A caveat: this is one seed, a few hundred steps, and a vocabulary of 67 tokens. The table in
# `sinkscope/bb/README.md` has more seeds, the paper's size and eight kinds of attention, with some
# less clear results.
#
# ## What one layer cannot show
#
# Look at `residual_norm` above: it grows. But in a one-layer model every token's norm grows, and
# BOS does not stand out. A residual *peak* requires depth: one layer has to write it, and later
# layers have to read it. Training such a model takes a GPU, so sinkscope includes a trained one:
# `bb-3l`, three layers, the paper's settings, 8,000 steps, with its log.

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
# The layers divide the work as in SmolLM2. Layer 0 has no sink; it *writes* the peak (twice the
# others' norm, far from the hundredfold of larger models). Layer 2 has the sink and the drain, and
# its output removes the peak again.
#
# Theory predicts the speed. As a softmax saturates, the gradient of the logit vanishes, so the gap
# should grow like $\ln t$. Adam normalises this decay, so the norm should grow like $t$.
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
# The gap of our model grows like $\ln t$, and the norm of `bb-3l` linearly, as predicted. (With
# plain SGD the norm does not, but the sink still forms: the peak is due to Adam, the sink to the
# softmax. That comparison takes minutes on a GPU; see `sinkscope/bb/README.md`.) The gap of the
# three-layer model does *not* follow $\ln t$; no simple law fits it well. The theory is for one
# layer.
#
# Finally, the toy model can be scanned like any other model:

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
# The scan gives 0.71 where the log above gave 0.99. This is no contradiction: the log averages
# non-trigger queries only, the scan all queries, and 29 % of the queries are triggers, for which
# this head is active. A value below one need not mean a weaker sink; the head may be active at some
# queries.
#
# ## Summary
#
# * A sink forms within a hundred steps if a head is needed only at some queries and a softmax
#   forces it to attend at all.
# * The sink drives the drain. That the drain drives the sink, as theory predicts, was not
#   confirmed.
# * If a row may sum to less than one (ReLU), no sink forms, and the task is still solved.
# * A residual peak needs depth, and Adam.
#
# ## Exercises
#
# Put an expression, or a number with four significant digits, in the place of `None` and run the
# cell.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
from sinkscope.attention import operators

SINK_ATTENTION = last["trigger_attention", 2]
ANSWERS = {  # exercise: (answer, hint)
    1: (
        float(
            exact.trigger_share * knockouts.loc[1, "backcopy_risk"]
            + (1 - exact.trigger_share) * knockouts.loc[1, "bigram_risk"]
        ),
        "Weigh the two risks of the row `zero attention` with how often each kind of query comes.",
    ),
    2: (
        "less than 0.1" if SINK_ATTENTION < 0.1 else "more than 0.1",
        "history has it as trigger_attention, layer 2, at the last step.",
    ),
    3: ("BOS", "bb.train(classroom.replace(attention='off-by-one')), then compare both columns."),
    4: (
        tuple(
            operators.off_by_one(
                torch.linspace(-2, 2, 16).reshape(4, 4) + added,
                torch.ones(4, 4, dtype=torch.bool).tril(),
            )[1, 0].item()
            for added in (0, 1000)
        ),
        "Query 1 sees keys 0 and 1. Subtract the largest of 0 and its scores before exp; the 1 is "
        "divided likewise.",
    ),
}
solved = set()


def is_right(exercise, answer):
    """Whether an answer is right; numbers may be 0.1 % off. An error if it is of another kind."""
    expected = ANSWERS[exercise][0]
    if isinstance(expected, str) != isinstance(answer, str):
        raise TypeError("a text for a number, or a number for a text")
    if isinstance(expected, str):
        return answer == expected
    if not isinstance(expected, tuple):
        answer, expected = (answer,), (expected,)
    both = zip(answer, expected, strict=True)
    return all(abs(float(one) - right) <= 0.001 * abs(right) for one, right in both)


def check(exercise, answer):
    """Say whether an answer is right."""
    expected, hint = ANSWERS[exercise]
    if answer is None:
        return print(f"Exercise {exercise}: put your answer in the place of None.")
    try:
        right = is_right(exercise, answer)
    except (TypeError, ValueError, RuntimeError):
        kinds = {str: "a text in quotes", tuple: "a pair of numbers"}
        given = " ".join(repr(answer).split())[:60]
        asked = kinds.get(type(expected), "a number")
        return print(f"Exercise {exercise}: the answer is {asked}; yours is {given}.")
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
# share = exact.trigger_share
# answer_1 = share * zeroed["backcopy_risk"] + (1 - share) * zeroed["bigram_risk"]
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** In `bb-3l`, does the sink head (layer 2) attend to BOS on *trigger* queries more or less
# than 0.1? Find out from its pattern: `cache["pattern", 2]` of `model` on `task.sample(...)`, at
# the rows where `task.is_trigger[tokens]`. Answer "less than 0.1" or "more than 0.1".

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
# **3.** *Softmax off by one*, $A_{ij} = e^{s_{ij}} / (1 + \sum_j e^{s_{ij}})$, lets a head send
# attention outside the sequence. The logit for this is fixed at 0. Train one
# (`attention="off-by-one"`). Where does the attention of the dormant head go: to `"BOS"`, or to the
# `"spare place"`? Predict first.

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
# # The possibility alone is not enough. BOS is available, its logit can rise without bound, and the
# # logit of the spare place cannot. (One seed, 450 steps; in models pretrained this way Xiao et al.,
# # arXiv 2309.17453, Table 3, see an improvement, but a sink remains.)
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** (harder) Write softmax off by one itself, for scores `[query key]` under a causal mask,
# so that it neither overflows at a score of 1,000 nor counts hidden keys. How much attention does
# query 1 of `scores` pay to key 0? And of `scores + 1000`? Answer with a pair.

# %%
scores = torch.linspace(-2, 2, 16).reshape(4, 4)


def my_off_by_one(scores):
    """exp(s_ij) / (1 + sum over visible keys of exp(s_ij))."""
    raise NotImplementedError


answer_4 = None  # tuple(my_off_by_one(one)[1, 0].item() for one in (scores, scores + 1000))


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
# answer_4 = tuple(my_off_by_one(one)[1, 0].item() for one in (scores, scores + 1000))
#
# check(4, answer_4)
# ```
#
# </details>

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert solved == set(ANSWERS), "every solution is right"
# counted = task.is_trigger[sample[:, :-1]].double().mean().item()
# assert abs(share / counted - 1) < 0.03, "the share of the queries at hand is about the exact one"
# assert not is_right(1, (zeroed["backcopy_risk"] + zeroed["bigram_risk"]) / 2), "weighed"
# hidden = torch.ones_like(scores, dtype=torch.bool).triu(1)
# everywhere = scores.exp() / (1 + scores.exp().sum(-1, keepdim=True))
# assert not is_right(4, (everywhere[1, 0], answer_4[1])), "hidden keys do not count"
# without_one = scores.masked_fill(hidden, -torch.inf).softmax(-1)
# assert not is_right(4, (without_one[1, 0], answer_4[1])), "one more in the denominator"
# overflowed = (scores + 1000).masked_fill(hidden, -torch.inf).exp()
# overflowed = (overflowed / (1 + overflowed.sum(-1, keepdim=True)))[1, 0]
# assert not is_right(4, (answer_4[0], overflowed)), "no overflow"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. Why does the gap keep growing long after the attention has saturated?
# 2. ReLU attention grows no sink here. What would you measure before you used it in a large model?
# 3. Which of these results need more than one layer?
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
# This was the last lesson. Take your own model, and start again at
# [2 · Find the sinks of a model](02_find_the_sinks_of_a_model.ipynb).

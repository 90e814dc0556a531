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
# # 5 · Dormant heads
#
# In lesson 2 two heads, 18.7 and 18.8 (layer 18, heads 7 and 8), gave the first token more than 99
# % of their attention, and lesson 3 showed that its value contributes almost nothing. Do these
# heads have any effect? Could one ablate them?
#
# Guo et al. (arXiv 2410.13835) call such a head **dormant**. A head is
# *active-dormant* if it attends to the sink on one kind of input and is active on another. This
# lesson looks for a text on which the two are active, and measures which heads can be ablated.
#
# **Goals.** After this lesson you can
#
# * distinguish sink heads, inactive heads and dormant heads,
# * measure what a head does by ablating it, on the text that matters,
# * say how many prompts and which correction a claim about heads needs.
#
# **Prerequisites.** Lessons [1](01_what_is_an_attention_sink.ipynb) to
# [3](03_drains_peaks_and_dimensions.ipynb).
#
# **Time.** About 75 minutes in class, with the predictions and two exercises.

# %%
import torch
from einops import repeat

import sinkscope as ss
from sinkscope.experiments.dormant import dormancy
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.interventions import AblateHeads, Quantise
from sinkscope.statistics import estimate

model = ss.load_model("smollm2-135m")
prose = ss.texts("prose", prompts=4, length=64).tokenize(model)
report = ss.scan(model, prose)

# %% [markdown]
# ## Ablate a head
#
# The effect of a head is the change of the loss without it. `AblateHeads` replaces a head's output
# by zero (or by its mean over some texts, `mode="mean"`, which is milder, since later layers rely
# on the mean).
#
# > **Predict.** The loss on prose is a little above 3 nats per token. By how many nats does it rise
# > without head 18.7? Without 18.8? And without 16.0 of lesson 1, which attends to the previous token?


# %%
guess = {"18.7": None, "18.8": None, "16.0": None}  # numbers in the place of None


# %% tags=["reveal"]
@torch.inference_mode()
def loss(texts, start=0):
    """Mean next-token loss of the predictions made from position `start` on [nat]."""
    per_token = model(texts.tokens, return_type="loss", loss_per_token=True)
    return per_token[:, start:].mean().item()


def cost(head, texts, start=0):
    """Rise of the loss when a head is ablated [nat]."""
    with AblateHeads(model, [head], mode="zero"):
        without = loss(texts, start)
    return without - loss(texts, start)


suspects = [(18, 7), (18, 8), (16, 0)]
on_prose = {head: cost(head, prose) for head in suspects}
for (layer, head), nats in on_prose.items():
    attention = report.sink_attention[:, layer, head].mean()
    print(f"{layer}.{head}: sink attention {attention:.2f}, ablating it costs {nats:+.3f} nat")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {f"{layer}.{head}": nats for (layer, head), nats in on_prose.items()},
    "rise of the loss on prose [nat]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert report.sink_attention[:, 18, [7, 8]].mean() > 0.98
# assert max(abs(on_prose[18, 7]), abs(on_prose[18, 8])) < 0.02
# assert all(abs(nats) < 0.1 for nats in on_prose.values())
# ```
#
# </details>

# %% [markdown]
# Almost nothing. On this prose both heads can be ablated, and even 16.0, which is active on every
# text, costs at most a few hundredths of a nat. But this is one kind of text.
#
# ## A text that needs the head
#
# Take 32 random tokens, and repeat them. The first half cannot be predicted; the second half can be
# predicted perfectly from the repetition.
#
# > **Predict.** What will the attention of 18.7 and 18.8 look like in the second half?

# %%
guess = ""  # what will they look like?

# %% tags=["reveal"]
half = 32
once = ss.random_tokens(prompts=4, length=half, seed=1).tokenize(model)
echo = ss.token_ids(repeat(once.tokens, "prompt t -> prompt (copy t)", copy=2))


@torch.inference_mode()
def pattern(texts, layer):
    """Attention of a layer [prompt, head, query, key]."""
    name = f"blocks.{layer}.attn.hook_pattern"
    return model.run_with_cache(texts.tokens, names_filter=name)[1][name]


of_18 = pattern(echo, 18)
about = "smollm2-135m · 32 random tokens, twice · no BOS token"
ss.plot.attention_pattern(of_18[0, 7], about=about, title="Layer 18, head 7")

# %% tags=["reveal"]
for head in (6, 7, 8):
    first, second = of_18[:, head, 1:half, 0].mean(), of_18[:, head, half:, 0].mean()
    print(
        f"18.{head}: attention to the sink in the first half {first:.2f}, in the second {second:.2f}"
    )

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert of_18[:, 7, 1:half, 0].mean() > 0.95 and of_18[:, 7, half:, 0].mean() < 0.6
# assert of_18[:, 6, half:, 0].mean() < 0.2
# assert of_18[:, 8, half:, 0].mean() > 0.95
# ```
#
# </details>

# %% [markdown]
# Head 18.7 becomes active, its neighbour 18.6 even more clearly. Head 18.8 stays dormant.
#
# What do they do when they are active? Look at the stripe in the figure: it runs parallel to the diagonal, 31
# places to the left. A token $x$ in the second half attends to the token *after the first
# occurrence of $x$*. That is an **induction head** (Olsson et al., arXiv 2209.11895): in "$x\,y$ …
# $x$" it attends to $y$, which comes next.

# %%
stripe = of_18.diagonal(offset=-(half - 1), dim1=-2, dim2=-1)[..., 1:].mean((0, 2))  # [head]
print("attention to the token after the last occurrence:", [round(x, 2) for x in stripe.tolist()])

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert stripe[7] > 0.4 and stripe[6] > 0.7 and stripe[8] < 0.05
# ```
#
# </details>

# %% [markdown]
# ## Now ablate it
#
# > **Predict.** The same three ablations, on the predictions of the second half: by how many nats
# > per token does each raise the loss?

# %%
guess = {"18.7": None, "18.8": None, "16.0": None}  # numbers in the place of None

# %% tags=["reveal"]
in_echo = {head: cost(head, echo, start=half) for head in [*suspects, (18, 6)]}
print(f"baseline, second half: {loss(echo, start=half):.2f} nat")
for (layer, head), nats in in_echo.items():
    print(f"ablating {layer}.{head} costs {nats:+.2f} nat")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {f"{layer}.{head}": nats for (layer, head), nats in in_echo.items()},
    "rise of the loss, second half [nat]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert in_echo[18, 7] > 1 and in_echo[18, 6] > 1
# assert abs(in_echo[18, 8]) < 0.05
# assert in_echo[16, 0] > 1.5 * max(in_echo[18, 7], in_echo[18, 6])
# ```
#
# </details>

# %% [markdown]
# * **18.7 is active-dormant.** It has no effect on prose; here ablating it costs more than a nat
#   per token.
# * **18.8** has no effect on either. We found no text on which it is active. (This does not prove
#   that there is none: a head can be shown to be active, but not to be always inactive.)
# * The most costly by far is **16.0**, which has hardly any sink attention. Exercise 3 shows why.
#
# Why then a sink? Between its rare uses an induction head must reliably have *no* effect, and
# attending to the sink achieves this.
#
# ## All heads at once
#
# `dormancy` makes the comparison for every head: it reports those whose sink attention is above 0.5
# on one kind of text and lower by at least 0.25 on the other, if the difference is significant
# after correction for looking at 270 heads (a max-t permutation test over prompts).
#
# > **Predict.** Random tokens against repeated random tokens: which heads will it report?

# %%
guess = ""  # which heads?

# %% tags=["reveal"]
random = ss.random_tokens(prompts=6, length=64, seed=5)
six = ss.random_tokens(prompts=6, length=32, seed=9).tokenize(model).tokens
repeated = ss.token_ids(repeat(six, "prompt t -> prompt (copy t)", copy=2))

found = dormancy(model, {"random": random, "repeated": repeated})
print(found.summary())
found.figures()["random-repeated"]

# %% tags=["reveal"]
named = {(head["layer"], head["head"]) for head in found.differing()}

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert named and all(15 <= layer <= 20 for layer, _ in named), "all in a few middle layers"
# assert {head["dormant_on"] for head in found.differing()} == {"random"}
# ```
#
# </details>

# %% [markdown]
# A handful, all in layers 17 and 18, 18.7 and 18.6 among them. (The whole prompt is averaged here,
# first half included, so the values are less extreme than above.)
#
# What about natural text and code? In Llama-2-7B, Guo et
# al. show a head (16.25) that is dormant on Wikipedia and active on GitHub.

# %%
domains = dormancy(model, ("prose", "code"), prompts=8, length=96)
print(domains.summary())
domains.figures()["prose-code"]

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert len(domains.differing()) <= 5, "next to none"
# ```
#
# </details>

# %% [markdown]
# Almost none, with 8 prompts of each. Each dot's interval shows why: heads differ as much from
# *prompt to prompt* within a domain, especially in code, as between the two. A claim about domains
# needs many prompts and a correction for the number of heads; otherwise it reflects noise.
# Conversely, this is no proof that there is no difference. With 128 windows of each (on a GPU;
# `docs/inactive-heads.md`) 192 of the 270 heads differ, most of them with more sink attention on
# *code*. Three just pass the strict rule, and no head of this model is fully dormant on one kind
# and active on the other.
#
# ## Is a sink head an inactive head?
#
# It is tempting to read "0.8 of its attention goes to the sink" as "it does little".
# Sandoval-Segura et al. (arXiv 2504.03889) test that idea. Their best score compares the norm of a
# head's *output* with that of its layer:
#
# $$\mathrm{HONOR}_h = \frac{\operatorname{mean}_i \lVert o_i^h \rVert}
#   {\operatorname{mean}_{g} \operatorname{mean}_i \lVert o_i^{g} \rVert} ,$$
#
# with $g$ over the heads of its layer.
#
# > **Predict.** Of the heads that pay the sink more than half of their attention, how many put out
# > *more* than their layer's average?

# %%
guess = {"heads": None}  # numbers in the place of None

# %% tags=["reveal"]
ss.plot.head_scatter(report, "sink_attention", "honor_out")

# %% tags=["reveal"]
attention, output = report.mean("sink_attention"), report.mean("honor_out")
sink_heads = attention > 0.5
active = sink_heads & (output > 1)
strongest = torch.where(sink_heads, output, 0).argmax().item()
layer, head = divmod(strongest, 9)
print(
    f"{int(sink_heads.sum())} heads pay it more than half, {int(active.sum())} of them put out more than the average"
)
print(f"the most: {layer}.{head}, sink attention {attention[layer, head]:.2f}, "
      f"HONOR after W_O {output[layer, head]:.1f}")  # fmt: skip

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"heads": int(active.sum())},
    "sink heads with more output than their layer's mean [count]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert active.sum() > 10 and output[layer, head] > 1.5
# ```
#
# </details>

# %% [markdown]
# About every fourth. A head in layer 24 pays the sink four fifths of its attention, but its output
# is twice as large as that of its neighbours. **A sink head need not be an inactive head.** The
# correlation exists (see the title of the figure), but is weak.
#
# ## Where other heads attend
#
# A head that pays little to the sink attends to other keys, often to those next to the query. The
# scan also measured the attention to the last 4, 16 and 64 keys (`recency`), of queries that see
# more than these.
#
# > **Predict.** Draw each head by its attention to the sink and to the last 16 keys. Head 16.0 reads
# > the previous token, 18.8 only the sink: where are they? How many of the 270 heads pay less than
# > 0.1 of their attention to all other keys?

# %%
guess = {"heads": None}  # a number in the place of None

# %% tags=["reveal"]
ss.plot.recency_plane(report, width=16)

# %% tags=["reveal"]
near, far = report.mean("recent_attention")[..., 1], report.mean("remaining_attention")[..., 1]
for layer, head in [(16, 0), (18, 8)]:
    print(
        f"{layer}.{head}: the last 16 keys {near[layer, head]:.2f}, the rest {far[layer, head]:.2f}"
    )
content = far < 0.1
print(f"{int(content.sum())} of {content.numel()} heads pay the rest less than 0.1")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"heads": int(content.sum())},
    "heads that pay the rest less than 0.1 [count]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert near[16, 0] > 0.7 and near[18, 8] < 0.05
# assert 50 < content.sum() < 110
# ```
#
# </details>

# %% [markdown]
# More than every fourth head attends almost only to the sink and the last keys. Whether such a head
# needs other keys is decided by the loss: `WindowedAttention` hides them from some heads, and
# `ablate_heads(mode="window")` from one head at a time.
#
# ## What the sink costs in low precision
#
# The sink's states are more than a hundred times larger than the others'. If activations are stored
# in eight bits with one scale per tensor, the sink determines the scale.
#
# > **Predict.** Quantise everything that way, and the loss rises by half a nat. Then leave *one*
# > token of 64 in full precision. By how many nats does the loss still rise if that is token 0? If
# > it is token 1?

# %%
guess = {"all but token 0": None, "all but token 1": None}  # numbers in the place of None

# %% tags=["reveal"]
plain = loss(prose, start=8)
damage = {}
for keep in [(), 0, 1]:
    with Quantise(model, "int8-tensor", keep=keep):
        damage[keep] = loss(prose, start=8) - plain
print(f"all tokens in int8: {damage[()]:+.2f} nat")
print(f"all but token 0: {damage[0]:+.2f} nat, all but token 1: {damage[1]:+.2f} nat")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"all but token 0": damage[0], "all but token 1": damage[1]},
    "rise of the loss in int8 [nat]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert damage[()] > 0.3 and abs(damage[1] / damage[()] - 1) < 0.3
# assert damage[0] < damage[()] / 3
# ```
#
# </details>

# %% [markdown]
# With one token in full precision, most of the loss is recovered. That is why KV-cache quantisation
# keeps such tokens in full precision (RotateKV, arXiv 2501.16383). `sinkscope precision` measures
# this for every tensor and layer.
#
# ## How many can be ablated?
#
# In practice: flag the inactive heads of every prompt, set them to zero, and measure the loss. (At
# each share the threshold is one for all prompts: a prompt with more inactive heads loses more of
# them.)
#
# > **Predict.** By how many nats does the loss rise if a fifth of all heads is ablated: the heads
# > with the smallest HONOR; those with the largest attention to the first token (AWFT); as many
# > random heads?

# %%
guess = {
    "smallest HONOR": None,
    "largest AWFT": None,
    "random heads": None,
}  # numbers in the place of None

# %% tags=["reveal"]
short = ss.token_ids(prose.tokens[:, :48])
ablated = ablate_inactive(model, short, scores=("AHON-LN", "AWFT"), shares=(0.1, 0.2), draws=5)
ablated.figures()["inactive-heads"]

# %% tags=["reveal"]
rises = ablated.ablated_loss - ablated.loss  # [score, share, prompt]
for score, (tenth, fifth) in zip(ablated.scores, rises, strict=True):
    print(f"{score:8} a tenth ablated: {estimate(tenth).signed(2)} nat, a fifth: {estimate(fifth).signed(2)} nat")  # fmt: skip

by_output, by_sink, at_random = rises.mean(-1)  # [share] each
difference = estimate(rises[1, 1] - rises[0, 1])  # AWFT against HONOR, prompt by prompt
print(f"A fifth by AWFT costs {difference.signed(2)} nat more than a fifth by HONOR.")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(
        zip(
            ("smallest HONOR", "largest AWFT", "random heads"),
            rises.mean(-1)[:, 1],
            strict=True,
        )
    ),
    "rise of the loss with a fifth ablated [nat]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert (by_output < at_random / 3).all(), "heads of small output cost far less than random ones"
# assert by_sink[0] < at_random[0], "at a tenth, both scores beat chance"
# assert difference.low > 0, "at a fifth, attention to the sink is no measure of what a head does"
# assert by_sink[1] > 0.2 * at_random[1], "and its heads cost a good part of what random ones do"
# ```
#
# </details>

# %% [markdown]
# (AHON-LN is HONOR by its systematic name.) The fifth of the heads that put out the least can be ablated
# on these four prompts at a small cost, 0 to 0.2 nat, depending on the text. The fifth that attend the most to the sink
# cannot: they cost several times as much, 0.4 to 0.8 nat (with Python 3.11, 3.12 and 3.13, whose texts differ), which
# is 40 to 80 % of the cost of random heads. Intervals are over prompts. Which heads are flagged by
# which score?

# %%
scores = ss.scan(model, short, progress=False).inactivity_scores()  # [prompt, layer, head] each
smallest = scores["AHON-LN"] < scores["AHON-LN"].quantile(0.2)
sink_most = scores["AWFT"] > scores["AWFT"].quantile(0.8)
for layer, head in [(18, 7), (18, 8), (24, 6)]:
    print(f"{layer}.{head}: among the smallest outputs on {smallest[:, layer, head].float().mean():.0%} of "
          f"prompts, among the largest sink attention on {sink_most[:, layer, head].float().mean():.0%}")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert smallest[:, 18, 7].all() and sink_most[:, 18, 7].all()
# assert sink_most[:, 24, 6].all() and not smallest[:, 24, 6].any()
# ```
#
# </details>

# %% [markdown]
# Attention to the sink flags 24.6, which has a large output; the output norm does not. Is the
# output norm then the better score?
#
# Four prompts do not show this, and here they would mislead. Over 128
# windows of prose (`docs/inactive-heads.md`) the result for large shares is confirmed: with three
# tenths of the heads ablated the loss is up by 14 % by output, by 52 % by sink attention, by 60 %
# at random. For small shares it is not. At a tenth both cost 6 %, since in some windows, none of
# which are among our four, heads with small outputs matter a lot. Within 1 % of the loss one can
# zero 4.5 % of the heads by attention to the sink, and only 2.7 % by the output norm.
# Sandoval-Segura et al., who allow 1 % of MMLU in models up to a hundred times as large, find the
# output norm better in most of fourteen models, but not in all (their Table 2).
#
# Both scores would ablate 18.7, which is correct on *this* text.
#
# ## Summary
#
# * A head that gives the sink 99 % may be an induction head that is active on repetitions.
# * Dormant is a property of a head *and* an input. Ablating a head on one kind of text shows
#   nothing about another.
# * High sink attention and a small output are different criteria. Each finds heads that can be
#   ablated; for the many heads on which they disagree, the loss decides.
# * Many heads attend only to the sink and the last keys; eight-bit quantisation fails at the sink,
#   and one token in full precision recovers most of the loss.
# * Use enough prompts, and correct for the number of heads, before making a claim about one.
#
# ## Exercises
#
# Put an expression, or a number with four significant digits, in the place of `None` and run the
# cell.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
with AblateHeads(model, [(16, 0)]):
    WITHOUT = pattern(echo, 18)[:, 7, half:, 0].mean().item()

ANSWERS = {  # exercise: (answer, hint)
    1: (
        report.honor[0, 24, 6].item(),
        "Divide by the mean over the heads of the same layer, prompt by prompt.",
    ),
    2: ((18, 6), "Add 31 to find it: attention from i to i - 31, averaged over the second half."),
    3: (WITHOUT, "with AblateHeads(model, [(16, 0)]): pattern(echo, 18)[:, 7, half:, 0].mean()"),
    4: (report.honor.mean(0)[8, 0].item(), "Divide prompt by prompt, then average over prompts."),
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
# **1.** Compute the HONOR of head 24.6 on the first prompt from `report.head_output_norm` (prompt,
# layer, head).

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# norms = report.head_output_norm[0, 24]
# answer_1 = (norms[6] / norms.mean()).item()
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** Search all layers: which (layer, head) is the strongest induction head on `echo`?

# %%
answer_2 = None

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# _, cache = model.run_with_cache(echo.tokens, names_filter=lambda name: "hook_pattern" in name)
# everywhere = torch.stack([cache["pattern", layer] for layer in range(model.cfg.n_layers)])
# stripes = everywhere.diagonal(offset=-(half - 1), dim1=-2, dim2=-1)[..., 1:].mean((1, 3))
# answer_2 = divmod(stripes.argmax().item(), stripes.shape[1])
#
# check(2, answer_2)
# ```
#
# </details>

# %% [markdown]
# **3.** Why is 16.0, a previous-token head, so costly on `echo`? Ablate it, and measure how much 18.7
# attends to the sink in the second half. What has happened to 18.7?

# %%
answer_3 = None

check(3, answer_3)


# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# with AblateHeads(model, [(16, 0)]):
#     answer_3 = pattern(echo, 18)[:, 7, half:, 0].mean().item()
# print(f"18.7 attends to the sink: {of_18[:, 7, half:, 0].mean():.2f}, without 16.0: {answer_3:.2f}")
# # 16.0 writes the previous token into each token's state. Without it, 18.7 finds no match,
# # and attends to the sink again.
#
# check(3, answer_3)
# assert answer_3 > of_18[:, 7, half:, 0].mean() + 0.2
# ```
#
# </details>

# %% [markdown]
# **4.** (harder) Write HONOR from activations: a function of head outputs before $W_O$,
# `[prompt position head d_head]`. What does it give for head 8.0, averaged over the prompts of
# `prose`?


# %%
def my_honor(z):
    """Mean output norm of each head over the mean of its layer [prompt head]."""
    raise NotImplementedError


answer_4 = None  # my_honor(...)[:, 0].mean().item()


check(4, answer_4)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# def my_honor(z):
#     norm = z.norm(dim=-1).mean(dim=1)  # over positions: [prompt head]
#     return norm / norm.mean(dim=1, keepdim=True)
#
#
# _, cached = model.run_with_cache(prose.tokens, names_filter="blocks.8.attn.hook_z")
# answer_4 = my_honor(cached["z", 8])[:, 0].mean().item()
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
# of_24 = report.head_output_norm[:, 24]
# assert not is_right(1, of_24[0, 6] / of_24.mean()), "prompt by prompt"
# assert not is_right(1, of_24[0, 6] / report.head_output_norm[0].mean()), "of the same layer"
# assert not is_right(3, of_18[:, 7, half:, 0].mean()), "without 16.0, not with it"
# norms = cached["z", 8].norm(dim=-1).mean(dim=1)
# assert not is_right(4, norms.mean(0)[0] / norms.mean()), "divide first"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. Can one show that a head is never active? What can one show?
# 2. A pruning method is tested on Wikipedia. What would you test it on before you use it?
# 3. Four prompts gave one order of the scores, 128 windows another. How would you have noticed?
#
# ## Read on
#
# * Tianyu Guo, Druv Pai, Yu Bai, Jiantao Jiao, Michael I. Jordan and Song Mei (2024), *Active-Dormant
#   Attention Heads*, arXiv 2410.13835
# * Pedro Sandoval-Segura and others (2025), *Using Attention Sinks to Identify and Evaluate Dormant
#   Heads in Pretrained LLMs*, arXiv 2504.03889
# * Catherine Olsson and others (2022), *In-context Learning and Induction Heads*, arXiv 2209.11895

# %% [markdown]
# Next: [6 · Grow a sink](06_grow_a_sink.ipynb).

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
# # 4 · Move the sink: waiver experiments
#
# Lesson 3 suggests a hypothesis: position 0 becomes the sink because it is the only position that
# *attends only to itself*. If it is true, we must be able to make a sink anywhere, and to remove
# one, by changing only that. This lesson does both, following Yan et al. (arXiv 2407.01601), who
# control sinks in two ways: by a **mask** in a causal model, and by the **position embeddings** in
# a bidirectional one.
#
# An intervention in sinkscope is a context manager. It composes with every measurement and leaves
# the model bit for bit as it was.
#
# **Goals.** After this lesson you can
#
# * make another token the sink, by a mask or by a position embedding,
# * separate causes with a 2 × 2 design,
# * say by what each kind of model distinguishes its first token.
#
# **Prerequisites.** Lessons [1](01_what_is_an_attention_sink.ipynb) to
# [3](03_drains_peaks_and_dimensions.ipynb).
#
# **Time.** About 75 minutes in class, with the predictions and two exercises.

# %%
import torch

import sinkscope as ss
from sinkscope.experiments import waiver
from sinkscope.experiments.rotary_precision import rotary_precision
from sinkscope.experiments.streaming_context import streaming_context
from sinkscope.interventions import (
    PositionEmbeddingEdit,
    PositionIdEdit,
    ReplaceEnd,
    ReplaceStart,
    ScaleActivation,
    SelfOnlyMask,
    SetActivation,
    ShiftSinkLogit,
    ZeroValue,
)

model = ss.load_model("smollm2-135m")
texts = ss.texts("prose", prompts=2, length=64).tokenize(model)
before = ss.scan(model, texts)

# %% [markdown]
# ## Make another position non-mixed
#
# Under a causal mask the query at position 0 sees one key, its own. We give position 40 the same
# mask: **its query sees only key 40**. Everything else is unchanged: its token, its position, and
# which queries see it. (The paper's exact "structured mask" is not public. This is our
# interpretation, and it is what Li et al., arXiv 2605.06611, found to make a sink.)
#
# $$A_{40,40} = 1, \qquad A_{40,j} = 0 \ \text{ for } j \ne 40, \qquad\text{so that}\quad o_{40} = v_{40}.$$
#
# > **Predict.** Position 40 receives next to nothing now. How much attention, 0 to 1, will it receive
# > under the mask? And position 0, which receives about a half now?

# %%
guess = {"position 0": None, "position 40": None}  # numbers in the place of None

# %% tags=["reveal"]
with SelfOnlyMask(model, position=40):
    after = ss.scan(model, texts)

ss.plot.by_position(after, layer=18)

# %% tags=["reveal"]
for name, report in {"baseline": before, "40 sees itself alone": after}.items():
    received = report.received_peak.mean(0)
    print(f"{name:22} position 0 receives {received[0]:.2f}, position 40 {received[40]:.3f}")

was, now = before.received_peak.mean(0)[40], after.received_peak.mean(0)[40]

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(zip(("position 0", "position 40"), after.received_peak.mean(0)[[0, 40]], strict=True)),
    "received attention under the mask [probability]",
    about=before.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert was < 0.03 and now > 0.15 and now > 10 * was
# ```
#
# </details>

# %% [markdown]
# An arbitrary word in the middle of the text becomes a second sink. No logit was raised and no key
# edited; its query was only kept from attending to others. (A key's importance counts its own
# query. Its attention to itself is one unit from one of the 24 queries that see it, 0.04. All the
# rest is from other queries.)
#
# Is it the *same* as the sink at 0, or an artefact? Lesson 3 tells what to look for: the
# peak after block 11, in channel 507, and a drained value.

# %%
norm = after.residual_norm[11]
value = after.value_norm[12:27].mean((0, 1))
print(f"residual norm after block 11: position 0 {norm[0]:,.0f}, position 40 {norm[40]:,.0f}, "
      f"median {norm.median():.0f}")  # fmt: skip
print(f"value norm, layers 12 to 26:  position 0 {value[0]:.1f}, position 40 {value[40]:.1f}, "
      f"median {value.median():.1f}")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert norm[40] > 20_000 and abs(norm[40] / norm[0] - 1) < 0.2
# assert abs(value[40] / value[0] - 1) < 0.1 and value[40] < 0.4 * value.median()
# assert abs(norm.median() / before.residual_norm[11].median() - 1) < 0.05
# ```
#
# </details>

# %% [markdown]
# It is the same: the peak is as high and the value as small. (The norms of the other positions have
# hardly changed.) Layer by layer, position 40 also behaves like position 0:

# %%
ss.plot.position_map(after)

# %%
by_layer = after.received_attention.mean(1)[:, [0, 40]]  # [layer, position]
together = torch.corrcoef(by_layer.T)[0, 1].item()
print(f"correlation of what 0 and 40 receive, over the layers: {together:.2f}")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert together > 0.8
# assert by_layer[[0, 1, 10, 11]].max() < 0.15 < by_layer[12:27].min()
# ```
#
# </details>

# %% [markdown]
# The two columns are bright and dark in the same layers. In layers 10 and 11 neither receives
# attention, since there is no peak to read (lesson 3); from layer 12 on both do.
#
# ## Two by two
#
# Yan et al. (their Fig. 3) add a control: does it matter which word the *text* starts with? Run the
# mask on and off, with the model's special start token and with random ones:

# %%
designation = waiver.structured_mask(model, texts, position=40)
designation.figures()["received_attention-by-position"]

# %%
for index, name in enumerate(designation.names):
    to_first, to_40 = (designation.attention_to(index, target).mean() for target in (0, 1))
    print(f"{name:32} attention to 0: {to_first:.2f}, to 40: {to_40:.2f}")

designated = [i for i, change in enumerate(designation.changes) if change != "unchanged"]
assert len(designated) == 2
for index in designated:
    to_first, to_40 = (designation.attention_to(index, target).mean() for target in (0, 1))
    assert abs(to_first - to_40) < 0.1 and to_40 > 0.2

price = designation.loss_change(designated[0])
later, own = price["after_it"].mean, price["at_the_position"].mean
print(f"change of the loss: {later:+.2f} nat at the later positions, {own:+.2f} nat at 40 itself")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert abs(later) < 0.4 < own
# ```
#
# </details>

# %% [markdown]
# (These values are for the queries *after* 40, in the second half of the layers, since those
# queries can see both positions.) The start token does not matter. The two sinks share the
# attention evenly: about 0.29 each, where one had 0.53.
#
# The mask has a cost: position 40 itself, which sees nothing before it, predicts badly. For the
# later tokens the change is too small for two prompts; over 32 prompts of 320 tokens their loss
# rises by 0.05 nat [0.03, 0.07].
#
# ## When is it decided?
#
# > **Predict.** Block 11 writes the peak. Let position 40 see only itself (a) in layers 0 to 11,
# > and everything from 12 on; (b) the other way round. How much attention, 0 to 1, will it receive
# > in each case?

# %%
guess = {"layers 0 to 11": None, "layers 12 to 29": None}  # numbers in the place of None

# %% tags=["reveal"]
received = {}
for name, layers in {"layers 0 to 11": range(12), "layers 12 to 29": range(12, 30)}.items():
    with SelfOnlyMask(model, 40, layers=layers):
        received[name] = ss.scan(model, texts, metrics=["received"]).received_peak.mean(0)[40]
    print(f"masked in {name:16} position 40 receives {received[name]:.3f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    received,
    "received attention of position 40 [probability]",
    about=before.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert received["layers 0 to 11"] > 0.8 * now > 4 * received["layers 12 to 29"]
# ```
#
# </details>

# %% [markdown]
# The early layers decide. Once block 11 has written the peak, position 40 is a sink even if it
# attends to others. Conversely, the mask in layers 12 to 29 has no effect if the peak was not
# written. (The remaining 0.03 is its attention to itself.)
#
# ## What does *not* matter
#
# Three more things distinguish position 0. Each can be given to position 40 by itself.
#
# > **Predict** for each: how much attention, 0 to 1, will position 40 receive?
# >
# > 1. Its queries and keys are rotated as if it stood at position 0 (RoPE's position id).
# > 2. Its residual state after block 2 is scaled to the norm that the sink has there.
# > 3. Its residual state after block 11 is *overwritten* by the sink's: no mask, no history.

# %%
guess = {
    "the position id of 0": None,
    "the sink's norm after block 2": None,
    "the sink's state after block 11": None,
}  # numbers in the place of None

# %% tags=["reveal"]
sink_state = {}
with torch.inference_mode():
    _, cache = model.run_with_cache(texts.tokens, names_filter=lambda n: "hook_resid_post" in n)
for layer in (2, 11):
    sink_state[layer] = cache["resid_post", layer][:, 0].mean(0)

gifts = {
    "the position id of 0": PositionIdEdit(model, source=0, target=40),
    "the sink's norm after block 2": ScaleActivation(
        model, 2, 40, norm=sink_state[2].norm().item()
    ),
    "the sink's state after block 11": SetActivation(model, 11, None, 40, sink_state[11]),
}
for name, gift in gifts.items():
    with gift:
        received[name] = ss.scan(model, texts, metrics=["received"]).received_peak.mean(0)[40]
    print(f"{name:32} position 40 receives {received[name]:.3f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    received,
    "received attention of position 40 [probability]",
    about=before.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert received["the position id of 0"] < 0.03
# assert received["the sink's norm after block 2"] < 0.03
# assert received["the sink's state after block 11"] > 0.1
# ```
#
# </details>

# %% [markdown]
# The rotary position does not matter. A large norm alone does not matter either, since
# normalisation removes it, and the *direction* is not the sink's. The state is sufficient. In this
# model a sink is defined by its **state**, which a non-mixed position acquires naturally.
#
# ## Shift everything
#
# Rotary attention depends on distances alone: adding 1,024 to *all* position ids changes nothing
# in exact arithmetic. Whatever does change is rounding error, and most models run in bfloat16, with
# eight bits of mantissa. `rotary_precision` measures the mean over queries, layers and heads of
# $\sum_j |\Delta A_{ij}|$.
#
# > **Predict.** In bfloat16, which share of this error is at position 0? (0 to 0.5: what one key
# > gains, others lose.) Which share of the attention, 0 to 1, does it receive?

# %%
guess = {"of the error": None, "of the attention": None}  # numbers in the place of None

# %% tags=["reveal"]
shifted = rotary_precision(
    "smollm2-135m", texts, shifts=[1024], dtypes=["bfloat16", "float32"], keep=[""], progress=False
)
print(shifted.summary())

# %% tags=["reveal"]
half, single = shifted.statistics()["arithmetics"].values()
share = {
    "of the error": half["shifts"]["1024"]["first_share"],
    "of the attention": half["first_attention"],
}
ss.plot.guess_and_result(
    guess, share, "share of position 0, bfloat16 [probability]", about=shifted.about
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# error = [one["shifts"]["1024"]["error"].mean for one in (half, single)]
# assert error[0] > 100 * error[1] and error[0] > 0.005
# assert 0.1 < share["of the error"] < 0.5 and share["of the attention"] > 0.2
# ```
#
# </details>

# %% [markdown]
# No other key has nearly as much of the error, but the first token has no larger share of it than of
# the attention. In float32 hardly any is left. `sinkscope positions` follows it over length, layers
# and heads, and measures which float32 steps reduce it (Wang et al., arXiv 2411.13476).
#
# ## Hide it
#
# `ShiftSinkLogit` adds a constant to one key's logit in every query that sees it. With $-10^4$ the
# key is effectively invisible.
#
# > **Predict.** Hide position 0 from all queries, in all layers. How much attention, 0 to 1, will
# > positions 0 and 1 receive? Think about what position 1 sees!

# %%
guess = {"position 0": None, "position 1": None}  # numbers in the place of None

# %% tags=["reveal"]
with ShiftSinkLogit(model, -1e4, position=0):
    hidden = ss.scan(model, texts, metrics=["received", "residual"])
top = hidden.received_peak.mean(0).argmax().item()
print(f"most attention: position {top}, {hidden.received_peak.mean(0)[top]:.2f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(zip(("position 0", "position 1"), hidden.received_peak.mean(0)[:2], strict=True)),
    "received attention, position 0 hidden [probability]",
    about=before.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert top == 1 and hidden.received_peak.mean(0)[1] > 0.3
# assert hidden.residual_norm[11, 1] > 10_000
# ```
#
# </details>

# %% [markdown]
# Position 1 becomes the sink, with its peak. With position 0 hidden, query 1 sees only itself, so
# *it* is now the non-mixed position. Removing the first token therefore does not remove the sink,
# since there is always a first token.
#
# Hiding position 0 only after block 11 is different, since then no other position can become the
# sink any more.


# %%
@torch.inference_mode()
def loss():
    """Mean next-token loss [nat]."""
    return model(texts.tokens, return_type="loss").item()


baseline = loss()
with ShiftSinkLogit(model, -1e4, position=0):
    hidden_always = loss()
with ShiftSinkLogit(model, -1e4, position=0, layers=range(12, 30)):
    hidden_late = loss()
print(f"baseline {baseline:.2f}, hidden everywhere {hidden_always:.2f}, "
      f"hidden after block 11 {hidden_late:.2f}")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert abs(hidden_always - baseline) < 0.3 < 0.4 < hidden_late - baseline
# ```
#
# </details>

# %% [markdown]
# ## Application
#
# A model that streams a long text can keep only a window of recent keys. When position 0 leaves the
# window, it is "hidden late", and the model breaks down. StreamingLLM (Xiao et al., arXiv
# 2309.17453) keeps the first few tokens besides the window, which avoids this.
#
# > **Predict.** What is the perplexity if we keep one single token besides a window of 128: position
# > 0, position 96, or position 96 *designated* by a mask? (With Python 3.11, whose manual is the text,
# > it is 19 with all keys and 38 with the window alone.)

# %%
guess = {"1 sink": None, "96 as it is": None, "designated 96": None}  # numbers in the place of None

# %% tags=["reveal"]
streamed = streaming_context(
    model, "prose", tokens=512, windows=(128,), sinks=(0, 1), designated=96, counted=("absolute",)
)
print(streamed.summary())

# %% tags=["reveal"]
perplexity = streamed.to_frame().set_index("kept")["perplexity_after"]
everything = perplexity["everything"]

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    dict(perplexity),
    "perplexity",
    about=before.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert perplexity["0 sinks"] > 1.3 * everything and perplexity["96 as it is"] > 1.3 * everything
# assert perplexity["1 sink"] < 1.15 * everything
# assert perplexity["designated 96"] < 1.15 * everything
# ```
#
# </details>

# %% [markdown]
# The window alone, and the window with an ordinary token from the middle, are much worse. One sink
# restores the perplexity, and so does *any* designated token. The model does not need the beginning
# of the text, only some sink.
#
# ## The other way: position embeddings
#
# MiniLM is bidirectional: every position sees all others, none is non-mixed, but `[CLS]` at
# position 0 is still a sink. So the model must distinguish position 0 in another way. MiniLM adds a
# learned vector $p_t$ to each token. Look at their norms (Yan et al., their Fig. 2, for
# BERT-Large):

# %%
minilm = ss.load_model("minilm-l6")
prompts = ss.texts("prose", prompts=8, length=64).tokenize(minilm)
baseline = ss.scan(minilm, prompts)
ss.plot.position_embedding_norms(baseline)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# norms = baseline.position_embedding_norm
# assert norms.argmax() == 0 and norms[0] > 3 * norms.median()
# ```
#
# </details>

# %% [markdown]
# The first vector is five times as long as the others. But two things are special about that
# position: the vector $p_0$ *and* the token `[CLS]`. They can be separated.
#
# > **Predict.** Swap $p_0$ and $p_{32}$. Do it twice: with `[CLS]` and `[SEP]` in their places, and
# > with random words instead. Four cases. Where is the sink in each?

# %%
guess = ""  # where is the sink in each case?

# %% tags=["reveal"]
plain = ReplaceEnd(minilm, "random")(ReplaceStart(minilm, "random")(prompts))
table = {}
for tokens, tokenised in {"[CLS] … [SEP]": prompts, "random ends": plain}.items():
    for change in ("as it is", "swapped"):
        if change == "swapped":
            with PositionEmbeddingEdit(minilm, source=0, target=32, mode="swap"):
                report = ss.scan(minilm, tokenised, metrics=["received"])
        else:
            report = ss.scan(minilm, tokenised, metrics=["received"])
        table[tokens, change] = report.received_peak.mean(0)[[0, 32]].tolist()
        at_0, at_32 = table[tokens, change]
        print(f"{tokens:14} p0, p32 {change:9} position 0: {at_0:.2f}   position 32: {at_32:.2f}")

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert table["[CLS] … [SEP]", "as it is"][0] > 0.2 and table["random ends", "as it is"][0] > 0.2
# assert min(table["[CLS] … [SEP]", "swapped"]) > 0.1, (
#     "two sinks: one by its vector, one by its token"
# )
# assert table["random ends", "swapped"][0] < 0.05 and table["random ends", "swapped"][1] > 0.2
# ```
#
# </details>

# %% [markdown]
# The table shows:
#
# * Random words at both ends change nothing: position 0 does not need `[CLS]`.
# * Random words *and* swapped vectors: the sink **moves** to 32 entirely, so the vector is
#   sufficient.
# * `[CLS]` and swapped vectors: two sinks. The vector makes one at 32, and the token `[CLS]` makes
#   one by itself at 0, without the vector.
#
# There are two sufficient causes, each hidden while the other is present. Only the fourth cell of
# the table separates them. This is why `waiver.position_embeddings` and `waiver.structured_mask`
# always run both kinds of start.
#
# ## Summary
#
# * In a causal model a token that is masked to see only itself becomes a sink, with the same peak,
#   drain and attention.
# * This is decided before the peak is written. Position ids and norms do not matter; the state
#   does.
# * Without the first token the next one becomes the sink. If it is hidden only in late layers, the
#   model breaks down.
# * In MiniLM a position vector and the token `[CLS]` are each sufficient for a sink.
#
# ## Exercises
#
# Put an expression, or a number with four significant digits, in the place of `None` and run the
# cell.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
with SelfOnlyMask(model, [16, 32, 48]):
    FOUR = ss.scan(model, texts, metrics=["received", "sink_attention"], sinks=[0, 16, 32, 48])
with PositionEmbeddingEdit(minilm, source=-1, target=32):
    LAST = ss.scan(minilm, plain, metrics=["received"])

ANSWERS = {  # exercise: (answer, hint)
    1: (
        FOUR.mean("sink_attention").mean().item(),
        "Scan inside the mask with sinks=[0, 16, 32, 48]; sink_attention adds the four up.",
    ),
    2: (1, "Its output is A₁₀·v₀ + A₁₁·0: how many values does it mix?"),
    3: (
        "yes" if LAST.received_peak.mean(0)[32] > 0.1 else "no",
        "PositionEmbeddingEdit(minilm, source=-1, target=32); then received_peak at 32.",
    ),
    4: (
        after.received_peak.mean(0)[40].item(),
        "Set row 40 of `allowed` to False but at key 40, and scores to -inf where it is False.",
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
# **1.** Designate three positions at once, 16, 32 and 48. How much attention do the *four* sinks
# receive together, on average over prompts, layers and heads? Is it much more than the single sink
# had?

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# with SelfOnlyMask(model, [16, 32, 48]):
#     four = ss.scan(model, texts, sinks=[0, 16, 32, 48])
# answer_1 = four.sink_attention.mean().item()
# alone = before.sink_attention.mean().item()
# print(f"four sinks {answer_1:.2f}, one sink {alone:.2f}: much the same budget, shared")
#
# check(1, answer_1)
# assert answer_1 < 1.5 * alone
# ```
#
# </details>

# %% [markdown]
# **2.** Set the *value* of position 1 to zero in every layer, `ZeroValue(model, 1)`, on 16 prompts.
# No mask changes. In some of the prompts a position other than 0 becomes a sink: after some
# layer its residual norm is more than 50 times the median (`residual_outlier`). Which one, and why?

# %%
answer_2 = None  # a position

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# with ZeroValue(model, 1):
#     drained = ss.scan(model, ss.texts("prose", prompts=16, length=64), metrics="residual")
# sinks_now = (drained.residual_outlier > 50).sum(0)  # prompts in which each position is one
# answer_2 = 1 + sinks_now[1:].argmax().item()
# print(f"position {answer_2} is a sink in {sinks_now[answer_2]} of 16 prompts")
# # Query 1 sees v0 and its own zero: all that it can put out is a multiple of one value, v0.
#
# check(2, answer_2)
# assert sinks_now[answer_2] > 1 and sinks_now[1:].sum() - sinks_now[answer_2] < 2
# ```
#
# </details>

# %% [markdown]
# **3.** In MiniLM the *last* position embedding, $p_{511}$, is longer than usual too. Give it to
# position 32, on the prompts with random ends (`plain`). Does 32 become a sink? Answer "yes" or
# "no".

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# with PositionEmbeddingEdit(minilm, source=-1, target=32):
#     last = ss.scan(minilm, plain, metrics=["received"])
# answer_3 = "yes" if last.received_peak.mean(0)[32] > 0.1 else "no"  # a length is not a direction
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** (harder) Build the structured mask itself: with plain TransformerLens hooks, let
# position 40 see only itself in every layer. What does it receive then, averaged over prompts,
# layers and heads?

# %%
allowed = torch.ones(64, 64, dtype=torch.bool).tril()  # the attention mask [query key]


def my_mask(scores, hook):
    """Attention scores [prompt head query key] with the mask applied."""
    raise NotImplementedError


answer_4 = None


check(4, answer_4)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# allowed = torch.ones(64, 64, dtype=torch.bool).tril()
# allowed[40, :40] = False
# seen_by = torch.arange(64, 0, -1)  # how many queries see each key
# taken = []
#
#
# def my_mask(scores, hook):
#     return scores.masked_fill(~allowed, -torch.inf)
#
#
# def read(pattern, hook):
#     taken.append((pattern.sum(dim=2) / seen_by)[..., 40].mean())
#
#
# hooks = [
#     (f"blocks.{layer}.attn.{name}", function)
#     for layer in range(model.cfg.n_layers)
#     for name, function in (("hook_attn_scores", my_mask), ("hook_pattern", read))
# ]
# with torch.inference_mode():
#     model.run_with_hooks(texts.tokens, fwd_hooks=hooks)
# answer_4 = torch.stack(taken).mean().item()
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
# assert not is_right(1, alone), "four sinks, not the one of before"
# assert not is_right(4, was), "under the mask, not without it"
# assert not is_right(4, after.received_peak.mean(0)[0]), "position 40, not 0"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. A mask moves the sink in SmolLM2, and a vector in MiniLM. What would you expect of a model with ALiBi?
# 2. What is a control, and which one in this lesson convinced you?
# 3. A cache keeps four tokens and a window. Which tokens would you choose?
#
# ## Read on
#
# * Ruiqing Yan and others (2024), *Unveiling and Controlling Anomalous Attention Distribution in
#   Transformers*, arXiv 2407.01601
# * Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han and Mike Lewis (2023), *Efficient Streaming
#   Language Models with Attention Sinks*, arXiv 2309.17453
# * Xiangming Gu, Tianyu Pang, Chao Du and others (2024), *When Attention Sink Emerges in Language
#   Models: An Empirical View*, arXiv 2410.10781

# %% [markdown]
# Next: [5 · Dormant heads](05_dormant_heads.ipynb).

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
# # 3 · Value drains, residual peaks, non-mixture dimensions
#
# A head can attend to the first token only if something in that token's state identifies it. This
# lesson finds out what that is, which part of the model writes it, and how it becomes attention.
#
# The residual stream is $h^{(l+1)} = h^{(l)} + \mathrm{attn}(h^{(l)}) + \mathrm{ffn}(\dots)$, one vector per position, to
# which every block adds.
#
# **Goals.** After this lesson you can
#
# * find which block writes the sink's residual peak, and in which channels,
# * show by ablation that attention depends on it,
# * explain how a large number becomes attention.
#
# **Prerequisites.** Lessons [1](01_what_is_an_attention_sink.ipynb) and
# [2](02_find_the_sinks_of_a_model.ipynb); what a residual stream is.
#
# **Time.** About 75 minutes in class, with the predictions and two exercises.

# %%
import math

import torch

import sinkscope as ss

model = ss.load_model("smollm2-135m")
texts = ss.texts("prose", prompts=4, length=64).tokenize(model)
report = ss.scan(model, texts)

# %% [markdown]
# ## A peak
#
# Take the norm $\lVert h_j \rVert$ of every position's residual state after every block.
#
# > **Predict.** The states of ordinary tokens grow from a norm of about 40 to about 800 through the
# > 30 blocks. What does the first token's curve look like?

# %%
guess = ""  # what does the curve look like?

# %% tags=["reveal"]
ss.plot.residual_norms(report)

# %% tags=["reveal"]
peak = report.residual_peak.mean(0)  # ‖h_0‖ over the median of the others [layer]
print({layer: round(peak[layer].item(), 1) for layer in (0, 2, 5, 10, 11, 20, 27, 28, 29)})

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert peak.argmax() == 11 and peak[11] > 100
# assert 5 < peak[2:6].min() and peak[10] < 2, "a first, lower peak that is gone before the second"
# assert peak[29] < 10, "and an end"
# ```
#
# </details>

# %% [markdown]
# Note the logarithmic axis: after block 11 the first token's norm is more than **a hundred times**
# that of all others. This is a *residual-state peak* (Guo et al., arXiv 2410.13835). Layer by
# layer:
#
# * blocks 1 and 2 write a first peak, about ten times the others;
# * blocks 8 to 10 remove it;
# * block 11 writes the main peak, which then stays nearly constant;
# * blocks 28 and 29 remove it again.
#
# Lesson 1 found two regions without sink attention, in the first layers and around layer 11. In
# exactly these two regions there is no peak.

# %%
attention = report.sink_attention.mean((0, 2))  # [layer]
read_by_layer = torch.cat([peak[:1], peak[:-1]])  # what layer l reads is what block l - 1 left
high = read_by_layer > 5
print(f"sink attention of layers that read a peak: {attention[high].mean():.2f}, others: "
      f"{attention[~high].mean():.2f}")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert attention[high].mean() > 3 * attention[~high].mean()
# ```
#
# </details>

# %% [markdown]
# ## Which channels?
#
# A large norm can be spread over all 576 residual channels, or concentrated in a few of them. Sun
# et al. (arXiv 2402.17762) call an activation **massive** if it is above 100 and above 1,000 times
# the median activation of its hidden state.
#
# > **Predict.** How many of the 576 channels hold a massive activation?

# %%
guess = {"channels": None}  # numbers in the place of None

# %% tags=["reveal"]
ss.plot.massive_activations(report)

# %% tags=["reveal"]
massive = report.to_frame("massive").query("layer >= 11")
dims = massive.groupby("dim")["value [activation]"].agg(["count", "mean"])
print(dims)

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"channels": len(dims)},
    "channels with massive activations [count]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert set(massive["position"]) == {0} and 507 in dims.index and len(dims) <= 3
# assert dims["mean"][507] > 20_000
# ```
#
# </details>

# %% [markdown]
# Two. Channel 507 has about 23,000, in every prompt, for any first word, from layer 11 to layer 27.
# (247 passes the rule for a layer or two.) No other position has any. If the map shows a faint cell
# at layer 2, hover over it: that is a secondary sink, an early " the", as in lesson 2.
#
# ## Who writes it?
#
# The report contains the output of each block's FFN at the sink, in every channel. For channel 507:

# %%
ledger = report.ffn_sink_mean[:, 507]  # FFN output at position 0, mean over prompts [layer]
others = report.ffn_mixed_mean[:, 507]  # the largest |output| at any other position
for layer in (ledger.abs() > 50).nonzero()[:, 0].tolist():
    print(f"FFN of block {layer:2}: {ledger[layer]:+8.0f}   (others reach ±{others[layer]:.0f})")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert ledger.argmax() == 11 and ledger[11] > 20_000 > 1000 * others[11]
# assert ledger[[1, 2]].min() > 50 and ledger[[8, 9, 10]].sum() < -400
# assert ledger[12:27].abs().max() < 50, "nobody touches it between 12 and 26"
# assert ledger[[27, 28, 29]].max() < -50 and ledger[[28, 29]].sum() < -15_000
# ```
#
# </details>

# %% [markdown]
# Blocks 1 and 2 add to the channel and blocks 8 to 10 subtract from it; block 11 adds an enormous
# value; fifteen blocks leave it unchanged; blocks 27 to 29 subtract it, before it could disturb the
# unembedding.
#
# At all other positions block 11 adds at most a thousandth of it. (Blocks 2 to 10 may act on an
# early " the" as on the first token: the secondary sink of lesson 2.)
#
# ## Non-mixture dimensions
#
# Why does the first token get it, independently of the word? Under a causal mask, position 0
# attends only to itself. Its attention output is *one* value vector, while that of all others is an
# average of several. It is the only **non-mixed** position. Yan et al. (arXiv 2407.01601, their
# Fig. 1) showed that an early FFN of Llama3-8B turns this difference into a few extreme channels,
# which they call the non-mixture distribution. Their exact rule is not public. The operational rule
# of sinkscope is ours: with $x$ the FFN's output, channel $d$ counts if, in at least half of the
# prompts,
#
# $$|x_{0,d}| > 100 \cdot \operatorname{median}_{c} |x_{0,c}| \quad\text{and}\quad
#   |x_{0,d}| > 10 \cdot \max_{i \ge 1} |x_{i,d}| .$$
#
# Both thresholds are arguments.

# %%
ss.plot.nonmixture_dims(report)

# %%
found = report.nonmixture_dims()
for row in found:
    print(f"layer {row['layer']:2}, dim {row['dim']}: {row['value']:+8.0f}, "
          f"{row['over_mixed']:5.0f} × any other position")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert found[0]["layer"] == 11 and found[0]["dim"] == 507 and found[0]["over_mixed"] > 1000
# assert {(row["layer"], row["dim"]) for row in found} >= {(11, 507), (28, 507)}
# ```
#
# </details>

# %% [markdown]
# Channel 507 of layer 11 passes by far (more than a thousand times any other position, where ten is
# enough), and so do the blocks that remove it (with negative sign). In Llama3-8B three channels do
# (788, 1384 and 4062, in its second block). This small model has one.
#
# ## Take it away
#
# So far this is observation. To find out what the peak is *for*, remove it. `trace_peak` sets the
# output of one block's attention or FFN to zero, **at position 0 only**, and reads off the peak and
# the sink attention everywhere.
#
# > **Predict.** With all parts, the layers after block 11 pay the sink about 0.6 of their attention.
# > How much, 0 to 1, without the FFN of block 11 at position 0? And without block 11's *attention*,
# > or without the FFN of block 12?

# %%
guess = {
    "without the FFN of block 11": None,
    "without its attention": None,
    "without the FFN of block 12": None,
}  # numbers in the place of None

# %% tags=["reveal"]
from sinkscope.experiments.trace_peak import trace_peak

short = ss.token_ids(texts.tokens[:, :48])
trace = trace_peak(model, short, blocks=(1, 2, 10, 11, 12), modes=("zero",))
trace.figures()["sink_attention-zero"]

# %% tags=["reveal"]
print(trace.summary())

left = trace.left("zero")  # share of the peak that is left [block, part]
after = slice(12, None)
baseline = trace.attention[:, after].mean()
without = trace.attention_without[trace.blocks.index(11), trace.parts.index("ffn"), 0][:, after]

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {
        name: trace.attention_without[trace.blocks.index(block), trace.parts.index(part), 0][
            :, 12:
        ].mean()
        for name, block, part in (
            ("without the FFN of block 11", 11, "ffn"),
            ("without its attention", 11, "attention"),
            ("without the FFN of block 12", 12, "ffn"),
        )
    },
    "sink attention of the layers from 12 on [probability]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert (left < 0.05).sum() == 1 and left[trace.blocks.index(11), trace.parts.index("ffn")] < 0.05
# assert baseline > 0.5 > 0.2 > without.mean()
# ```
#
# </details>

# %% [markdown]
# Without one FFN output at one position, the sink attention of all later layers falls from about
# 0.6 to about 0.1. No other part comes close. (Without the FFN of block 10 the peak is only half as
# high, but the attention hardly changes.) Guo et al. found the same kind of thing in Llama-3.1-8B,
# where it takes the FFNs of blocks 0 and 1, and no attention at all.
#
# ## How does a number become attention?
#
# A large number in the residual stream does not make a large key. Every block normalises its input
# (RMSNorm), and then the peak **dominates everything else.** After division by a norm that is
# almost only channel 507, the state has the direction of channel 507, with hardly any trace of the
# word. So all first tokens become the same vector:

# %%
with torch.inference_mode():
    _, cache = model.run_with_cache(
        texts.tokens, names_filter=lambda name: name.endswith(("hook_resid_post", "attn.hook_k"))
    )


def likeness(layer, position):
    """Mean cosine between the states of different prompts at a position."""
    state = cache["resid_post", layer][:, position]
    cosines = torch.cosine_similarity(state[:, None], state[None], dim=-1)
    return cosines[~torch.eye(len(state), dtype=torch.bool)].mean().item()


for layer in (0, 2, 11, 20):
    print(f"after block {layer:2}: position 0 {likeness(layer, 0):.4f}, "
          f"position 20 {likeness(layer, 20):.4f}")  # fmt: skip

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert likeness(20, 0) > 0.999 and likeness(20, 20) < 0.95
# assert likeness(0, 0) < 0.95, "it did not start that way"
# ```
#
# </details>

# %% [markdown]
# Four prompts that begin with four different words have the same state there. From then on the
# first token is a *constant*, for which the model can learn a constant key. The logit is
#
# $$s_{i0} = \frac{q_i \cdot k_0}{\sqrt d} =
#   \frac{\lVert q_i\rVert\,\lVert k_0\rVert}{\sqrt d}\,\cos(q_i, k_0) .$$
#
# > **Predict.** Is the sink's key long, or does it point the right way?

# %%
guess = ""  # long, or in the right direction?

# %% tags=["reveal"]
layer = 18
key_norm = cache["k", layer].norm(dim=-1).mean((0, 2))  # over prompts and KV heads [position]
towards_sink = report.sink_cosine[:, 12:].mean().item()
towards_others = report.other_cosine[:, 12:].mean().item()
print(
    f"layer {layer}: key norm of the sink {key_norm[0]:.1f}, of the others {key_norm[1:].mean():.1f}"
)
print(f"cosine of queries with the sink's key {towards_sink:+.2f}, others' {towards_others:+.2f}")
ss.plot.by_layer(report, "sink_cosine", "other_cosine")

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert key_norm[0] < 0.5 * key_norm[1:].mean() and towards_sink > 0.2 > 0 > towards_others
# ```
#
# </details>

# %% [markdown]
# It is *short*, a quarter of the others', but has the right direction: queries have a positive
# cosine with the sink's key, and a slightly negative one with all other keys. The sink is due to
# the angle, not the norm. Gu et al. (arXiv 2410.10781) see the same in Llama3-8B.
#
# ## Drains
#
# The same constant state also passes through the value matrix, which maps it to almost nothing.

# %%
ss.plot.value_drains(report)

# %%
drain = report.value_drain.mean((0, 2))  # ‖v_0‖ over the mean of the others [layer]
print("drain:", {layer: round(drain[layer].item(), 2) for layer in (0, 5, 11, 18, 23, 29)})

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert drain[high].mean() < 0.35 < 0.7 < drain[~high].mean()
# ```
#
# </details>

# %% [markdown]
# In layers that read a peak, the sink's value is a quarter of the others'. In the others (the first
# layers, 10, 11) it is an ordinary value. **Attention, peak and drain occur in the same layers**: a
# state that identifies the sink, keys aligned with queries, and small values. Guo et al. explain
# this by *mutual reinforcement*; lesson 6 trains a model that forms a sink, and tests the
# explanation.
#
# ## How much depends on it
#
# How much does the loss depend on this one number out of $64 \times 576$?
#
# > **Predict.** The loss is about 3 nats per token. What is it when channel 507 of position 0 is
# > set to zero after block 11? And when it is set to its mean over *other* texts? (In nats.)

# %%
guess = {"dim 507 → zero": None, "dim 507 → mean": None}  # numbers in the place of None

# %% tags=["reveal"]
from sinkscope.interventions import SetActivation

other_texts = ss.texts("prose", prompts=4, length=64, seed=1)


@torch.inference_mode()
def loss():
    """Mean next-token loss [nat]."""
    return model(texts.tokens, return_type="loss").item()


losses = {"baseline": loss()}
for dim, mode in ((507, "zero"), (507, "mean"), (506, "zero")):
    with SetActivation(model, 11, dim, 0, mode, calibration=other_texts):
        losses[f"dim {dim} → {mode}"] = loss()
for name, value in losses.items():
    print(f"{name:16} {value:6.3f}")

blind = math.log(model.cfg.d_vocab)  # the loss of guessing evenly among all tokens

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    losses,
    "loss [nat]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert losses["dim 507 → zero"] > blind > 10
# assert abs(losses["dim 507 → mean"] - losses["baseline"]) < 0.1
# assert abs(losses["dim 506 → zero"] - losses["baseline"]) < 0.1
# ```
#
# </details>

# %% [markdown]
# With the number set to zero, the model is destroyed: it is worse than uniform guessing among all
# 49,152 tokens, with a loss of $\ln 49152 \approx 10.8$. Set to the mean of other texts, almost
# nothing changes, since the number carries no information about *this* text. It is a constant, a
# **bias**, which a transformer without biases can store only in a token. (Sun et al. found both
# halves in Llama2-7B. Zero ablation alone would suggest that channel 507 is the most important
# information about the text. Always use mean ablation too.)
#
# ## Summary
#
# * In SmolLM2 the FFN of block 11 writes +23,000 into channel 507 of the first token; blocks 28 and
#   29 remove it again.
# * Normalisation turns the peak into a constant direction. The key has a favourable angle to
#   queries (not a large norm), the value is small.
# * Sink attention, residual peak and value drain appear in the same layers, and vanish together.
# * The model depends on the number as a constant; it carries no information.
#
# The layer and channel are those of this model. The rule for "non-mixture" is ours, and its
# thresholds are conventions.
#
# ## Exercises
#
# Put an expression, or a number with four significant digits, in the place of `None` and run the
# cell.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
minilm = ss.load_model("minilm-l6")
MINILM = ss.scan(minilm, ss.texts("prose", prompts=4, length=64), metrics=["ffn"])


@torch.inference_mode()
def _dims_of_the_norm():
    """Computed differently from the solution: from activations instead of the report."""
    state = cache["resid_post", 15][:, 0].mean(0)
    size = state.square().sort(descending=True).values
    return int((size.cumsum(0) / size.sum() < 0.99).sum()) + 1


ANSWERS = {  # exercise: (answer, hint)
    1: (
        report.to_frame("value_drain").groupby(["layer", "kv_head"]).mean(numeric_only=True)
        ["value_drain [ratio]"].idxmin(),
        "report.value_drain is [prompt, layer, kv_head]; its mean over prompts has two dimensions.",
    ),
    2: (
        math.exp(losses["dim 507 → zero"]) / math.exp(losses["baseline"]),
        "Both losses are in `losses`; perplexity is e to the loss.",
    ),
    3: (_dims_of_the_norm(), "Sort the squares, add them up, and see when 99 % is reached."),
    4: (
        (MINILM.ffn_sink_mean.abs() / MINILM.ffn_mixed_mean).amax(0).argmax().item(),
        "report.nonmixture_dims() of a scan of MiniLM; every record names the same dim.",
    ),
    5: (int(report.massive.count[0, 11]), "One median for the whole state, of absolute values."),
}  # fmt: skip
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
# **1.** In which (layer, kv_head) is the sink's value drained the most, on average over prompts?
# Answer with a pair.

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# least = report.value_drain.mean(0)
# answer_1 = divmod(least.argmin().item(), least.shape[1])
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** By which factor does the perplexity, $e^{\text{loss}}$, rise when channel 507 is set to zero?

# %%
answer_2 = None

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# nats = losses["dim 507 → zero"] - losses["baseline"]
# answer_2 = math.exp(nats)
# print(f"{nats:.1f} nats a token: perplexity × {answer_2:,.0f}")
#
# check(2, answer_2)
# ```
#
# </details>

# %% [markdown]
# **3.** After block 15, how many of the 576 channels does it take to make up 99 % of
# $\lVert h_0 \rVert^2$ (of the mean over prompts)? The state is `cache["resid_post", 15][:, 0]`.

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# squares = cache["resid_post", 15][:, 0].mean(0) ** 2
# answer_3 = next(k for k in range(1, 577) if squares.topk(k).values.sum() >= 0.99 * squares.sum())
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** MiniLM is bidirectional: no position is non-mixed, but `[CLS]` is still a sink. Does one
# of its FFN channels single out `[CLS]`? Which? (`ss.load_model("minilm-l6")`,
# `nonmixture_dims()`.)

# %%
answer_4 = None

check(4, answer_4)


# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# records = MINILM.nonmixture_dims()
# print([(row["layer"], row["dim"], round(row["value"])) for row in records])
# (answer_4,) = {row["dim"] for row in records}
#
# check(4, answer_4)
# ```
#
# </details>

# %% [markdown]
# **5.** (harder) Write Sun et al.'s rule: how many activations of the residual state after block
# 11, on the first prompt, exceed 100 in size and 1,000 times the median size of the hidden state?


# %%
def my_massive(hidden):
    """Count of massive activations of a hidden state [position dim]."""
    raise NotImplementedError


answer_5 = None


check(5, answer_5)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 5</summary>
#
# ```python
# def my_massive(hidden):
#     size = hidden.abs()
#     return int(((size > 100) & (size > 1000 * size.median())).sum())
#
#
# _, cached = model.run_with_cache(texts.tokens[:1], names_filter="blocks.11.hook_resid_post")
# answer_5 = my_massive(cached["resid_post", 11][0])
#
# check(5, answer_5)
# ```
#
# </details>

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert solved == set(ANSWERS), "every solution is right"
# assert not is_right(2, math.exp(losses["dim 507 → zero"])), "a factor, not the perplexity"
# size = cache["resid_post", 15][:, 0].mean(0).abs().sort(descending=True).values
# unsquared = (size.cumsum(0) / size.sum() < 0.99).sum() + 1
# assert not is_right(3, unsquared), "squares add up to the squared norm"
# state = cached["resid_post", 11][0]
# signed = (state.abs() > 100) & (state.abs() > 1000 * state.median())
# assert not is_right(5, signed.sum()), "the median of absolute values"
# each = state.abs().median(dim=-1, keepdim=True).values
# own = (state.abs() > 100) & (state.abs() > 1000 * each)
# assert not is_right(5, own.sum()), "one median for the whole state"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. The peak is nearly the same for every text. What could a model use a constant for?
# 2. Setting one number of 576 × 64 to zero ruins the loss, setting it to its mean does not. What does this say about ablation by zero?
# 3. What does a single channel of 20,000 mean for 8-bit quantisation?
#
# ## Read on
#
# * Mingjie Sun, Xinlei Chen, J. Zico Kolter and Zhuang Liu (2024), *Massive Activations in Large
#   Language Models*, arXiv 2402.17762
# * Tianyu Guo, Druv Pai, Yu Bai, Jiantao Jiao, Michael I. Jordan and Song Mei (2024), *Active-Dormant
#   Attention Heads*, arXiv 2410.13835
# * Ruiqing Yan and others (2024), *Unveiling and Controlling Anomalous Attention Distribution in
#   Transformers*, arXiv 2407.01601

# %% [markdown]
# Next: [4 · Move the sink](04_move_the_sink.ipynb).

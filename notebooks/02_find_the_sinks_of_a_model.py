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
# # 2 · Find the sinks of a model
#
# Does a given model have attention sinks, in which heads, on which tokens, and with what
# uncertainty? One call measures this. Interpreting the result takes care, because the most quoted
# statistic in this field, the *sink rate*, depends strongly on the threshold, the length of the
# text, and the first token. This lesson varies all three.
#
# **Goals.** After this lesson you can
#
# * scan a model and read the result,
# * say what a sink rate depends on, and what to report with it,
# * give it an interval, and find sinks that are not at position 0.
#
# **Prerequisites.** [Lesson 1](01_what_is_an_attention_sink.ipynb).
#
# **Time.** About 60 minutes in class, with the predictions and two exercises.

# %%
import tempfile
from pathlib import Path

import torch

import sinkscope as ss
from sinkscope import bb

model = ss.load_model("smollm2-135m")

# %% [markdown]
# ## One call
#
# > **Predict.** SmolLM2-135M has 30 layers of 9 heads. How many of the 270 heads give the first
# > token, on average, more than 0.3 of their attention?

# %%
guess = {"sink heads": None}  # numbers in the place of None

# %% tags=["reveal"]
texts = ss.texts("prose", prompts=8, length=128)  # windows of the Python manual
report = ss.scan(model, texts)
report

# %% tags=["reveal"]
sink_heads = int((report.sink_importance.mean(0) > 0.3).sum())

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"sink heads": int(report.sink_heads().sum())},
    "heads [count]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert 150 < sink_heads < 200, "about two thirds of the heads"
# assert report.top_heads(1)[0]["layer"] == 18
# ```
#
# </details>

# %% [markdown]
# About two thirds. Read the table from the top:
#
# * **Text** gives the source, number of prompts, $T$ and the BOS policy. Without this line the
#   values cannot be interpreted, as the next sections show.
# * **Sinks** gives the mean attention to the sink with an interval, and beside it what uniform
#   attention would have given.
# * **Value drain, Residual peak, Massive dims, Non-mixture dims** are properties of the sink inside
#   the model, the subject of lesson 3.
# * **Strongest sink heads**: two heads of layer 18 give the first token practically *all* of their
#   attention. Are 18.7 and 18.8 of any use? Lesson 5 looks for a text on
#   which they are active.
#
# The same as a map, with a threshold slider:

# %%
ss.plot.head_map(report)

# %% [markdown]
# A live notebook offers more: click a head on the map to see its attention, values and pattern,
# type a prompt to measure it, or compare an intervention (the subject of lesson 4).

# %% tags=["live"]
ss.explore(report, model=model)

# %% [markdown]
# ## A rate has a threshold
#
# The **sink rate** of Gu et al. (arXiv 2410.10781) counts heads. For each prompt, layer and head
# take the importance score of key $k$, the mean of $A_{ik}$ over the queries that see it. Then
#
# $$\mathrm{Sink}_k^{\varepsilon} = \frac{1}{N L H} \sum_{n, l, h}
#    \mathbf{1}\!\left[\alpha_k^{(n,l,h)} > \varepsilon\right].$$
#
# The threshold is applied to each prompt, and averaged only afterwards.
#
# > **Predict.** With $\varepsilon = 0.3$ this model's rate is about 65 %. Barbero et al. (arXiv
# > 2504.02732) use $\varepsilon = 0.8$ and report 46 % for Llama-3.1-8B. What will SmolLM2 have at
# > 0.8, as a share from 0 to 1?

# %%
guess = {"ε = 0.8": None}  # numbers in the place of None

# %% tags=["reveal"]
ss.plot.sink_rate(report)

# %% tags=["reveal"]
print({epsilon: round(report.sink_rate_at(epsilon), 2) for epsilon in (0.1, 0.3, 0.5, 0.8)})

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"ε = 0.8": report.sink_rate_at(0.8)},
    "sink rate [share of heads]",
    about=report.settings,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert 0.55 < report.sink_rate_at(0.3) < 0.75
# assert report.sink_rate_at(0.8) < 0.1 < 0.75 < report.sink_rate_at(0.1)
# ```
#
# </details>

# %% [markdown]
# The same heads, the same text: anything from 85 % to 4 %. There is no correct threshold, so show
# the curve, or at least state $\varepsilon$. A report contains the scores themselves, so
# `sink_rate_at` is exact at every threshold without another measurement.
#
# ## A rate has a length
#
# > **Predict.** Here is the same kind of text in windows of 16, 32, 64, 128 and 256 tokens. Does
# > the sink rate at 0.3 rise or fall with the length? And is the sink *stronger* in short texts?

# %%
guess = ""  # rises or falls? stronger or weaker?

# %% tags=["reveal"]
lengths = (16, 32, 64, 128, 256)
by_length = [
    ss.scan(
        model,
        ss.texts("prose", prompts=4, length=length),
        metrics=["sink_attention", "received"],
    )
    for length in lengths
]
ss.plot.sink_rate_by_length(by_length)

# %% tags=["reveal"]
rates = [one.sink_rate_at(0.3) for one in by_length]
ratios = [one.uniform_ratio[:, :, 0].mean().item() for one in by_length]
for length, rate, ratio in zip(lengths, rates, ratios, strict=True):
    print(f"T = {length:3}: sink rate {rate:.0%}, {ratio:4.1f} × what uniform attention gives")

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert rates[0] > 0.8 > 0.6 > rates[-1], "the rate falls with the length …"
# assert ratios[-1] > 3 * ratios[0], "… while the sink stands out more and more"
# ```
#
# </details>

# %% [markdown]
# The rate falls from almost 90 % to about 50 %, while the sink stands out *more*: three times what
# uniform attention would give it at 16 tokens, about fifteen times at 256. Both are true. In a long
# text attention is divided among more keys, so every single key receives less, including the sink;
# but uniform attention decreases much faster. Therefore compare rates only at equal $T$ (in papers:
# 64), and consider `uniform_ratio` as well. At $T = 9$, uniform attention alone already passes
# $\varepsilon = 0.3$: exercise 4.
#
# ## A rate has a first token
#
# This model's tokenizer puts nothing in front of a text. Others prepend a BOS token. sinkscope
# writes the policy into every report, and lets you choose it:

# %%
by_bos = {}
for policy in ("never", "always", "random"):
    prompts = ss.texts("prose", prompts=4, length=64, bos=policy)
    by_bos[policy] = ss.scan(model, prompts, metrics=["sink_attention"])
    print(f"BOS {by_bos[policy].settings.bos:24} rate {by_bos[policy].sink_rate_at(0.3):.0%}")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# spread = [one.sink_rate_at(0.3) for one in by_bos.values()]
# assert max(spread) - min(spread) < 0.15
# ```
#
# </details>

# %% [markdown]
# For SmolLM2 it makes little difference, as expected from lesson 1: only being first matters. This
# does not generalise: Gemma-7B without its BOS token falls from 81 % to 27 % on HellaSwag (Barbero
# et al., their Table 3). Whether your tokenizer prepends a token can decide what you find.
#
# ## How certain is it?
#
# Every quantity that can be stored per prompt has a `prompt` dimension, and its mean has a
# bootstrap interval over prompts. Hover over the head map above, or compute it:

# %%
interval = report.interval("sink_attention")
width = interval.high - interval.low
print(f"median width of a head's 95 % interval: {width.median():.3f}, widest {width.max():.3f}")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert width.median() < 0.1 < width.max()
# ```
#
# </details>

# %% [markdown]
# With 8 prompts the values of most heads are known to a few hundredths, while some differ far more
# from prompt to prompt. These may be dormant on one text and active on another: lesson 5.
#
# An interval over prompts says *nothing* about another kind of text, another length, or another
# model.
#
# ## A sink may be anywhere
#
# So far the scan was told the position of the sink: 0. With `sinks="auto"` a first pass searches
# for keys that many heads attend to, at any position. The one with the most heads is the *primary*
# sink, to which the scan refers; further ones are listed separately, by layer. Back to the story of
# lesson 1:

# %%
story = (
    "The sun had set behind the hills, and the two travellers still had a long way to go. The "
    "older one stopped, looked back at the road and said that they should find a place to sleep "
    "before it grew dark."
)
found = ss.scan(model, [story], sinks="auto")
primary = found.sink_mask[0].nonzero()[:, 0].tolist()
secondary = found.secondary_sinks[0].any(dim=0).nonzero()[:, 0].tolist()
print("primary:", [(position, found.token_text[0][position]) for position in primary])
for position in secondary:
    layers = found.secondary_sinks[0, :, position].nonzero()[:, 0].tolist()
    print(f"secondary: {position}, {found.token_text[0][position]!r}, in layers {layers}")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert primary == [0] and secondary == [5] and found.token_text[0][5] == " the"
# ```
#
# </details>

# %% [markdown]
# There is a second sink, at position 5, on the token " the". In which layers do heads attend to it?

# %%
ss.plot.position_map(found)

# %% [markdown]
# The column of position 5 is bright from layer 3 to about layer 9, and not afterwards. (That of
# position 28, another " the", is similar but fainter, below the threshold.)
#
# Why there, and why those layers? Compare its residual state with the sink's, layer by layer:

# %%
alone = ss.scan(model, [story], metrics=["cosine", "residual", "received"])
cosine, norm = alone.cosine_to_sink, alone.residual_norm
for layer in (0, 2, 5, 8, 11, 15):
    print(
        f"layer {layer:2}: cosine {cosine[layer, 5]:.2f}, norm {norm[layer, 5]:6.0f} "
        f"(position 0: {norm[layer, 0]:6.0f}, an ordinary one: {norm[layer].median():4.0f})"
    )

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert cosine[3:9, 5].min() > 0.98 and norm[5, 5] > 4 * norm[5].median()
# assert cosine[15, 5] < 0.6 and norm[15, 5] < 2 * norm[15].median()
# assert alone.received_attention[3:9, :, 5].mean() > 5 * alone.received_attention[12:, :, 5].mean()
# ```
#
# </details>

# %% [markdown]
# From layer 2 to layer 8 the state of this " the" has the direction of the sink's (cosine 0.99),
# and is also disproportionately large. While its state is similar to the sink's, it receives
# attention like the sink. After layer 9 neither holds. Such tokens are called secondary sinks
# (arXiv 2512.22213 asks for a cosine above 0.9). A sink is thus defined by its *state*, not by its
# position.
#
# For work downstream (training an SAE, a probe, a quantiser) you may want to leave such tokens out:

# %%
mask = report.token_mask()  # [prompt, position], True = sink or outlier
marked = [(p, i, report.token_text[p][i]) for p, i in mask.nonzero().tolist()]
print(f"{len(marked)} of {mask.numel():,} tokens:", marked)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert mask[:, 0].all() and mask.sum() < 0.05 * mask.numel()
# ```
#
# </details>

# %% [markdown]
# ## Another kind of model
#
# MiniLM is a BERT: bidirectional, with learned position embeddings, and `[CLS]` … `[SEP]` around
# each text. Here every query sees all positions, and every position sees position 0.
#
# > **Predict.** Does a bidirectional model have a sink? On `[CLS]`, on `[SEP]`, on a full stop?

# %%
guess = ""  # which token?

# %% tags=["reveal"]
minilm = ss.load_model("minilm-l6")
bidirectional = ss.scan(minilm, texts, sinks="auto")
ss.plot.head_map(bidirectional)

# %% tags=["reveal"]
found_at = bidirectional.sink_mask.float().mean(0)  # share of prompts
by_layer = bidirectional.sink_attention.mean((0, 2))
print("sink positions:", found_at.nonzero()[:, 0].tolist())
print("sink attention by layer:", [round(x, 2) for x in by_layer.tolist()])

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert found_at[0] == 1 and found_at[1:].sum() == 0, "[CLS], and nothing else"
# assert by_layer[0] < 0.1 < 0.25 < by_layer[1:4].min()
# ```
#
# </details>

# %% [markdown]
# It has one, `[CLS]`, and again not in the first layer. (Other BERTs choose `[SEP]`: Xiao et
# al., arXiv 2309.17453, appendix H.) The cause must be a different one: `[CLS]` does not attend
# only to itself, since here every position sees every other. Lesson 4 investigates it.

# %% [markdown]
# ## Models that could do without
#
# A head that should add nothing still has to attend somewhere, since a softmax row sums to one. Two
# designs offer an alternative.
#
# * A **gate** on the head's output (Qwen3-Next, Qwen3.5, AFMoE; Qiu et al., arXiv 2505.06708): the
# query computes a factor for each channel, and $g_i \odot \sum_j A_{ij} v_j$ goes on to $W_O$. With
#   a closed gate the head adds nothing, wherever it attends.
# * A **learned sink** (gpt-oss): one more logit in every row, which belongs to no token. Its
#   attention mass is discarded, so that a row sums to less than one.
#
# sinkscope comes with three toy models that differ in this alone: one layer, one head, 450 steps on
# the same task (lesson 6 explains it: on triggers, 29 % of the queries, the head must attend to the
# previous position; on all others it is not needed).
#
# > **Predict.** Which of the two keeps the head from attending to BOS?

# %%
guess = ""  # the gate, the learned sink, both, neither?

# %% tags=["reveal"]
names = {"plain": "bb-1l", "gated": "bb-1l-gated", "learned sink": "bb-1l-learned-sink"}
toys = {kind: ss.load_model(name) for kind, name in names.items()}
game = bb.task_texts(prompts=16, length=64)
three = {kind: ss.scan(toy, game) for kind, toy in toys.items()}
fields = ("sink_attention", "gate_mean", "gated_sink_attention", "learned_sink_mass", "value_drain")
for kind, one in three.items():
    seen = {name: one.mean(name).item() for name in fields if getattr(one, name) is not None}
    print(f"{kind:13}", {name: round(value, 2) for name, value in seen.items()})
plain, gated, learned = three.values()
print("Your guess:", guess or "none")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert plain.sink_attention.mean() > 0.6 and plain.value_drain.mean() < 0.3
# assert gated.sink_attention.mean() < 0.4 and gated.gated_sink_attention.mean() < 0.1
# assert gated.value_drain.mean() > 0.7, "a closed gate needs no drained value"
# assert learned.sink_attention.mean() > 0.6 and learned.learned_sink_mass.mean() < 0.05
# ```
#
# </details>

# %% [markdown]
# The gate does, for the most part. Half of the attention to BOS is left, but
# `gated_sink_attention`, each query's attention times its mean factor, shows that little of it
# passes; and the value of BOS is not drained. When does the gate close?

# %%
with torch.inference_mode():
    _, cache = toys["gated"].run_with_cache(game.tokens)
gate = cache["blocks.0.attn.hook_gate"].reshape(*game.tokens.shape, -1).mean(-1)
at_trigger = bb.packaged_task().is_trigger[game.tokens]
open_there, open_elsewhere = gate[at_trigger].mean().item(), gate[~at_trigger].mean().item()
print(f"mean factor: {open_there:.2f} at triggers, {open_elsewhere:.2f} elsewhere")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert open_there > 0.8 and open_elsewhere < 0.25
# ```
#
# </details>

# %% [markdown]
# It closes exactly where the head is not needed, and so takes over the function of the sink.
#
# The learned sink could do the same, but here it takes only hundredths of the attention, and BOS
# the rest. That an architecture allows an alternative does not mean that training uses it. One
# layer and one seed are not much evidence: in three layers (the table in `sinkscope/bb/README.md`)
# the learned sink is unused in all six runs, but gated models keep more of their sinks than this
# one, and their residual peaks. So do not infer sinks from the architecture: measure
# `learned_sink_mass`, or `gate_mean` and `gated_sink_attention`, beside `sink_attention`.

# %% [markdown]
# ## Save it
#
# A report is fully labelled: tidy frames for pandas, an xarray Dataset, and one file.

# %%
report.to_frame("sink_attention", "honor").head()

# %%
with tempfile.TemporaryDirectory() as folder:
    file = report.save(Path(folder) / "prose.nc")
    again = ss.load_report(file)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert torch.equal(again.sink_attention, report.sink_attention.cpu())
# assert again.settings == report.settings
# ```
#
# </details>

# %% [markdown]
# ## A metric of your own
#
# You can add metrics. A class that names a metric registers it: it states which signal it reads and
# declares its field, and `observe` reduces that signal inside the hook, one layer at a time. Here:
# the kurtosis of the value states (a normal distribution has 3). `batch.mask` is false at padding,
# of which there is none here.


# %%
class ValueKurtosis(ss.Observer, metric="value_kurtosis", reads="value"):
    fields = {
        "value_kurtosis": ss.measured(
            "prompt layer kv_head", unit="1", about="kurtosis of the value states over positions"
        )
    }

    def observe(self, x, batch):  # x: [prompt position kv_head d_head] of one layer
        x, real = x.float(), batch.mask[:, :, None, None]
        count = batch.mask.sum(dim=1)[:, None] * x.shape[-1]
        mean = (x * real).sum(dim=(1, 3)) / count
        apart = (x - mean[:, None, :, None]) * real
        variance = apart.square().sum(dim=(1, 3)) / count
        return {"value_kurtosis": (apart**4).sum(dim=(1, 3)) / count / variance**2}


tails = ss.scan(model, texts, metrics=["sink_attention", "value_kurtosis"], progress=False)
tails.interval("value_kurtosis").mean.max()

# %% [markdown]
# From here on it is a field like any other: in frames and files, in `compare` and `merge`, on the
# report's page, and in figures.

# %%
ss.plot.head_map(tails, "value_kurtosis")

# %% [markdown]
# ## Summary
#
# * A sink rate depends on the model *and* on threshold, length, first token and kind of text. State
#   all of them.
# * Across lengths, the rate alone is misleading. Consider `uniform_ratio` too.
# * A sink is characterised by its state. Tokens that have that state in some layers are sinks in
#   those layers.
# * Sinks do not require a causal mask: MiniLM has one at `[CLS]`.
# * Behind a gate, attention to a sink is not what the head adds: look at `gated_sink_attention`.
#
# ## Exercises
#
# Put an expression, or a number with four significant digits, in the place of `None` and run the
# cell.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
ANSWERS = {  # exercise: (answer, hint)
    1: (
        report.sink_rate_at(0.5),
        "Compare first, average afterwards: (report.sink_importance > 0.5).",
    ),
    2: (
        max(range(30), key=lambda layer: report.mean("sink_attention")[layer].mean().item()),
        "Average report.sink_attention over prompts and heads, then look for the largest.",
    ),
    3: (
        report.to_frame("sink_attention")
        .query("layer == 22 and head == 2")["sink_attention [probability]"]
        .min(),
        "report.sink_attention is [prompt, layer, head]; take its smallest value over prompts.",
    ),
    4: (10, "Query i (from 0) gives key 0 the weight 1 / (i + 1); average over all T queries."),
    5: (
        (report.sink_importance[0] > 0.3).float().mean().item(),
        "All T queries see key 0, itself included; average over them first, then compare.",
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
# **1.** Compute the sink rate at $\varepsilon = 0.5$ yourself from `report.sink_importance`
# (prompt, layer, head).

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# answer_1 = (report.sink_importance > 0.5).float().mean().item()
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** Which layer of SmolLM2 pays the sink the most attention, on average over its heads?

# %%
answer_2 = None

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# answer_2 = report.sink_attention.mean((0, 2)).argmax().item()
#
# check(2, answer_2)
# ```
#
# </details>

# %% [markdown]
# **3.** Head 18.8 pays the sink almost all of its attention on every prompt. Head 22.2 varies: how
# low does its sink attention get on any of the eight prompts?

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# answer_3 = report.sink_attention[:, 22, 2].min().item()
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** A head with uniform attention is not a sink head. How many tokens must a text have
# at least, so that such a head's importance score of key 0 (all $T$ queries counted) does not
# exceed 0.3?

# %%
answer_4 = None

check(4, answer_4)


# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# answer_4 = next(
#     length for length in range(1, 100) if sum(1 / i for i in range(1, length + 1)) / length <= 0.3
# )
#
# check(4, answer_4)
# ```
#
# </details>

# %% [markdown]
# **5.** (harder) Write Gu's importance score and the sink rate from patterns: the share of all
# (layer, head) in which position 0 receives more than 0.3, on the first prompt of `texts`.


# %%
def my_sink_rate(patterns, epsilon):
    """Share of heads whose importance of key 0 exceeds ε; patterns [layer head query key]."""
    raise NotImplementedError


answer_5 = None  # my_sink_rate(..., 0.3)


check(5, answer_5)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 5</summary>
#
# ```python
# def my_sink_rate(patterns, epsilon):
#     importance = patterns[..., 0].mean(-1)  # every query sees key 0
#     return (importance > epsilon).float().mean().item()
#
#
# _, cached = model.run_with_cache(report.tokens[:1], names_filter=lambda n: "hook_pattern" in n)
# layers = range(model.cfg.n_layers)
# answer_5 = my_sink_rate(torch.stack([cached["pattern", layer][0] for layer in layers]), 0.3)
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
# assert not is_right(1, (report.sink_importance.mean(0) > 0.5).float().mean()), "compare first"
# assert not is_right(3, report.sink_attention[:, 22, 2].mean()), "the lowest, not the mean"
# by_all_but_0 = (report.sink_attention[0] > 0.3).float().mean()
# assert not is_right(5, by_all_but_0), "query 0 sees key 0 too"
# assert not is_right(5, report.sink_attention[0].mean()), "compare after the average"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. Two papers report 46 % and 65 % for two models. What do you need to know to compare them?
# 2. Prompts are the unit of the bootstrap. Why not tokens, or heads?
# 3. When would you specify the sink's position, and when search for it?
#
# ## Read on
#
# * Xiangming Gu, Tianyu Pang, Chao Du and others (2024), *When Attention Sink Emerges in Language
#   Models: An Empirical View*, arXiv 2410.10781
# * Federico Barbero, Álvaro Arroyo, Xiangming Gu and others (2025), *Why do LLMs attend to the first
#   token?*, arXiv 2504.02732
# * Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han and Mike Lewis (2023), *Efficient Streaming
#   Language Models with Attention Sinks*, arXiv 2309.17453

# %% [markdown]
# Next: [3 · Drains, peaks and non-mixture dimensions](03_drains_peaks_and_dimensions.ipynb).

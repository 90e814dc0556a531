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
# You have a model, and want to know: does it have attention sinks, in which heads, on which tokens,
# and how sure is that? One call answers. The art is in reading the answer, because the most quoted
# figure in this field, the *sink rate*, can be moved up and down at will by anybody who chooses the
# threshold, the length of the text, and the first token. This lesson does so on purpose.
#
# **Goals.** After this lesson you can
#
# * scan a model and read the result,
# * say what moves a sink rate, and what has to stand beside one,
# * put an interval on it, and find sinks that are not at position 0.
#
# **Before.** [Lesson 1](01_what_is_an_attention_sink.ipynb).
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
# * **Text** says what was measured: source, number of prompts, $T$ and the BOS policy. A figure
#   without this line means nothing, as you will see.
# * **Sinks** gives the mean attention to the sink with an interval, and beside it what uniform
#   attention would have given.
# * **Value drain, Residual peak, Massive dims, Non-mixture dims** are the traces that a sink leaves
#   inside the model. Lesson 3 is about them.
# * **Strongest sink heads**: two heads of layer 18 give the first token practically *everything*.
#   Remember 18.7 and 18.8. Do they do anything at all? Lesson 5 wakes one of them up.
#
# The same as a map, with a threshold to slide:

# %%
ss.plot.head_map(report)

# %% [markdown]
# In a live notebook there is more: click a head on the map, and everything about it follows. Type a
# prompt of your own and measure it. Put an intervention beside it (lesson 4 is about those).

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
# > 0.8?

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
# The same heads, the same text: anything from 85 % to 4 %. There is no right threshold, so show
# the curve, or at least say your $\varepsilon$. A report keeps the scores themselves, which is why
# `sink_rate_at` is exact at every threshold without measuring again.
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
# uniform attention would give it at 16 tokens, about fifteen times at 256. Both are true. A long
# text has more keys to share the attention among, so every single key gets less, the sink too; but
# an even spread would shrink much faster. Two habits follow: compare rates only at equal $T$ (the
# papers: 64), and look at `uniform_ratio` beside them. At $T = 9$, uniform attention alone already
# passes $\varepsilon = 0.3$: exercise 4.
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
# SmolLM2 hardly cares, as lesson 1 led us to expect: being first is what counts. Do not generalise.
# Gemma-7B without its BOS token falls from 81 % to 27 % on HellaSwag (Barbero et al., their Table
# 3). Whether your tokenizer prepends a token can decide what you find.
#
# ## How sure is it?
#
# Every figure that is cheap to keep per prompt has a `prompt` dimension, and its mean has a
# bootstrap interval over prompts. Hover over the head map above, or ask:

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
# With 8 prompts most heads are known to a few hundredths, while some differ from prompt to prompt
# by far more. Those are interesting: they sleep on one text and work on another. Lesson 5.
#
# What an interval over prompts does *not* tell you is what happens on another kind of text, at
# another length, or in another model. It knows only the prompts it saw.
#
# ## A sink may be anywhere
#
# So far we told the scan which position to ask about: 0. With `sinks="auto"` a first pass looks for
# keys that many heads attend to, wherever they are. The one of the most heads is the *primary* sink, and
# the scan is about it; further ones are kept apart, by layer. Back to the story of lesson 1:

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
# A second sink, at position 5, and the token is " the"! Where do heads look at it?

# %%
ss.plot.position_map(found)

# %% [markdown]
# Follow the column of position 5 down the layers: it is bright from layer 3 to about layer 9, and
# gone afterwards. (So is that of position 28, another " the", more faintly: under the threshold.)
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
# From layer 2 to layer 8 the state of this " the" points where the sink's points (cosine 0.99), and
# is as disproportionately large. As long as it *looks* like the sink, it is treated like the sink.
# After layer 9 the likeness is gone, and so is the attention. Such tokens are called secondary
# sinks (arXiv 2512.22213 asks for a cosine above 0.9). A sink is a *state*, not a place.
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
# each text. No query is blind to the right here, and position 0 is seen by everybody, everywhere.
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
# It has one, `[CLS]`, and once more not in the first layer. (Other BERTs choose `[SEP]`: Xiao et
# al., arXiv 2309.17453, appendix H.) What makes `[CLS]` the sink is another matter. It is not that
# it sees only itself; here every position sees every other. Lesson 4 takes it apart.

# %% [markdown]
# ## Models that could do without
#
# A head that has nothing to add still has to spend its attention: a softmax row sums to one. Two
# designs give it another way out.
#
# * A **gate** on the head's output (Qwen3-Next, Qwen3.5, AFMoE; Qiu et al., arXiv 2505.06708): the
#   query computes a factor for each channel, and $g_i \odot \sum_j A_{ij} v_j$ goes on to $W_O$. A
#   closed gate adds nothing, wherever the head looks.
# * A **learned sink** (gpt-oss): one more logit in every row, which belongs to no token. What it
#   takes is lost, so that a row sums to less than one.
#
# sinkscope comes with three toy models that differ in this alone: one layer, one head, 450 steps on
# the same task (lesson 6 explains it: on triggers, 29 % of the queries, the head must look back one
# place; on all others it is not needed).
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
# `gated_sink_attention`, each query's attention times its mean factor, says that little of it
# passes; and BOS keeps its value. When does the gate close?

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
# It closes just where the head is not needed, which is what the sink was for.
#
# The learned sink could do the same, and here it does not: it takes hundredths of the attention,
# and BOS the rest. That a model has room for another way does not mean that training takes it. One
# layer and one seed are not much, either: in three layers (the table in `sinkscope/bb/README.md`)
# the learned sink is left alone in all six runs, but gated models keep more of their sinks than
# this one, and their residual peaks. So do not conclude from an architecture: measure
# `learned_sink_mass`, or `gate_mean` and `gated_sink_attention`, beside `sink_attention`.

# %% [markdown]
# ## Keep it
#
# A report is labelled all through: tidy frames for pandas, an xarray for everything, one file.

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
# The list of metrics is open. A class that names a metric registers it: it says which signal it
# reads, declares its field, and `observe` reduces that signal inside the hook, one layer at a time.
# Here: the kurtosis of the value states (a normal distribution has 3). Padding, were there any, would
# be where `batch.mask` is false.


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
# ## What to take with you
#
# * A sink rate belongs to a model *and* a threshold, a length, a first token and a kind of text.
#   Say all of them.
# * Across lengths, the raw rate alone misleads. Look at `uniform_ratio`, too.
# * A sink is recognised by its state. Tokens that share that state for some layers are sinks for
#   those layers.
# * Sinks are not a matter of causal masks alone: MiniLM parks on `[CLS]`.
# * Behind a gate, attention to a sink is not what the head adds: look at `gated_sink_attention`.
#
# ## Exercises

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
        .query("layer == 18 and head == 8")["sink_attention [probability]"]
        .min(),
        "report.sink_attention is [prompt, layer, head].",
    ),
    4: (10, "Query i (from 0) gives key 0 the weight 1 / (i + 1); average over all T queries."),
    5: (
        (report.sink_importance[0] > 0.3).float().mean().item(),
        "All T queries see key 0, itself included; average over them first, then compare.",
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
# **3.** How low does the sink attention of head 18.8 get on any of the eight prompts?

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# answer_3 = report.sink_attention[:, 18, 8].min().item()  # it never moves
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** A head that spreads its attention evenly is no sink head. How many tokens must a text have
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
# assert solved == set(ANSWERS)
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. Two papers report 46 % and 65 % for two models. What do you need to know to compare them?
# 2. Prompts are the unit of the bootstrap. Why not tokens, or heads?
# 3. When would you name the sink's position, and when have it looked for?
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

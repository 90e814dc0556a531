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
# # 1 · What is an attention sink?
#
# In almost any trained transformer, the attention patterns of many heads look alike. This lesson
# shows what they have in common on a real model, measures it, and tests what it depends on.
#
# *Each lesson asks you to predict a result before you see it. Write your guess into the cell below
# the question, then run the next one: where the guess is a number, it is drawn beside the result.
# A wrong guess teaches more than a result that you only read.*
#
# **Goals.** After this lesson you can
#
# * say what an attention sink is, and measure one from attention patterns,
# * distinguish it from uniform attention,
# * test whether it depends on the token, the position, or the text.
#
# **Prerequisites.** What a softmax and an attention head are. No GPU and no network.
#
# **Time.** About 60 minutes in class, with the predictions and two exercises.

# %%
import torch
from einops import repeat

import sinkscope as ss

model = ss.load_model("smollm2-135m")  # a real model, from a Python package

# %% [markdown]
# ## Attention has to go somewhere
#
# A head at position $i$ gives every position $j \le i$ that it may see a score $s_{ij}$, and turns
# the scores into weights with a softmax:
#
# $$A_{ij} = \frac{e^{s_{ij}}}{\sum_{k \le i} e^{s_{ik}}}, \qquad \sum_{j \le i} A_{ij} = 1,
# \qquad o_i = \sum_{j \le i} A_{ij}\, v_j .$$
#
# The weights sum to one. **A head cannot attend to nothing.** A head that looks for, say, the
# subject of a verb has nothing to find at most positions, but its weights sum to one there too.
#
# Here is a text, and the attention patterns of all heads on it, read through plain TransformerLens.

# %%
story = (
    "The sun had set behind the hills, and the two travellers still had a long way to go. The "
    "older one stopped, looked back at the road and said that they should find a place to sleep "
    "before it grew dark."
)
texts = ss.texts([story]).tokenize(model)
words = texts.strings[0]

_, cache = model.run_with_cache(texts.tokens, names_filter=lambda name: "hook_pattern" in name)
n_layers, n_heads = model.cfg.n_layers, model.cfg.n_heads
patterns = torch.stack([cache["pattern", layer][0] for layer in range(n_layers)])

print(f"{n_layers} layers × {n_heads} heads, {len(words)} tokens: {words[:7]} …")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert len(words) == 45
# assert torch.allclose(patterns.sum(-1), torch.ones(()), atol=1e-5), "every row sums to one"
# ```
#
# </details>

# %% [markdown]
# > **Predict.** Take a head from the middle of the model, layer 18, head 7. Which tokens will the
# > words of this story attend to? Their neighbours, the nouns, the full stops?

# %%
guess = ""  # which tokens?

# %% tags=["reveal"]
about = "smollm2-135m · a story of 45 tokens · no BOS token"
ss.plot.attention_pattern(patterns[18, 7], words, about=about, title="Layer 18, head 7")

# %% tags=["reveal"]
print("Your guess:", guess or "none")

# %% [markdown]
# There is one bright column: every token attends to "The", the first token of the text, and to
# almost nothing else. Hover over the cells for the values.
#
# Not every head does that. Layer 16, head 0 attends to the previous token:

# %%
ss.plot.attention_pattern(patterns[16, 0], words, about=about, title="Layer 16, head 0")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# previous = patterns.diagonal(offset=-1, dim1=-2, dim2=-1)  # A[i, i - 1]
# assert patterns[18, 7, 1:, 0].min() > 0.9, "layer 18, head 7 attends to the sink at every query"
# assert previous[16, 0].mean() > 0.5, "layer 16, head 0 reads the previous token"
# ```
#
# </details>

# %% [markdown]
# ## Measure it
#
# Average the column of position 0 over all queries that come after it. (Query 0 sees only itself,
# so its weight there is always 1; it is left out.) This is sinkscope's `sink_attention`:
#
# $$\bar A^{\,\text{sink}} = \frac{1}{T-1} \sum_{i=1}^{T-1} A_{i0} .$$
#
# What should it be compared with? A head with uniform attention gives each of the $i + 1$ positions
# that query $i$ sees the weight $1/(i+1)$. That is not a sink, but it is not 0 either.
#
# > **Predict.** The text has 45 tokens. Averaged over *all* heads of the model, how much of their
# > attention, 0 to 1, goes to the first token? And how much would uniform attention give it?

# %%
guess = {"all heads": None, "uniform attention": None}  # numbers in the place of None

# %% tags=["reveal"]
by_hand = patterns[:, :, 1:, 0].mean(-1)  # [layer, head]
uniform = (1 / torch.arange(2, len(words) + 1)).mean()
print(f"all heads: {by_hand.mean():.3f}   uniform: {uniform:.3f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"all heads": by_hand.mean(), "uniform attention": uniform},
    "attention to the first token [probability]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert 0.4 < by_hand.mean() < 0.5, "almost half"
# assert round((by_hand.mean() / uniform).item()) == 6
# ```
#
# </details>

# %% [markdown]
# Almost half of all the attention in this model goes to one token of 45, about six times as much as
# under uniform attention. `ss.scan` measures this, and much else, without ever storing a pattern.
# It agrees with the values computed by hand, head by head:

# %%
report = ss.scan(model, texts)

torch.testing.assert_close(report.sink_attention[0], by_hand, atol=1e-5, rtol=0)
ss.plot.head_map(report)

# %% [markdown]
# Each cell is a head. Move the slider: it greys out the heads below a threshold, and the title
# counts the rest. At 0.3, the threshold of Gu et al. (arXiv 2410.10781), about three heads in four
# are **sink heads**. Two regions are free of them: the first layers, and a few layers around 11.
# Both matter: lesson 3 shows that the sink is *written* there.

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# sink_heads = (by_hand > 0.3).float()
# assert 0.65 < sink_heads.mean() < 0.85
# assert sink_heads[[0, 1, 10, 11]].mean() < 0.1 < 0.9 < sink_heads[[18, 23, 24]].mean()
# ```
#
# </details>

# %% [markdown]
# ## Seen from the tokens
#
# So far we looked at where each head attends. Conversely, how much attention does each *token*
# receive from all heads? Key $k$ is seen by the queries $i \ge k$ only, so we average over those:
#
# $$\alpha_k = \frac{1}{T-k} \sum_{i=k}^{T-1} A_{ik} .$$
#
# Gu et al. call this the importance score of a key. (The self-weight $A_{kk}$ is in it, which is
# why it is a little larger than `sink_attention`, and why it is too high for the last few tokens,
# which few other queries see.)

# %%
ss.plot.token_strip(report, log=False)

# %%
received = report.received_peak[0]  # mean over layers and heads [position]
top = received.topk(3).indices.tolist()
print([(position, words[position], round(received[position].item(), 2)) for position in top])

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert top[0] == 0 and received[0] > 4 * received[1:].max()
# ```
#
# </details>

# %% [markdown]
# The first token stands out: it receives more than four times as much as any other. It is the word
# "The".
#
# ## Is it the word?
#
# Perhaps "The" is a useful word. Three experiments test this.
#
# > **Predict.** How much attention, 0 to 1, will the first token receive in each? (In the story
# > itself it is 0.47.)
# >
# > 1. Put some random word in the place of "The".
# > 2. Cut the first six tokens away, so that the text begins with " hills, and the two".
# > 3. Put the model's own special token, `<|im_start|>`, in front.

# %%
guess = {
    "another first word": None,
    "six tokens cut": None,
    "special token in front": None,
}  # numbers in the place of None

# %% tags=["reveal"]
swap_start = ss.interventions.ReplaceStart(model, "random")
conditions = {
    "the story": texts,
    "another first word": swap_start(texts),
    "six tokens cut": ss.token_ids(texts.tokens[:, 6:]),
    "special token in front": ss.texts([story], bos="always"),
}
sink = {
    name: ss.scan(model, condition, metrics=["sink_attention"]).sink_attention.mean().item()
    for name, condition in conditions.items()
}
for name, attention in sink.items():
    print(f"{name:24} {attention:.2f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    sink,
    "attention to the first token [probability]",
    about=about,
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert all(attention > 0.3 for attention in sink.values())
# assert words[6] == " hills" and received[6] < 0.03, "where it stood before, it received little"
# ```
#
# </details>

# %% [markdown]
# It is not the word. Any first token becomes the sink: another word, a special token, or a word
# that received almost nothing in the middle of the text. In this model the sink depends on being
# *first*, not on meaning. (Models whose training texts always began with the same BOS token can
# come to depend on that token: Barbero et al., arXiv 2504.02732.)
#
# ## Does it need a text at all?
#
# > **Predict.** How much attention, 0 to 1, will the first token receive if all tokens are drawn at
# > random from the vocabulary? And if one token is repeated 45 times?

# %%
guess = {"random tokens": None, "one token repeated": None}  # numbers in the place of None

# %% tags=["reveal"]
length = len(words)
nonsense = ss.random_tokens(prompts=2, length=length)
echo = ss.repeated_tokens(" the", prompts=1, length=length)
for name, condition in {"random tokens": nonsense, "one token repeated": echo}.items():
    sink[name] = ss.scan(model, condition, metrics=["sink_attention"]).sink_attention.mean().item()
    print(f"{name:24} {sink[name]:.2f}")
print(f"{'uniform attention':24} {uniform:.2f}")

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    sink,
    "attention to the first token [probability]",
    about="smollm2-135m · 45 tokens that are no text · no BOS token",
)

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert sink["random tokens"] > 0.3, "nonsense has a sink too"
# assert abs(sink["one token repeated"] - uniform) < 0.05, "repetition has none"
# ```
#
# </details>

# %% [markdown]
# Random tokens have a sink: the text does not matter. But repetition has **none**, for a reason
# that can be proved (Gu et al., arXiv 2410.10781). In this model position enters only through
# rotations of queries and keys (RoPE), which act on attention *scores*. If all tokens are equal,
# all values are equal, and then every average of them is the same, whatever the weights. So all
# positions hold the same state after the first block, and after the second, and so on: nothing
# distinguishes the first position.
#
# In short: **position 0 becomes a sink because it is the only token that averages nothing.** It
# sees only itself. If its value equals the average of all others, it is no longer distinguished.
# Lesson 4 turns this into a way to *move* a sink.
#
# ## Why does it do no harm?
#
# If half of the attention goes to "The", half of the heads' output should be "The". Look at the
# output again: $o_i = \sum_j A_{ij} v_j$. A weight matters only as much as the value behind it.
#
# > **Predict.** How large is the value of the first token, compared with the others? Answer as a
# > ratio: 1 means equal.

# %%
guess = {"layer 18, KV head 2": None}  # numbers in the place of None

# %% tags=["reveal"]
ss.plot.by_position(report, "value_norm", layer=18, head=2)

# %% tags=["reveal"]
ss.plot.guess_and_result(
    guess,
    {"layer 18, KV head 2": report.value_drain[0, 18, 2]},
    "value norm of the sink over the others' [ratio]",
    about=about,
)

# %% [markdown]
# It is tiny. (One bar for each value vector of layer 18, key/value head 2, which heads 6, 7 and 8
# share.) The sink takes attention and contributes almost nothing, which is the closest that a
# softmax can come to attending to nothing. Yan et al. (arXiv 2407.01601) call such tokens *waiver
# elements*; Guo et al. (arXiv 2410.13835) speak of *value-state drains*.
#
# Multiply each attention weight by its value's norm, and compute the sink's share again:
#
# $$\frac{A_{i0}\,\lVert v_0\rVert}{\sum_j A_{ij}\,\lVert v_j\rVert} .$$

# %%
attention = report.sink_attention[0].mean().item()
share = report.value_weighted_sink_share[0].mean().item()
ratio = report.value_drain[0].median().item()
print(f"attention to the sink {attention:.2f}, its share of what is written {share:.2f}")
print(f"its value is {ratio:.2f} × the others' (median over layers and KV heads)")

# %% [markdown] tags=["checks"]
# <details><summary>What the tests check here</summary>
#
# ```python
# assert ratio < 0.4 and share < 0.8 * attention
# ```
#
# </details>

# %% [markdown]
# The sink's share of the output is smaller than its share of the attention, but still almost a
# third. This third carries no information: lesson 3 shows that the first token's state, and with it
# its value, is nearly the same vector for every text. A head reads a small constant from the sink,
# which later layers can compensate for.
#
# ## Summary
#
# * A softmax row sums to one, so a head that is not needed must still attend to some token.
# * On this short story about three heads in four of SmolLM2 give a large part of their attention to
#   the first token; over 256 tokens, about half. It depends on position, not on meaning: random
#   tokens have a sink too.
# * One token repeated leaves no sink: the first position is special only because it averages
#   nothing.
# * This does little harm since the sink's value is small. High attention does not imply high
#   importance.
#
# ## Exercises
#
# Put your answer in the place of `None` and run the cell: the expression that computes it, or a
# number with four significant digits. The cell below contains the correct answers (open it only
# afterwards). Where solutions are included, each is folded below its exercise.

# %% jupyter={"source_hidden": true} cellView="form"
# @title How answers are checked { display-mode: "form" }
ANSWERS = {  # exercise: (answer, hint)
    1: (
        patterns[16, 0].tril(-1)[1:, 0].sum().item() / (len(words) - 1),
        "Column 0 of patterns[16, 0], without its first row.",
    ),
    2: (
        sum(1 / (i + 1) for i in range(1, 1024)) / 1023,
        "Query i sees i + 1 keys; average 1 / (i + 1) over the queries 1 … T - 1.",
    ),
    3: (
        ss.scan(model, texts, metrics=["received"]).received_attention[11, 6].argmax().item(),
        "report.received_attention is [layer, head, position].",
    ),
    4: (
        "the first",
        "Scan the doubled story, and compare the scan's received_peak at 0 and at 45.",
    ),
    5: (
        ss.scan(model, [story, "It was late, and cold."], metrics=["sink_attention"])
        .sink_attention[1, 16, 0]
        .item(),
        "Padded queries must not count, neither above nor below the line.",
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
# **1.** Layer 16, head 0 attends to the previous token. What is its mean attention to the *first*
# token of the story? Compute it from `patterns`, without `report`, by the formula of
# `sink_attention`.

# %%
answer_1 = None

check(1, answer_1)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 1</summary>
#
# ```python
# answer_1 = patterns[16, 0, 1:, 0].mean().item()
#
# check(1, answer_1)
# ```
#
# </details>

# %% [markdown]
# **2.** Sink rates in papers are measured at 64 tokens, while deployed models process thousands.
# What would *uniform* attention give the first token of 1,024 tokens, by the formula of
# `sink_attention`? (Then: is "0.1 of the attention goes to the first token" a sink at T = 9? At T =
# 1,024?)

# %%
answer_2 = None

check(2, answer_2)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 2</summary>
#
# ```python
# answer_2 = (1 / torch.arange(2, 1025)).mean().item()  # about ln(T) / T
#
# check(2, answer_2)
# ```
#
# </details>

# %% [markdown]
# **3.** Layer 11, head 6 is in the quarter of heads without a sink. Which *position* of the story
# receives the most attention from it?

# %%
answer_3 = None

check(3, answer_3)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 3</summary>
#
# ```python
# mass = patterns[11, 6].sum(0)  # what each key receives in all
# seen_by = torch.arange(len(words), 0, -1)  # how many queries see it
# answer_3 = (mass / seen_by).argmax().item()
#
# check(3, answer_3)
# ```
#
# </details>

# %% [markdown]
# **4.** Lay the story twice end to end. The second copy begins with the same word "The", at
# position 45. Which of the two becomes a sink: `"the first"`, `"the second"`, or `"both"`? Predict,
# then measure: `ss.token_ids(repeat(texts.tokens, "prompt t -> prompt (copy t)", copy=2))`.

# %%
answer_4 = None

check(4, answer_4)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 4</summary>
#
# ```python
# twice = ss.scan(model, ss.token_ids(repeat(texts.tokens, "prompt t -> prompt (copy t)", copy=2)))
# first, second = twice.received_peak[0, [0, 45]].tolist()
# print(f"position 0 receives {first:.2f}, position 45 receives {second:.2f}")
# answer_4 = "the first" if first > 10 * second else "the second" if second > 10 * first else "both"
#
# check(4, answer_4)
# ```
#
# </details>

# %% [markdown]
# **5.** (harder) Write `sink_attention` itself: a function of attention patterns
# `[prompt head query key]` and a mask `[prompt position]`, for prompts of different lengths that are
# padded at the right. What does it give for layer 16, head 0 on the second, short prompt?

# %%
pair = ss.texts([story, "It was late, and cold."]).tokenize(model).right_padded()


def my_sink_attention(pattern, mask):
    """Mean over the real queries after position 0 of what they pay to it [prompt head]."""
    raise NotImplementedError


answer_5 = None  # my_sink_attention(...)[1, 0].item()


check(5, answer_5)

# %% [markdown] tags=["solution"]
# <details><summary>Solution 5</summary>
#
# ```python
# def my_sink_attention(pattern, mask):
#     paid = pattern[:, :, 1:, 0]  # [prompt head query]
#     real = mask[:, None, 1:].float()  # a padded query counts nothing
#     return (paid * real).sum(-1) / real.sum(-1)
#
#
# _, cached = model.run_with_cache(pair.tokens, names_filter="blocks.16.attn.hook_pattern")
# answer_5 = my_sink_attention(cached["pattern", 16], pair.mask)[1, 0].item()
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
# assert not is_right(1, patterns[16, 0, :, 0].mean()), "query 0 is left out"
# assert not is_right(2, (1 / torch.arange(1, 1025)).mean()), "query 0 is left out"
# assert not is_right(3, mass.argmax()), "a mean over the queries that see the key"
# short, real = cached["pattern", 16][1, 0, :, 0], pair.mask[1]
# assert not is_right(5, short[1:].mean()), "padded queries do not count above the line"
# assert not is_right(5, (short * real)[1:].mean()), "nor below"
# assert not is_right(5, short[real].mean()), "query 0 is left out"
# ```
#
# </details>

# %% [markdown]
# ## Discuss
#
# 1. A softmax row sums to one. Which other ways could a head have to do nothing? (Lesson 6 tries two.)
# 2. Is 0.3 a good threshold at 16 tokens? At 16,000? What would you report beside a sink rate?
# 3. The sink takes half of the attention and gives little back. Is attention a measure of importance?
#
# ## Read on
#
# * Guangxuan Xiao, Yuandong Tian, Beidi Chen, Song Han and Mike Lewis (2023), *Efficient Streaming
#   Language Models with Attention Sinks*, arXiv 2309.17453
# * Xiangming Gu, Tianyu Pang, Chao Du and others (2024), *When Attention Sink Emerges in Language
#   Models: An Empirical View*, arXiv 2410.10781
# * Federico Barbero, Álvaro Arroyo, Xiangming Gu and others (2025), *Why do LLMs attend to the first
#   token?*, arXiv 2504.02732

# %% [markdown]
# Next: [2 · Find the sinks of a model](02_find_the_sinks_of_a_model.ipynb). After it:
# [3 · what a sink is made of](03_drains_peaks_and_dimensions.ipynb),
# [4 · how to move it](04_move_the_sink.ipynb),
# [5 · dormant heads](05_dormant_heads.ipynb), and
# [6 · how a sink grows](06_grow_a_sink.ipynb).

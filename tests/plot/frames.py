"""Tidy frames of the shape that the experiments hand to figures; plausible, not measured."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

import sinkscope.plot as plot

OLD_NAMES = {"cures", "removal_cost", "sleeping_heads"}
"""Names of the release before, which warn."""
FIGURES = set(plot.__all__) - {"paper", "save", "set_theme", "template"} - OLD_NAMES
"""The figures of the package."""

ABOUT = "synthetic · T = 300 · BOS: auto (<s>) · ε = 0.3"


def conditions(prompts: int = 4, layers: int = 3, positions: int = 12) -> pd.DataFrame:
    """Position 0 is the sink; position 7 is another one in the conditions that say so."""
    rng = np.random.default_rng(0)
    rows = []
    names = ("special start, 7 unchanged", "special start, 7 designated", "random start <x>")
    for name, p, layer, position in itertools.product(
        names, range(prompts), range(layers), range(positions)
    ):
        value = 0.6 if position == 0 else 0.5 if position == 7 and "designated" in name else 0.02
        value += 0.01 * rng.random()
        rows.append((name, p, layer, position, "received_attention", value))
        rows.append((name, p, layer, position, "residual_norm", 100 * value + layer))
    for name, p in itertools.product(names, range(prompts)):
        rows.append((name, p, -1, -1, "loss", 2 + 0.1 * p + 0.05 * names.index(name)))
    return pd.DataFrame(
        rows, columns=["condition", "prompt", "layer", "position", "metric", "value"]
    )


def trace(blocks: int = 4, prompts: int = 2) -> pd.DataFrame:
    """Only the FFN of block 1 writes the peak: without it a tenth is left from layer 1 on."""
    rows = [
        (-1, "none", "none", p, layer, "sink_residual_norm", 100.0 + p)
        for p, layer in itertools.product(range(prompts), range(blocks))
    ]
    for removed, part, mode, p, layer in itertools.product(
        range(blocks), ("attention", "ffn"), ("zero", "mean"), range(prompts), range(blocks)
    ):
        gone = (removed, part, mode) == (1, "ffn", "zero") and layer >= 1
        value = (100.0 + p) * (0.1 if gone else 1.0)
        rows.append((removed, part, mode, p, layer, "sink_residual_norm", value))
    columns = ["removed", "part", "mode", "prompt", "layer", "metric", "value"]
    return pd.DataFrame(rows, columns=columns)


def life(prompts: int = 2, positions: int = 6) -> pd.DataFrame:
    """The FFN of block 1 writes the sink, that of block 3 takes most of it away."""
    rows = []
    for p in range(prompts):
        for layer, (ratio, added) in enumerate(((1, 0), (100, 100), (100, 0), (40, -60))):
            rows.append(("residual_peak", "sink", p, layer, -1, ratio + 0.1 * p))
            rows.append(("added", "attention", p, layer, -1, 0.0))
            rows.append(("added", "ffn", p, layer, -1, added))
            rows.append(("sink_attention", "nothing", p, layer, -1, 0.5 + 0.01 * p))
            rows.append(("sink_attention", "FFN 1", p, layer, -1, 0.1 + 0.01 * p))
        for position in range(positions):
            rows.append(("trigger", "ffn", p, 1, position, 4.0 if position == 0 else 0.5))
        rows += [
            ("loss", "nothing", p, -1, -1, 2 + 0.1 * p),
            ("loss", "FFN 1", p, -1, -1, 4 + 0.1 * p),
        ]
    for layer in range(4):
        rows.append(("constant_share", "sink", -1, layer, -1, 0.99))
        rows.append(("constant_share", "control", -1, layer, -1, 0.5))
    return pd.DataFrame(rows, columns=["metric", "part", "prompt", "layer", "position", "value"])


def domains(layers: int = 3, heads: int = 4) -> pd.DataFrame:
    """Head 1.2 sleeps on prose and works on code."""
    rng = np.random.default_rng(1)
    rows = []
    for layer, head in itertools.product(range(layers), range(heads)):
        usual = rng.random()
        for domain in ("prose", "code"):
            special = (layer, head) == (1, 2)
            value = (0.9 if domain == "prose" else 0.1) if special else usual
            cost = 0.3 * (1 - value) + 0.01
            ends = value - 0.02, value + 0.02
            row = (layer, head, domain, value, *ends, special, cost, cost - 0.01, cost + 0.01)
            rows.append(row)
    columns = ["layer", "head", "domain", "sink_attention", "sink_attention_low"]
    columns += ["sink_attention_high", "differs", "loss_change", "loss_change_low"]
    return pd.DataFrame(rows, columns=[*columns, "loss_change_high"])


def sleep() -> pd.DataFrame:
    """Loss rises with the share removed: slowly with a score, fast at random."""
    rows = [
        (score, share, 2.0 + slope * share**2 + 0.01 * p, p)
        for score, slope in (("AHON-LN", 1.0), ("random", 20.0))
        for share in (0.0, 0.05, 0.1, 0.2)
        for p in range(3)
    ]
    return pd.DataFrame(rows, columns=["score", "share_ablated", "loss", "prompt"])


def training() -> tuple[pd.DataFrame, pd.DataFrame]:
    """Two runs of two seeds, and a law fitted to one of them."""
    steps = [0, 10, 100, 1000]
    rows = [
        (run, seed, step, metric, layer, head, factor * np.log1p(step) * scale + 0.01 * seed)
        for run, scale in (("softmax", 1.0), ("relu", 0.1))
        for seed in (42, 43)
        for step in steps
        for metric, layer, head, factor in (
            ("sink_attention", 0, 0, 0.1),
            ("logit_gap", 0, 0, 2.0),
            ("backcopy_risk", -1, -1, 0.5),
        )
    ]
    columns = ["run", "seed", "step", "metric", "layer", "head", "value"]
    law = pd.DataFrame(
        {"metric": "logit_gap", "step": steps, "value": [0.0, 4.6, 9.2, 13.8], "law": "a + b ln t"}
    )
    return pd.DataFrame(rows, columns=columns), law


def windows() -> pd.DataFrame:
    """No sinks: far worse; the model that sees everything as a level."""
    rows = [
        (f"{n} sinks", window, 900.0 if n == 0 else 10.0 + 100 / window, 50.0 * window)
        for n in (0, 4)
        for window in (256, 512, 1024)
    ]
    rows.append(("everything", -1, 9.5, 1e6))
    return pd.DataFrame(rows, columns=["kept", "window", "perplexity", "kv_megabytes"])


def stored() -> pd.DataFrame:
    """Full precision, and two schemes with nothing, a sink and the pivots kept."""
    rows = [("everything", "", np.nan, 12.0, 11.5, 12.5)]
    for scheme, bits, lost in (("int2-group64-asym", 2, 40.0), ("int8-token", 8, 0.2)):
        for kept, share in (("0 sinks", 1.0), ("1 sink", 0.3), ("pivots", 0.2)):
            at = 12 + lost * share
            rows.append((kept, scheme, bits, at, at - 0.5, at + 0.5))
    columns = "kept scheme bits perplexity perplexity_low perplexity_high".split()
    return pd.DataFrame(rows, columns=columns)


def along() -> pd.DataFrame:
    """Without a sink the perplexity of later blocks is a hundredfold."""
    rows = [
        (kept, position, 900.0 if kept == "0 sinks" and position > 300 else 9.0)
        for kept in ("everything", "0 sinks", "1 sink <x>")
        for position in (128.0, 384.0, 640.0)
    ]
    return pd.DataFrame(rows, columns=["kept", "position", "perplexity"])


def shifted() -> pd.DataFrame:
    """In bfloat16 a shift moves attention, the more the longer the text; in float32 it does not."""
    rows = [
        (name, shift, query, size * query**0.3, size * query**0.3 / 2, size * query**0.3 * 2)
        for name, size in (
            ("bfloat16", 0.03),
            ("bfloat16, float32 <angles>", 0.02),
            ("float32", 1e-5),
        )
        for shift in (16, 16384)
        for query in (1, 2, 4, 8, 16, 32)
    ]
    columns = ["arithmetic", "shift", "query", "error", "error_low", "error_high"]
    return pd.DataFrame(rows, columns=columns)


def shifted_keys() -> pd.DataFrame:
    """The first key has a hundred times the error of the others."""
    rows = [
        (name, shift, key, size * (100 if key == 0 else 1 + key % 3))
        for name, size in (("bfloat16", 1e-4), ("float32", 1e-7))
        for shift in (16, 16384)
        for key in range(40)
    ]
    return pd.DataFrame(rows, columns=["arithmetic", "shift", "key", "error"])


def timings() -> pd.DataFrame:
    """The stock hooks ran out of memory on the long batch."""
    rows = [
        ("llama-1b", 100, 64, "transformers", 50.0, 1.0),
        ("llama-1b", 100, 64, "eager core", 150.0, 3.0),
        ("llama-1b", 100, 64, "core", 60.0, 1.2),
        ("llama-1b", 1, 8192, "transformers", 100.0, 1.0),
        ("llama-1b", 1, 8192, "eager core", np.nan, np.nan),
        ("llama-1b", 1, 8192, "core", 105.0, 1.05),
    ]
    columns = ["shape", "prompts", "length", "way", "milliseconds", "ratio"]
    return pd.DataFrame(rows, columns=columns).assign(memory=1.5)


def cured() -> pd.DataFrame:
    """ReLU cures the sink; the peak is unclear with SGD."""
    rows = [
        ("softmax", "adamw", "sink", 0.81, 0.78, 0.84, "yes"),
        ("softmax", "adamw", "peak", 5.0, 3.0, 7.0, "yes"),
        ("softmax", "sgd", "sink", 0.7, 0.6, 0.8, "yes"),
        ("softmax", "sgd", "peak", 1.5, 0.9, 2.1, "unclear"),
        ("relu", "adamw", "sink", 0.01, 0.0, 0.02, "no"),
        ("relu", "adamw", "peak", 1.1, np.nan, np.nan, "no?"),
    ]
    columns = ["attention", "optimizer", "phenomenon", "mean", "low", "high", "present"]
    return pd.DataFrame(rows, columns=columns)


def knocked_out() -> pd.DataFrame:
    """The head carries the backcopy, the feed-forward network the bigram."""
    rows = [
        ("none", -1, -1, 0.0, 0.0),
        ("zero attention", 0, 0, 7.7, 0.0),
        ("zero feed-forward", 0, -1, 3.2, 2.0),
    ]
    columns = ["intervention", "layer", "head", "backcopy_excess", "bigram_excess"]
    return pd.DataFrame(rows, columns=columns)


def spikes(layers: int = 12) -> pd.DataFrame:
    """Layers 3, 7 and 11 attend, and the sink's activation spikes before each."""
    rng = np.random.default_rng(0)
    rows = [
        (
            prompt,
            layer,
            rng.uniform(150, 200) if layer % 4 == 2 else rng.uniform(5, 20),
            layer % 4 == 3,
        )
        for prompt, layer in itertools.product(range(3), range(layers))
    ]
    return pd.DataFrame(rows, columns=["prompt", "layer", "value", "attends"])


def experts(layers: int = 2, count: int = 8) -> pd.DataFrame:
    """Expert 3 of layer 1 is a super expert; nothing is sent to expert 5 of layer 0."""
    rng = np.random.default_rng(1)
    rows = [
        (prompt, layer, expert, 900.0 if (layer, expert) == (1, 3) else rng.uniform(0.5, 3))
        for prompt, layer, expert in itertools.product(range(2), range(layers), range(count))
        if (layer, expert) != (0, 5)
    ]
    return pd.DataFrame(rows, columns=["prompt", "layer", "expert", "largest"])


def precision(layers: int = 4) -> pd.DataFrame:
    """Keeping the sinks mends int8-tensor; int4-tensor is destroyed; one cell does the damage."""
    rng = np.random.default_rng(2)
    cost = {"int8-tensor": (0.5, 0.05, 0.06), "int4-tensor": (4.0, 3.0, 3.5)}
    rows = [
        ("all", scheme, kept, "", -1, p, 3 + c + 0.02 * rng.random(), c, scheme == "int4-tensor")
        for scheme, costs in cost.items()
        for kept, c in zip(("nothing", "sinks", "pivots"), costs, strict=True)
        for p in range(3)
    ]
    for kept, layer, tensor, p in itertools.product(
        ("nothing", "sinks"), range(layers), ("attn_in", "value", "neurons"), range(2)
    ):
        damage = 0.4 if (kept, layer, tensor) == ("nothing", 1, "neurons") else 0.001
        damage *= 1 + rng.random()
        rows.append(("cell", "int8-tensor", kept, tensor, layer, p, 3.0, damage, False))
    columns = "what scheme kept tensor layer prompt loss divergence destroyed".split()
    return pd.DataFrame(rows, columns=columns)


def sweep() -> pd.DataFrame:
    """The sink attention of two models forms over four checkpoints."""
    rows = [
        (model, step, 64, "prose", "none", "sink_attention", mean, mean - 0.03, mean + 0.03)
        for model, last in (("small", 0.4), ("large", 0.6))
        for step, mean in zip((0, 100, 1000, 5000), np.linspace(0.02, last, 4), strict=True)
    ]
    columns = "model checkpoint length texts intervention metric mean low high".split()
    return pd.DataFrame(rows, columns=columns)


def vocabulary() -> pd.DataFrame:
    """All tokens but two make a sink first in a prompt; behind BOS half of them do."""
    rng = np.random.default_rng(2)
    rows = []
    for condition, token in itertools.product(("first", "after BOS"), range(60)):
        sink = token not in (7, 41) if condition == "first" else token % 2 == 0
        ratio = (150.0 if sink else 1.5) * rng.uniform(0.9, 1.1)
        kind = ("word start", "continuation", "punctuation")[token % 3]
        rows.append((condition, token, f" w{token}", kind, ratio, sink))
    return pd.DataFrame(rows, columns=["condition", "token", "text", "class", "ratio", "sink"])


def trajectories(layers: int = 6) -> pd.DataFrame:
    """Norm ratios of the two groups in both conditions; block 2 writes the peak."""
    rows = [
        (condition, group, tokens, layer, 0.9 * median, median, 1.2 * median)
        for condition, group, tokens in (
            ("first", "sink", 58),
            ("first", "no sink", 2),
            ("after BOS", "sink", 30),
            ("after BOS", "no sink", 30),
        )
        for layer in range(layers)
        for median in [150.0 / (1 + layer) if group == "sink" and layer >= 2 else 1.5]
    ]
    columns = ["condition", "group", "tokens", "layer", "low", "median", "high"]
    return pd.DataFrame(rows, columns=columns)


def transplanted(prompts: int = 3) -> pd.DataFrame:
    """The key alone takes the attention, and both restore everything."""
    effects = {
        "baseline": (0.6, 0.0, 0.0),
        "host": (0.1, 1.5, 2.0),
        "both": (0.6, 0.0, 0.0),
        "key": (0.55, 1.0, 1.2),
        "value": (0.2, 1.1, 1.1),
        "slot": (0.6, 0.1, 0.3),
        "slot key": (0.62, 1.3, 1.4),
    }
    rows = []
    for (name, values), p in itertools.product(effects.items(), range(prompts)):
        attention, change, divergence = values
        rows.append((name, p, "attention", attention + 0.01 * p))
        rows.append((name, p, "loss", 3 + 0.5 * p + change * (1 + 0.1 * p)))
        rows.append((name, p, "divergence", divergence * (1 + 0.1 * p)))
    return pd.DataFrame(rows, columns=["condition", "prompt", "metric", "value"])

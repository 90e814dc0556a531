"""What a scan must say, worked out in numpy float64 from transformers' own tensors.

Nothing of sinkscope is used: each formula is written out here once more, prompt by prompt and
query by query, from the vocabulary of the documentation.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor


def expected(
    ref: dict[str, Tensor], mask: np.ndarray, causal: bool, sink: int = 0, prescale: float = 1.0
) -> dict:
    """Every field of a report for prompts of one sink each, as float64 arrays.

    Args:
        ref: What `reference` gives for these prompts.
        mask: True at real tokens [prompt position]; right-padded.
        causal: Whether attention is.
        sink: The sink position.
        prescale: What the model's queries were multiplied by before they were recorded.
    """
    a = {name: tensor.double().numpy() for name, tensor in ref.items()}
    a["queries"] = a["queries"] / prescale
    lengths = mask.sum(axis=1)
    prompts = [_prompt(a, p, int(n), causal, sink) for p, n in enumerate(lengths)]
    found = {}
    for name in prompts[0]:
        kind, _, field = name.rpartition(": ")
        rows = [one[name] for one in prompts]
        if kind:
            longest = max(row.shape[-1] for row in rows)
            rows = [
                np.pad(
                    row,
                    [(0, 0)] * (row.ndim - 1) + [(0, longest - row.shape[-1])],
                    constant_values=np.nan,
                )
                for row in rows
            ]
        found[field] = _mean_of_numbers(rows) if kind == "over prompts" else np.stack(rows)
    return found


def _mean_of_numbers(rows: list[np.ndarray]) -> np.ndarray:
    """Mean over prompts of those that are numbers there; nan where none is."""
    known = ~np.isnan(rows)
    count = known.sum(axis=0)
    total = np.where(known, rows, 0).sum(axis=0)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _prompt(a: dict, p: int, n: int, causal: bool, sink: int) -> dict:
    """The fields of one prompt of `n` real tokens.

    Those named "over prompts: …" are means over the prompts that reach a position or bucket;
    "by position: …" are kept prompt by prompt, as long as the prompt is.
    """
    pattern = a["attentions"][:, p, :, :n, :n]
    scores = a["scores"][:, p, :, :n, :n]
    visible = a["visible"][:, p, :n, :n].astype(bool)
    value = np.linalg.norm(a["values"][:, p, :n], axis=-1)  # [layer position kv_head]
    z = np.linalg.norm(a["z"][:, p, :n], axis=-1)
    resid = a["resid_post"][:, p, :n]
    ffn = a["mlp_out"][:, p, :n]
    n_layers, n_heads = pattern.shape[:2]
    group = n_heads // value.shape[-1]
    queries = [i for i in range(n) if i != sink and (i > sink or not causal)]
    others = [j for j in range(n) if j != sink]

    received = np.zeros((n_layers, n_heads, n))
    uniform = np.zeros((n_layers, n))
    for layer in range(n_layers):
        for k in range(n):
            seeing = [i for i in range(n) if visible[layer, i, k]]
            received[layer, :, k] = pattern[layer][:, seeing, k].mean(axis=-1)
            uniform[layer, k] = np.mean([1 / visible[layer, i].sum() for i in seeing])

    seen_by_many = n - n // 4 if causal else n
    first = np.argsort(-received[:, :, :seen_by_many], axis=-1)[:, :, :3]
    top = np.take_along_axis(received, first, axis=-1)
    of_head = np.repeat(value.transpose(0, 2, 1), group, axis=1)  # [layer head position]

    gap = np.zeros((n_layers, n_heads))
    entropy = np.zeros((n_layers, n_heads))
    share = np.zeros((n_layers, n_heads))
    for layer in range(n_layers):
        for head in range(n_heads):
            gaps, shares, entropies = [], [], []
            for i in range(n):
                row = pattern[layer, head, i]
                entropies.append(-sum(x * np.log(x) for x in row if x > 0))
                seen = [j for j in range(n) if visible[layer, i, j] and j not in (sink, i)]
                if i in queries and visible[layer, i, sink] and seen:
                    s = scores[layer, head, i]
                    gaps.append(s[sink] - np.mean(s[seen]))
                if i in queries:
                    weighted = row * value[layer, :, head // group]
                    shares.append(weighted[sink] / weighted.sum())
            gap[layer, head] = np.mean(gaps)
            entropy[layer, head] = np.mean(entropies)
            share[layer, head] = np.mean(shares)

    recency = _recency(pattern, visible, queries, sink, causal)
    query, key = a["queries"][:, p, :n], a["keys"][:, p, :n].repeat(group, axis=2)
    size, length = np.linalg.norm(query, axis=-1), np.linalg.norm(key, axis=-1)
    angle = np.einsum("lihd,ljhd->lhij", query / size[..., None], key / length[..., None])
    to_sink, to_others = np.zeros((n_layers, n_heads)), np.zeros((n_layers, n_heads))
    for layer in range(n_layers):
        rows = [i for i in queries if visible[layer, i, sink]]
        to_sink[layer] = angle[layer][:, rows, sink].mean(axis=-1)
        means = []
        for i in queries:
            seen = [j for j in others if visible[layer, i, j] and j != i]
            means += [angle[layer][:, i, seen].mean(axis=-1)] if seen else []
        to_others[layer] = np.mean(means, axis=0)

    latent = {}
    if "latent" in a:
        sizes = np.linalg.norm(a["latent"][:, p, :n], axis=-1)
        normed = np.linalg.norm(a["normed_latent"][:, p, :n], axis=-1)
        latent = {
            "latent_drain": sizes[:, sink] / sizes[:, others].mean(axis=1),
            "normed_latent_drain": normed[:, sink] / normed[:, others].mean(axis=1),
            "over prompts: latent_norm": sizes,
        }

    through = {}
    if "z_out" in a:
        z_out, value_out = a["z_out"][:, p, :n], a["value_out"][:, p, :n]
        through = {
            "head_output_norm_out": z_out.mean(axis=1),
            "honor_out": z_out.mean(axis=1) / z_out.mean(axis=(1, 2))[:, None],
            "over prompts: value_norm_out": value_out.transpose(0, 2, 1),
            "value_drain_out": value_out[:, sink] / value_out[:, others].mean(axis=1),
        }

    by_distance, edge = [], 1
    while edge < max(n, 2):
        inside = [i for i in queries if edge <= i < 2 * edge]
        mean = pattern[:, :, inside, sink].mean(axis=-1) if inside else np.full(gap.shape, np.nan)
        by_distance.append(mean)
        edge *= 2

    sizes_by_dim = np.sqrt((resid**2).mean(axis=1))  # [layer dim]
    kurtosis = (sizes_by_dim**4).mean(axis=-1) / (sizes_by_dim**2).mean(axis=-1) ** 2
    first_choice = pattern.argmax(axis=-1)[:, :, queries] == sink

    norm = np.linalg.norm(resid, axis=-1)
    at_sink, median = norm[:, sink], np.median(norm[:, others], axis=1)
    largest = np.argsort(-np.abs(ffn[:, sink]), axis=-1, kind="stable")[:, :32]
    cosine = np.einsum("ltd,ld->lt", resid, resid[:, sink]) / (norm * at_sink[:, None])
    return {
        **latent,
        **through,
        "sink_attention": pattern[:, :, queries, sink].mean(axis=-1),
        "first_token_attention": pattern[:, :, :, 0].mean(axis=-1),
        "sink_importance": received[:, :, sink],
        "top_received": top,
        "top_received_position": first,
        "top_received_value_norm": np.take_along_axis(of_head, first, axis=-1),
        "attention_entropy": entropy,
        "sink_logit_gap": gap,
        "sink_query_norm": size[:, queries].mean(axis=1),
        "sink_key_norm": length[:, sink],
        "sink_cosine": to_sink,
        "other_cosine": to_others,
        "value_weighted_sink_share": share,
        **recency,
        "learned_sink_mass": (1 - pattern.sum(axis=-1)).mean(axis=-1),
        "value_drain": value[:, sink] / value[:, others].mean(axis=1),
        "first_value_norm": np.repeat(value[:, 0], group, axis=-1),
        "mean_value_norm": np.repeat(value.mean(axis=1), group, axis=-1),
        "head_output_norm": z.mean(axis=1),
        "last_output_norm": z[:, -1],
        "honor": z.mean(axis=1) / z.mean(axis=(1, 2))[:, None],
        "sink_residual_norm": at_sink,
        "median_residual_norm": median,
        "residual_peak": at_sink / median,
        "by position: residual_outlier": (norm / median[:, None]).max(axis=0),
        "by position: received_peak": received.mean(axis=(0, 1)),
        "sink_is_largest": first_choice.mean(axis=-1),
        "largest_activation": np.abs(resid).max(axis=(1, 2)),
        "largest_over_median": np.abs(resid).max(axis=(1, 2)) / np.median(np.abs(resid), (1, 2)),
        "residual_kurtosis": kurtosis,
        "ffn_sink": ffn[:, sink],
        "ffn_mixed_max": np.abs(ffn[:, others]).max(axis=1),
        "ffn_sink_median": np.median(np.abs(ffn[:, sink]), axis=-1),
        "over prompts: ffn_sink_mean": ffn[:, sink],
        "over prompts: ffn_mixed_mean": np.abs(ffn[:, others]).max(axis=1),
        "over prompts: ffn_over_median": np.abs(ffn[:, sink])
        / np.median(np.abs(ffn[:, sink]), axis=-1)[:, None],
        "over prompts: ffn_over_mixed": np.abs(ffn[:, sink]) / np.abs(ffn[:, others]).max(axis=1),
        "ffn_largest_dim": largest,
        "ffn_largest_sink": np.take_along_axis(ffn[:, sink], largest, axis=1),
        "ffn_largest_mixed": np.take_along_axis(
            np.abs(ffn[:, others]).max(axis=1), largest, axis=1
        ),
        "over prompts: received_attention": received,
        "over prompts: uniform_ratio": received / uniform[:, None],
        "over prompts: sink_rate": (received > 0.3).mean(axis=(0, 1)),
        "over prompts: sink_rate_curve": np.stack(
            [(received > 0.05 * step).mean(axis=(0, 1)) for step in range(1, 20)]
        ),
        "over prompts: received_by_distance": np.stack(by_distance, axis=-1),
        "over prompts: value_norm": value.transpose(0, 2, 1),
        "over prompts: residual_norm": norm,
        "over prompts: cosine_to_sink": cosine,
    }


def _recency(
    pattern: np.ndarray, visible: np.ndarray, queries: list[int], sink: int, causal: bool
) -> dict[str, np.ndarray]:
    """Near keys, sink and rest, one query and key at a time."""
    names = (
        "recent_attention",
        "recent_without_self",
        "recent_sink_attention",
        "remaining_attention",
        "recent_uniform",
        "recent_uniform_without_self",
    )
    widths, n = (4, 16, 64), pattern.shape[-1]
    found = {name: np.full((*pattern.shape[:2], 3), np.nan) for name in names}
    for at, width in enumerate(widths):
        for layer in range(len(pattern)):
            rows = {name: [] for name in names}
            for i in queries:
                seen = [j for j in range(n) if visible[layer, i, j]]
                around = [j for j in range(n) if abs(i - j) <= width and not (causal and j > i)]
                if sink in around or all(abs(i - j) <= width for j in seen):
                    continue
                near = [j for j in seen if abs(i - j) < width]
                others = [j for j in seen if 0 < abs(i - j) <= width]
                row = pattern[layer][:, i]
                rows["recent_attention"].append(row[:, near].sum(-1))
                rows["recent_without_self"].append(row[:, others].sum(-1))
                rows["recent_sink_attention"].append(row[:, sink])
                rest = [j for j in seen if j not in near and j != sink]
                rows["remaining_attention"].append(row[:, rest].sum(-1))
                rows["recent_uniform"].append(np.full(len(row), len(near) / len(seen)))
                rows["recent_uniform_without_self"].append(
                    np.full(len(row), len(others) / len(seen))
                )
            for name, values in rows.items():
                if values:
                    found[name][layer, :, at] = np.mean(values, axis=0)
    found["recency_ratio"] = found["recent_attention"] / found["recent_uniform"]
    for name in ("recent_uniform", "recent_uniform_without_self"):
        found[name] = found[name][:, 0]
    return found

"""Measure the three phenomena and the two risks of one model, as defined by Guo et al.

All are computed in float32 from one forward pass and averaged over *non-trigger queries*, where the
head has nothing to copy and can be dormant. Position 0 is the sink and not counted as a query,
since it attends only to itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.bb.model import BackcopyTransformer, Tap, no_tap, recorder
from sinkscope.bb.task import BigramBackcopy

RECORDED = ("hook_attn_scores", "hook_pattern", "hook_v", "hook_resid_post")


@dataclass(frozen=True)
class Phenomena:
    """Measurements of one model. Layers without attention have NaN in the fields of attention.

    Attributes:
        backcopy_risk: cross-entropy on trigger queries against the true next symbol [nat].
        bigram_risk: the same on non-trigger queries, against the true distribution [nat].
        backcopy_excess, bigram_excess: the same minus the entropy of the truth [nat].
        sink_attention: mean attention to position 0 [probability].
        sink_share: attention to position 0 over the row's sum of |attention|, for operators whose
            rows do not sum to 1; an all-zero row counts as 0.
        spare_attention: the off-sequence mass, 1 - the row's sum [probability].
        trigger_attention: `sink_attention` on trigger queries, where the head is active.
        logit_gap: s_i0 - mean over 1 <= j < i of s_ij, averaged per query symbol, then over
            non-trigger symbols [logit].
        logit_gap_low, logit_gap_high: 10 and 90 % quantile of it over non-trigger symbols.
        value_norm: ||W_O v_0|| per head; `value_others` the mean norm of the other positions.
        value_drain: their ratio, ||v_0|| / mean ||v_j|| after W_O (small = drained).
        residual_norm: ||h_0|| after each block; `residual_others` the mean over the others.
        residual_excess: residual_norm - residual_others, the reference's measure of a peak.
        residual_peak: ||h_0|| over the median norm of the other positions.
    """

    backcopy_risk: float
    bigram_risk: float
    backcopy_excess: float
    bigram_excess: float
    sink_attention: Float[Tensor, "layer head"]
    sink_share: Float[Tensor, "layer head"]
    spare_attention: Float[Tensor, "layer head"]
    trigger_attention: Float[Tensor, "layer head"]
    logit_gap: Float[Tensor, "layer head"]
    logit_gap_low: Float[Tensor, "layer head"]
    logit_gap_high: Float[Tensor, "layer head"]
    value_norm: Float[Tensor, "layer head"]
    value_others: Float[Tensor, "layer head"]
    value_drain: Float[Tensor, "layer head"]
    residual_norm: Float[Tensor, "layer"]
    residual_others: Float[Tensor, "layer"]
    residual_excess: Float[Tensor, "layer"]
    residual_peak: Float[Tensor, "layer"]

    def rows(self) -> Iterator[dict[str, str | int | float]]:
        """Yield tidy rows: metric, layer, head, value; -1 where a metric has no layer or head."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                yield {"metric": field.name, "layer": -1, "head": -1, "value": value}
                continue
            flat = value.unsqueeze(-1) if value.ndim == 1 else value
            for layer, heads in enumerate(flat.tolist()):
                for head, number in enumerate(heads):
                    yield {
                        "metric": field.name,
                        "layer": layer,
                        "head": head if value.ndim == 2 else -1,
                        "value": number,
                    }


@torch.no_grad()
def measure(
    model: BackcopyTransformer,
    task: BigramBackcopy,
    tokens: Int[Tensor, "prompt position"],
    tap: Tap = no_tap,
) -> Phenomena:
    """Measure a model on token sequences of its task.

    Args:
        model: A toy model on any device and of any dtype; it runs outside autocast.
        task: The task that the tokens were drawn from.
        tokens: Sequences that begin with BOS.
        tap: An intervention, applied before values are recorded.

    Returns:
        The measurements, on the CPU.
    """
    kept, record = recorder(*RECORDED)
    logits = model(tokens, tap=lambda name, value: record(name, tap(name, value)))
    device = tokens.device
    is_trigger = task.is_trigger.to(device)[tokens]
    active, dormant = is_trigger.clone(), ~is_trigger & (tokens < task.symbols)
    active[:, 0] = dormant[:, 0] = False
    layers = range(model.config.layers)
    attention = [_attention(model, layer, kept, tokens, task, active, dormant) for layer in layers]
    residual = torch.stack([_residual(kept[f"blocks.{layer}.hook_resid_post"]) for layer in layers])
    return Phenomena(
        **_risks(logits, task, tokens, active, dormant),
        **{name: torch.stack([a[name] for a in attention]).cpu() for name in attention[0]},
        residual_norm=residual[:, 0].cpu(),
        residual_others=residual[:, 1].cpu(),
        residual_excess=(residual[:, 0] - residual[:, 1]).cpu(),
        residual_peak=(residual[:, 0] / residual[:, 2]).cpu(),
    )


def _risks(
    logits: Float[Tensor, "prompt position vocab"],
    task: BigramBackcopy,
    tokens: Int[Tensor, "prompt position"],
    active: Bool[Tensor, "prompt position"],
    dormant: Bool[Tensor, "prompt position"],
) -> dict[str, float]:
    truth = task.oracle(tokens)
    log_p = torch.log_softmax(logits.double(), dim=-1)[..., : task.symbols]
    cross = -(truth * log_p).sum(-1)
    entropy = torch.special.entr(truth).sum(-1)
    return {
        "backcopy_risk": float(cross[active].mean()),
        "bigram_risk": float(cross[dormant].mean()),
        "backcopy_excess": float((cross - entropy)[active].mean()),
        "bigram_excess": float((cross - entropy)[dormant].mean()),
    }


def _attention(
    model: BackcopyTransformer,
    layer: int,
    kept: dict[str, Tensor],
    tokens: Int[Tensor, "prompt position"],
    task: BigramBackcopy,
    active: Bool[Tensor, "prompt position"],
    dormant: Bool[Tensor, "prompt position"],
) -> dict[str, Float[Tensor, "head"]]:
    names = (
        *("sink_attention", "sink_share", "spare_attention", "trigger_attention"),
        *("logit_gap", "logit_gap_low", "logit_gap_high"),
        *("value_norm", "value_others", "value_drain"),
    )
    if model.layers[layer].attn is None:
        missing = torch.full((model.config.heads,), torch.nan, device=tokens.device)
        return dict.fromkeys(names, missing)
    prefix = f"blocks.{layer}.attn."
    pattern = kept[prefix + "hook_pattern"].float()
    to_sink, total = pattern[..., 0], pattern.abs().sum(-1)
    gap = _gap_per_symbol(kept[prefix + "hook_attn_scores"].float(), tokens, task, dormant)
    low, high = gap.nanquantile(torch.tensor([0.1, 0.9], device=gap.device), dim=0)
    norms = _value_norms(model, layer, kept[prefix + "hook_v"])
    values = (
        _over(to_sink, dormant),
        _over(torch.where(total > 0, to_sink.abs() / total, 0.0), dormant),
        _over(1 - pattern.sum(-1), dormant),
        _over(to_sink, active),
        *(gap.nanmean(0), low, high),
        *(norms[:, 0].mean(0), norms[:, 1:].mean((0, 1))),
        norms[:, 0].mean(0) / norms[:, 1:].mean((0, 1)),
    )
    return dict(zip(names, values, strict=True))


def _over(
    value: Float[Tensor, "prompt head query"], queries: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "head"]:
    return rearrange(value, "b h q -> b q h")[queries].mean(0)


def _gap_per_symbol(
    scores: Float[Tensor, "prompt head query key"],
    tokens: Int[Tensor, "prompt position"],
    task: BigramBackcopy,
    dormant: Bool[Tensor, "prompt query"],
) -> Float[Tensor, "symbol head"]:
    """s_i0 minus the mean score of the keys strictly between the sink and the query, per symbol.

    NaN for symbols that are not a non-trigger query of this batch. Queries 0 and 1 have no such
    keys.
    """
    length = scores.shape[-1]
    between = torch.ones(length, length, dtype=torch.bool, device=scores.device).tril(-1)
    between[:, 0] = False
    others = torch.where(between, scores, 0.0).sum(-1) / between.sum(-1).clamp(min=1)
    gap = rearrange(scores[..., 0] - others, "b h q -> b q h")[:, 2:][dormant[:, 2:]]
    symbol = tokens[:, 2:][dormant[:, 2:]]
    total = gap.new_zeros(task.vocab, gap.shape[1]).index_add_(0, symbol, gap)
    count = torch.bincount(symbol, minlength=task.vocab)[:, None]
    return torch.where(count > 0, total / count, torch.nan)


def _value_norms(
    model: BackcopyTransformer, layer: int, value: Float[Tensor, "prompt position head d_head"]
) -> Float[Tensor, "prompt position head"]:
    """||W_O^h v_j^h|| for every position and head."""
    output = rearrange(
        model.layers[layer].attn.o.weight.float(), "dim (h d) -> h d dim", h=model.config.heads
    )
    return einsum(value.float(), output, "b t h d, h d dim -> b t h dim").norm(dim=-1)


def _residual(state: Float[Tensor, "prompt position dim"]) -> Float[Tensor, "statistic"]:
    """||h_0||, then the mean and the median norm of the other positions."""
    norms = state.float().norm(dim=-1)
    others = norms[:, 1:]
    return torch.stack([norms[:, 0].mean(), others.mean(), others.median()])

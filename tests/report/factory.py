"""Synthetic reports for tests: every field filled, with a sink, a drain, a peak and massive dims.

The figures are plausible, not measured: position 0 receives much attention in most heads, its value
is small, its residual state large from layer 1 on. Nothing here comes from the package's metrics.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from sinkscope.report.chance import NULLS
from sinkscope.report.fields import MassiveActivations
from sinkscope.report.report import SinkReport
from sinkscope.report.settings import Settings

EPSILONS = torch.arange(1, 20) / 20


def synthetic_settings(**changes: Any) -> Settings:
    plain = dict(
        model="synthetic",
        revision="0123abcd",
        architecture="LlamaForCausalLM",
        dtype="float32",
        device="cpu",
        source="prose",
        bos="auto (<s>)",
        length=16,
        epsilon=0.3,
        sinks="0",
        attention="eager",
        causal=True,
        windows=(None, 8, None, 8),
        metrics=("attention", "values", "residual", "ffn"),
        n_layers=4,
        n_heads=6,
        n_kv_heads=2,
        seed=0,
        versions={"python": "3.11.7", "sinkscope": "0.1.0", "torch": "2.13.0"},
    )
    return Settings(**{**plain, **changes})


def synthetic_report(
    prompts: int = 3,
    layers: int = 4,
    heads: int = 6,
    kv_heads: int = 2,
    positions: int = 16,
    dims: int = 12,
    *,
    lengths: list[int] | None = None,
    seed: int = 0,
    token_text: list[list[str]] | None = None,
    settings: dict[str, Any] | None = None,
    **fields: Any,
) -> SinkReport:
    """A report with every field; pass ``name=None`` to leave one out, or a tensor to set it."""
    draw = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=draw)

    lengths = lengths or [positions] * prompts
    mask = torch.arange(positions) < torch.tensor(lengths)[:, None]
    sink_mask = torch.zeros_like(mask)
    sink_mask[:, 0] = True
    tokens = torch.randint(3, 100, (prompts, positions), generator=draw) * mask
    decay = 1 / torch.arange(1, positions + 1)

    per_head = (prompts, layers, heads)
    sink_attention = 0.9 * rand(1, layers, heads) + 0.1 * rand(*per_head)
    received = rand(layers, heads, positions) * 0.2
    received[..., 0] = sink_attention.mean(0)
    rate = (received > 0.3).float().mean((0, 1))
    residual = 1 + rand(layers, positions)
    residual[1:, 0] *= 100
    peak = torch.where(mask, 1 + 0.5 * rand(prompts, positions), torch.nan)
    peak[:, 0] = 100
    seen = torch.where(mask, 0.1 * rand(prompts, positions) + 0.5 * sink_mask, torch.nan)
    recent = (1 - sink_attention[..., None]) * torch.tensor([0.2, 0.5, 0.8])
    by_bucket = torch.tensor([1, 2, 4, 8])
    ffn_sink = rand(prompts, layers, dims)
    written = min(1, layers - 1)  # the layer that writes the peak
    ffn_sink[:, written, min(3, dims - 1)] = 400
    ffn_mixed = 0.5 * rand(prompts, layers, dims)
    norms = 1 + rand(*per_head)
    values: dict[str, Any] = dict(
        tokens=tokens,
        mask=mask,
        sink_mask=sink_mask,
        token_text=token_text
        or [[f"t{id}" for id in row[:n]] for row, n in zip(tokens, lengths, strict=True)],
        sink_attention=sink_attention,
        first_token_attention=sink_attention * 0.95 + 0.05 * rand(*per_head),
        sink_importance=sink_attention * 0.95 + 0.05 * rand(*per_head),
        received_attention=received,
        uniform_ratio=received / decay,
        received_peak=seen,
        top_received=torch.linspace(0.6, 0.1, 3).expand(*per_head, 3) * sink_attention[..., None],
        top_received_position=torch.tensor([0.0, 2.0, 1.0]).expand(*per_head, 3),
        top_received_value_norm=torch.tensor([0.2, 1.1, 0.9]).expand(*per_head, 3)
        * norms[..., None],
        sink_rate=rate,
        epsilon=EPSILONS,
        sink_rate_curve=(received[..., None, :] > EPSILONS[:, None]).float().mean((0, 1)),
        prompts_at=mask.sum(0),
        prompts_with_sink_at=mask.sum(0),
        bucket=by_bucket,
        received_by_distance=rand(layers, heads, len(by_bucket)),
        prompts_in_bucket=(torch.tensor(lengths)[:, None] > by_bucket).sum(0),
        attention_entropy=3 * rand(*per_head),
        sink_logit_gap=10 * rand(*per_head) - 2,
        sink_query_norm=norms,
        sink_key_norm=rand(*per_head),
        sink_cosine=rand(*per_head),
        other_cosine=-rand(*per_head),
        width=torch.tensor([4, 16, 64]),
        recent_attention=recent,
        recent_without_self=recent * 0.8,
        recent_uniform=torch.tensor([0.1, 0.3, 0.6]).expand(prompts, layers, 3),
        recent_uniform_without_self=torch.tensor([0.1, 0.3, 0.6]).expand(prompts, layers, 3),
        recency_ratio=recent / torch.tensor([0.1, 0.3, 0.6]),
        recent_sink_attention=sink_attention[..., None].expand(*per_head, 3),
        remaining_attention=1 - sink_attention[..., None] - recent,
        learned_sink_mass=0.1 * rand(*per_head),
        value_weighted_sink_share=rand(*per_head),
        value_norm=rand(layers, kv_heads, positions),
        value_drain=0.3 * rand(prompts, layers, kv_heads),
        value_norm_out=rand(layers, heads, positions),
        value_drain_out=0.3 * rand(*per_head),
        first_value_norm=0.3 * rand(*per_head),
        mean_value_norm=norms,
        head_output_norm=norms,
        head_output_norm_out=2 * norms,
        last_output_norm=norms + rand(*per_head),
        honor=norms / norms.mean(2, keepdim=True),
        honor_out=norms / norms.mean(2, keepdim=True),
        residual_norm=residual,
        residual_peak=(residual[:, 0] / residual[:, 1:].median(1).values).expand(prompts, layers)
        + 0.1 * rand(prompts, layers),
        sink_residual_norm=residual[:, 0].expand(prompts, layers) + rand(prompts, layers),
        median_residual_norm=1 + rand(prompts, layers),
        residual_outlier=peak,
        cosine_to_sink=2 * rand(layers, positions) - 1,
        massive=MassiveActivations(
            prompt=torch.arange(prompts).repeat_interleave(2),
            layer=torch.full((2 * prompts,), written),
            position=torch.zeros(2 * prompts, dtype=torch.int64),
            dim=torch.tensor([3, 7]).repeat(prompts),
            value=torch.tensor([400.0, -150.0]).repeat(prompts) + rand(2 * prompts),
            ratio=torch.tensor([4000.0, 1500.0]).repeat(prompts),
            count=2 * (torch.arange(layers) == written).expand(prompts, layers),
        ),
        ffn_sink=ffn_sink,
        ffn_mixed_max=ffn_mixed,
        position_embedding_norm=rand(2 * positions),
        gate_mean=0.5 * rand(*per_head),
        gate_closed=rand(*per_head),
        gated_sink_attention=0.1 * rand(*per_head),
    )
    plain = dict(
        length=positions, n_layers=layers, n_heads=heads, n_kv_heads=kv_heads,
        windows=(None,) * layers,
    )  # fmt: skip
    values["settings"] = synthetic_settings(**{**plain, **(settings or {})})
    return SinkReport(**SinkReport.upgraded({**values, **fields}))


def with_nulls(report: SinkReport, draws: int = 20) -> SinkReport:
    """The report with draws of every null, far below its sink."""
    rand = torch.Generator().manual_seed(8)
    attention = torch.rand(*report.sink_attention.shape, draws, generator=rand)
    peak = torch.rand(*report.residual_peak.shape, draws, generator=rand)
    drain = torch.rand(*report.value_drain.shape, draws, generator=rand)
    return dataclasses.replace(
        report,
        initial_sink_attention=0.10 + 0.02 * attention,
        random_sink_attention=0.05 + 0.10 * attention,
        shuffled_sink_attention=0.08 + 0.05 * attention,
        initial_residual_peak=0.9 + 0.2 * peak,
        random_residual_peak=0.8 + 0.4 * peak,
        initial_value_drain=0.9 + 0.2 * drain,
        random_value_drain=0.7 + 0.6 * drain,
        sink_is_largest=report.sink_attention.clone(),
        **{
            f"p_{null}": torch.full(report.sink_attention.shape[1:], 1 / (1 + draws))
            for null in NULLS
        },
        **{
            f"p_{null}_value_drain": torch.full(report.value_drain.shape[1:], 1 / (1 + draws))
            for null in ("initial", "random")
        },
    )


def only(report: SinkReport, *names: str) -> SinkReport:
    """The report with every optional field but these set to None."""
    kept = {"settings", "tokens", "mask", "sink_mask", *names}
    gone = {f.name: None for f in dataclasses.fields(report) if f.name not in kept}
    return dataclasses.replace(report, **gone)

"""The fields of a report: dimensions, unit, meaning and metric of each.

The fields of a user's own metric are declared on its `Observer` and added to `SinkReport` by
`report.labelled.extended`.
"""

# ruff: noqa: RUF009 (given() and measured() are dataclasses.field() with the metadata filled in)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.report.labelled import Labelled, given, measured
from sinkscope.report.settings import Settings


@dataclass(frozen=True, eq=False, kw_only=True)
class MassiveActivations(Labelled):
    """Massive activations of the residual stream (Sun et al. 2024), one entry each.

    The rule is ``|value| > 100`` and more than 1000 times the median ``|activation|`` of the
    prompt's hidden state after the layer. `count` includes those beyond the stored entries.
    """

    prompt: Int[Tensor, "entry"] = given("prompt of the entry")
    layer: Int[Tensor, "entry"] = given("layer whose output contains it")
    position: Int[Tensor, "entry"] = given("token position")
    dim: Int[Tensor, "entry"] = given("residual channel")
    value: Float[Tensor, "entry"] = given("the activation", "activation")
    ratio: Float[Tensor, "entry"] = given("|value| over the median of the hidden state", "ratio")
    count: Int[Tensor, "prompt layer"] = given("entries that pass the rule", "count")

    def followed_by(self, other: MassiveActivations, prompts: int) -> MassiveActivations:
        """Concatenate the entries, with the prompts of `other` renumbered from `prompts` on."""
        shifted = dataclasses.replace(other, prompt=other.prompt + prompts)
        both = {
            name: torch.cat([self[name], shifted[name].to(self[name].device)])
            for name in self.variables()
        }
        return MassiveActivations(**both)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SinkFields(Labelled):
    """The fields that a scan measures; `SinkReport` adds methods on them."""

    settings: Settings
    tokens: Int[Tensor, "prompt position"] = given("token ids, right-padded")
    mask: Bool[Tensor, "prompt position"] = given("whether a position holds a real token")
    sink_mask: Bool[Tensor, "prompt position"] = given(
        "the requested sink positions, or the primary sink that was found"
    )
    secondary_sinks: Bool[Tensor, "prompt layer position"] | None = measured(
        about='further sink positions found with sinks="auto", ignored by all other fields'
    )
    token_text: list[list[str]] | None = None

    # Attention
    sink_attention: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean over queries after the sink of the attention they pay to the sink(s)",
        unit="probability",
        metric="sink_attention",
        tabled=True,
    )
    first_token_attention: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean over all queries of the attention to the first token (AWFT)",
        unit="probability",
        metric="sink_attention",
    )
    sink_importance: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean attention to the first sink over the queries that see it (Gu's importance)",
        unit="probability",
        metric="sink_attention",
        tabled=True,
    )
    sink_is_largest: Float[Tensor, "prompt layer head"] | None = measured(
        about="share of the queries after the sink whose largest attention is to the sink",
        unit="share",
        metric="sink_is_largest",
        tabled=True,
    )
    received_attention: Float[Tensor, "layer head position"] | None = measured(
        about="mean attention a key receives from the queries that see it, mean over prompts",
        unit="probability",
        weight="prompts_at",
        metric="received",
    )
    uniform_ratio: Float[Tensor, "layer head position"] | None = measured(
        about="received attention over what uniform attention would give, mean over prompts",
        unit="ratio",
        weight="prompts_at",
        metric="received",
    )
    received_peak: Float[Tensor, "prompt position"] | None = measured(
        about="received attention of a key, mean over layers and heads",
        unit="probability",
        metric="received",
    )
    top_received: Float[Tensor, "prompt layer head rank"] | None = measured(
        about="largest received attention of a prompt's keys, strongest first; of a causal model "
        "without the last quarter of the keys",
        unit="probability",
        metric="top_received",
    )
    top_received_position: Float[Tensor, "prompt layer head rank"] | None = measured(
        about="position of the key with that received attention",
        unit="position",
        metric="top_received",
    )
    top_received_value_norm: Float[Tensor, "prompt layer head rank"] | None = measured(
        about="norm of that key's value vector", unit="activation", metric="top_received"
    )
    sink_rate: Float[Tensor, "position"] | None = measured(
        about="share of (prompt, layer, head) with received attention above settings.epsilon",
        unit="share",
        weight="prompts_at",
        metric="received",
    )
    epsilon: Float[Tensor, "epsilon"] | None = measured(
        about="thresholds of sink_rate_curve", unit="1", metric="received"
    )
    sink_rate_curve: Float[Tensor, "epsilon position"] | None = measured(
        about="share of (prompt, layer, head) with received attention above epsilon",
        unit="share",
        weight="prompts_at",
        metric="received",
    )
    prompts_at: Int[Tensor, "position"] | None = measured(
        about="prompts that reach this position", unit="count"
    )
    bucket: Int[Tensor, "bucket"] | None = measured(
        about="lower edge of each bucket of query positions",
        unit="position",
        metric="sink_attention",
    )
    received_by_distance: Float[Tensor, "layer head bucket"] | None = measured(
        about="attention to the sink(s) from queries of a bucket, mean over prompts that have any",
        unit="probability",
        weight="prompts_in_bucket",
        metric="sink_attention",
    )
    prompts_in_bucket: Int[Tensor, "bucket"] | None = measured(
        about="prompts with at least one query after the sink in this bucket",
        unit="count",
        metric="sink_attention",
    )
    attention_entropy: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean over queries of the entropy of their attention",
        unit="nat",
        metric="entropy",
        tabled=True,
    )
    sink_logit_gap: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean over queries of the sink logit minus the mean logit of the other visible keys",
        unit="logit",
        metric="logit_gap",
        tabled=True,
    )
    sink_query_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean norm of the queries after the sink", unit="activation", metric="sink_logit"
    )
    sink_key_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="norm of the sink's key", unit="activation", metric="sink_logit"
    )
    sink_cosine: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean cosine between the queries after the sink and the sink's key",
        unit="1",
        metric="sink_logit",
    )
    other_cosine: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean cosine between the queries after the sink and the other visible keys",
        unit="1",
        metric="sink_logit",
    )
    width: Int[Tensor, "width"] | None = measured(
        about="widths of a query's neighbourhood in the recency fields",
        unit="tokens",
        metric="recency",
    )
    recent_attention: Float[Tensor, "prompt layer head width"] | None = measured(
        about="attention to the last `width` keys, the query's own included",
        unit="probability",
        metric="recency",
    )
    recent_without_self: Float[Tensor, "prompt layer head width"] | None = measured(
        about="attention to the `width` keys before the query's own",
        unit="probability",
        metric="recency",
    )
    recent_uniform: Float[Tensor, "prompt layer width"] | None = measured(
        about="recent_attention of uniform attention", unit="probability", metric="recency"
    )
    recent_uniform_without_self: Float[Tensor, "prompt layer width"] | None = measured(
        about="recent_without_self of uniform attention", unit="probability", metric="recency"
    )
    recency_ratio: Float[Tensor, "prompt layer head width"] | None = measured(
        about="recent_attention over that of uniform attention", unit="ratio", metric="recency"
    )
    recent_sink_attention: Float[Tensor, "prompt layer head width"] | None = measured(
        about="attention that the queries of recent_attention pay to the sink(s)",
        unit="probability",
        metric="recency",
    )
    remaining_attention: Float[Tensor, "prompt layer head width"] | None = measured(
        about="attention that the queries of recent_attention pay to all other keys",
        unit="probability",
        metric="recency",
    )
    learned_sink_mass: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean attention to a learned sink logit: one minus the sum over keys",
        unit="probability",
        metric="learned_sink",
        tabled=True,
    )
    value_weighted_sink_share: Float[Tensor, "prompt layer head"] | None = measured(
        about="the sink's share of attention times value norm", unit="share", metric="value_share"
    )

    # Gates on the heads' outputs
    gate_mean: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean factor of the gate on the head's output, over queries and channels",
        unit="1",
        metric="gates",
        tabled=True,
    )
    gate_closed: Float[Tensor, "prompt layer head"] | None = measured(
        about="share of the gate's factors below 0.1, over queries and channels",
        unit="share",
        metric="gates",
        tabled=True,
    )
    gated_sink_attention: Float[Tensor, "prompt layer head"] | None = measured(
        about="sink_attention with each query's attention times its mean gate factor",
        unit="probability",
        metric="gates",
        tabled=True,
    )

    # Values and heads' outputs
    value_norm: Float[Tensor, "layer kv_head position"] | None = measured(
        about="norm of the value vector, mean over prompts",
        unit="activation",
        weight="prompts_at",
        metric="values",
    )
    value_drain: Float[Tensor, "prompt layer kv_head"] | None = measured(
        about="norm of the sink's value over the mean of the others (small: drained)",
        unit="ratio",
        metric="values",
        tabled=True,
    )
    value_norm_out: Float[Tensor, "layer head position"] | None = measured(
        about="norm of the value vector through W_O (and through a gate before it, root mean "
        "square over queries), mean over prompts",
        unit="activation",
        weight="prompts_at",
        metric="through_output",
    )
    value_drain_out: Float[Tensor, "prompt layer head"] | None = measured(
        about="value_drain with the values multiplied by W_O, and by a gate before it",
        unit="ratio",
        metric="through_output",
        tabled=True,
    )
    first_value_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="norm of the first token's value (FTVVN)", unit="activation", metric="values"
    )
    mean_value_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean norm of the values (AVVN)", unit="activation", metric="values"
    )
    latent_norm: Float[Tensor, "layer position"] | None = measured(
        about="norm of the latent of keys and values before its RMSNorm, mean over prompts "
        "(multi-head latent attention)",
        unit="activation",
        weight="prompts_at",
        metric="latent",
    )
    latent_drain: Float[Tensor, "prompt layer"] | None = measured(
        about="norm of the sink's latent over the mean of the others, before its RMSNorm",
        unit="ratio",
        metric="latent",
    )
    normed_latent_drain: Float[Tensor, "prompt layer"] | None = measured(
        about="latent_drain after the RMSNorm, as stored in a KV cache",
        unit="ratio",
        metric="latent",
    )
    head_output_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean norm of the head's output before W_O (AHON)",
        unit="activation",
        metric="head_outputs",
    )
    head_output_norm_out: Float[Tensor, "prompt layer head"] | None = measured(
        about="mean norm of the head's output after W_O",
        unit="activation",
        metric="through_output",
        tabled=True,
    )
    last_output_norm: Float[Tensor, "prompt layer head"] | None = measured(
        about="norm of the head's output at the last token (LTHON)",
        unit="activation",
        metric="head_outputs",
    )
    honor: Float[Tensor, "prompt layer head"] | None = measured(
        about="head_output_norm over the mean of its layer (HONOR)",
        unit="ratio",
        metric="head_outputs",
        tabled=True,
    )
    honor_out: Float[Tensor, "prompt layer head"] | None = measured(
        about="head_output_norm_out over the mean of its layer",
        unit="ratio",
        metric="through_output",
    )

    # Residual stream
    residual_norm: Float[Tensor, "layer position"] | None = measured(
        about="norm of the residual state after each block, mean over prompts",
        unit="activation",
        weight="prompts_at",
        metric="residual",
    )
    residual_peak: Float[Tensor, "prompt layer"] | None = measured(
        about="norm of the sink's residual state over the median of the others",
        unit="ratio",
        metric="residual",
    )
    sink_residual_norm: Float[Tensor, "prompt layer"] | None = measured(
        about="norm of the sink's residual state", unit="activation", metric="residual"
    )
    median_residual_norm: Float[Tensor, "prompt layer"] | None = measured(
        about="median norm of the other positions' residual states",
        unit="activation",
        metric="residual",
    )
    residual_outlier: Float[Tensor, "prompt position"] | None = measured(
        about="largest over layers of the norm of a residual state over its layer's median norm",
        unit="ratio",
        metric="residual",
    )
    largest_activation: Float[Tensor, "prompt layer"] | None = measured(
        about="largest |residual activation| over positions and dims",
        unit="activation",
        metric="outliers",
    )
    largest_over_median: Float[Tensor, "prompt layer"] | None = measured(
        about="largest_activation over the median |activation| of the prompt's hidden state",
        unit="ratio",
        metric="outliers",
    )
    residual_kurtosis: Float[Tensor, "prompt layer"] | None = measured(
        about="kurtosis over dims of their root mean square over positions: 1 if all are of one "
        "size, the number of dims if one holds everything",
        unit="1",
        metric="outliers",
    )
    cosine_to_sink: Float[Tensor, "layer position"] | None = measured(
        about="cosine of a residual state to the sink's, mean over prompts that have one",
        unit="1",
        weight="prompts_with_sink_at",
        metric="cosine",
    )
    prompts_with_sink_at: Int[Tensor, "position"] | None = measured(
        about="prompts with a sink that reach this position", unit="count", metric="cosine"
    )
    massive: MassiveActivations | None = measured(
        about="the massive activations, one entry each", metric="massive"
    )

    # FFN output
    ffn_sink_median: Float[Tensor, "prompt layer"] | None = measured(
        about="median over dims of |FFN output| at the first sink", unit="activation", metric="ffn"
    )
    ffn_sink_mean: Float[Tensor, "layer dim"] | None = measured(
        about="FFN output at the first sink, mean over prompts with a sink and a mixed position",
        unit="activation",
        weight="ffn_prompts",
        metric="ffn",
    )
    ffn_mixed_mean: Float[Tensor, "layer dim"] | None = measured(
        about="largest |FFN output| over mixed positions, mean over those prompts",
        unit="activation",
        weight="ffn_prompts",
        metric="ffn",
    )
    ffn_over_median: Float[Tensor, "layer dim"] | None = measured(
        about="|FFN output| at the first sink over the median over dims, mean over those prompts",
        unit="ratio",
        weight="ffn_prompts",
        metric="ffn",
    )
    ffn_over_mixed: Float[Tensor, "layer dim"] | None = measured(
        about="|FFN output| at the first sink over the largest at mixed positions, mean over those "
        "prompts",
        unit="ratio",
        weight="ffn_prompts",
        metric="ffn",
    )
    ffn_prompts: Int[Tensor, "layer"] | None = measured(
        about="prompts with a sink and a mixed position", unit="count", metric="ffn"
    )
    ffn_largest_dim: Int[Tensor, "prompt layer ffn_rank"] | None = measured(
        about="dims with the largest |FFN output| at the first sink, largest first", metric="ffn"
    )
    ffn_largest_sink: Float[Tensor, "prompt layer ffn_rank"] | None = measured(
        about="FFN output at the first sink in those dims", unit="activation", metric="ffn"
    )
    ffn_largest_mixed: Float[Tensor, "prompt layer ffn_rank"] | None = measured(
        about="largest |FFN output| over mixed positions in those dims",
        unit="activation",
        metric="ffn",
    )
    ffn_sink: Float[Tensor, "prompt layer dim"] | None = measured(
        about="FFN output at the first sink in every dim", unit="activation", metric="ffn_dims"
    )
    ffn_mixed_max: Float[Tensor, "prompt layer dim"] | None = measured(
        about="largest |FFN output| over mixed positions in every dim",
        unit="activation",
        metric="ffn_dims",
    )

    # Position embedding
    position_embedding_norm: Float[Tensor, "context"] | None = measured(
        about="norm of each learned position embedding", unit="activation"
    )

    # Chance levels: sink attention, residual peak and value drain under nulls, see `capture.nulls`
    initial_sink_attention: Float[Tensor, "prompt layer head draw"] | None = measured(
        about="sink_attention of the model at initialisation, one draw per seed", unit="probability"
    )
    random_sink_attention: Float[Tensor, "prompt layer head draw"] | None = measured(
        about="sink_attention with a random position of the prompt's first half as the sink, "
        "divided by uniform attention there and multiplied by uniform attention to the sink",
        unit="probability",
    )
    shuffled_sink_attention: Float[Tensor, "prompt layer head draw"] | None = measured(
        about="sink_attention with the keys shuffled within a prompt: attention to the first of a "
        "query's visible keys in a random order",
        unit="probability",
    )
    initial_residual_peak: Float[Tensor, "prompt layer draw"] | None = measured(
        about="residual_peak of the model at initialisation, one draw per seed", unit="ratio"
    )
    random_residual_peak: Float[Tensor, "prompt layer draw"] | None = measured(
        about="residual_peak with the same random position as the sink", unit="ratio"
    )
    initial_value_drain: Float[Tensor, "prompt layer kv_head draw"] | None = measured(
        about="value_drain of the model at initialisation, one draw per seed", unit="ratio"
    )
    random_value_drain: Float[Tensor, "prompt layer kv_head draw"] | None = measured(
        about="value_drain with the same random position as the sink", unit="ratio"
    )
    p_initial: Float[Tensor, "layer head"] | None = measured(
        about="p of sink_attention against initial_sink_attention, corrected for all heads",
        unit="1",
        tabled=True,
    )
    p_random: Float[Tensor, "layer head"] | None = measured(
        about="p of sink_attention against random_sink_attention, corrected for all heads",
        unit="1",
        tabled=True,
    )
    p_shuffled: Float[Tensor, "layer head"] | None = measured(
        about="p of sink_attention against shuffled_sink_attention, corrected for all heads",
        unit="1",
        tabled=True,
    )
    p_initial_value_drain: Float[Tensor, "layer kv_head"] | None = measured(
        about="p of value_drain, if small, against initial_value_drain, corrected for all KV heads",
        unit="1",
        tabled=True,
    )
    p_random_value_drain: Float[Tensor, "layer kv_head"] | None = measured(
        about="p of value_drain, if small, against random_value_drain, corrected for all KV heads",
        unit="1",
        tabled=True,
    )

    @classmethod
    def upgraded(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Compute means over prompts of FFN outputs, which older files store per prompt only."""
        if values.get("ffn_sink") is None or values.get("ffn_sink_mean") is not None:
            return values
        from sinkscope.metrics import ffn

        by_prompt, sums = ffn.folded(
            *(values[n].transpose(0, 1) for n in ("ffn_sink", "ffn_mixed_max"))
        )
        by_prompt = {name: x.transpose(0, 1).contiguous() for name, x in by_prompt.items()}
        return by_prompt | ffn.as_means(sums) | values


_METHODS = {"massive_activations": "massive", "nonmixture_dims": "ffn"}
"""Methods of a report that need the fields of a single metric."""


def metric_of(name: str) -> str | None:
    """The metric that a scan must measure for a field or method of its report.

    Args:
        name: A field or method of `SinkReport`.

    Returns:
        Name of the metric for `scan`; None if it does not belong to a metric.
    """
    return SinkFields.metrics().get(name) or _METHODS.get(name)

"""The figures of a report: each field's dimensions, unit and meaning, in this one place."""

# ruff: noqa: RUF009 (given() and measured() are dataclasses.field() with the metadata filled in)

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.report.labelled import Labelled, given, measured
from sinkscope.report.settings import Settings


@dataclass(frozen=True, eq=False, kw_only=True)
class MassiveActivations(Labelled):
    """The largest residual activations that pass the massive-activation rule (Sun et al. 2024).

    One entry each: ``|value| > 100`` and more than 1000 times the median ``|activation|`` of that
    prompt's hidden state after that layer. `count` also counts those beyond the entries kept.
    """

    prompt: Int[Tensor, "entry"] = given("prompt of the entry")
    layer: Int[Tensor, "entry"] = given("layer whose output holds it")
    position: Int[Tensor, "entry"] = given("token position")
    dim: Int[Tensor, "entry"] = given("residual channel")
    value: Float[Tensor, "entry"] = given("the activation itself", "activation")
    ratio: Float[Tensor, "entry"] = given("|value| over that hidden state's median", "ratio")
    count: Int[Tensor, "prompt layer"] = given("entries that pass the rule", "count")

    def followed_by(self, other: MassiveActivations, prompts: int) -> MassiveActivations:
        """The entries of both, where `other`'s first prompt comes after `prompts` of these."""
        shifted = dataclasses.replace(other, prompt=other.prompt + prompts)
        both = {
            name: torch.cat([self[name], shifted[name].to(self[name].device)])
            for name in self.variables()
        }
        return MassiveActivations(**both)


@dataclass(frozen=True, eq=False, repr=False, kw_only=True)
class SinkFields(Labelled):
    """What one scan measures; `SinkReport` adds the questions one asks of it."""

    settings: Settings
    tokens: Int[Tensor, "prompt position"] = given("token ids, right-padded")
    mask: Bool[Tensor, "prompt position"] = given("whether a position holds a real token")
    sink_mask: Bool[Tensor, "prompt position"] = given("the sink positions asked for or found")
    token_text: list[list[str]] | None = None

    # Attention
    sink_attention: Float[Tensor, "prompt layer head"] | None = measured(
        "mean over queries after the sink of the attention they pay to the sink(s)",
        "probability",
        metric="sink_attention",
    )
    first_token_attention: Float[Tensor, "prompt layer head"] | None = measured(
        "mean over all queries of the attention to the first token (AWFT)",
        "probability",
        metric="sink_attention",
    )
    sink_importance: Float[Tensor, "prompt layer head"] | None = measured(
        "mean attention to the first sink over the queries that see it (Gu's importance)",
        "probability",
        metric="sink_attention",
    )
    received_attention: Float[Tensor, "layer head position"] | None = measured(
        "mean attention a key receives from the queries that see it, mean over prompts",
        "probability",
        weight="prompts_at",
        metric="received",
    )
    uniform_ratio: Float[Tensor, "layer head position"] | None = measured(
        "received attention over what uniform attention would give, mean over prompts",
        "ratio",
        weight="prompts_at",
        metric="received",
    )
    received_peak: Float[Tensor, "prompt position"] | None = measured(
        "received attention of a key, mean over layers and heads", "probability", metric="received"
    )
    sink_rate: Float[Tensor, "position"] | None = measured(
        "share of (prompt, layer, head) whose received attention exceeds settings.epsilon",
        "share",
        weight="prompts_at",
        metric="received",
    )
    epsilon: Float[Tensor, "epsilon"] | None = measured(
        "thresholds of sink_rate_curve", "1", metric="received"
    )
    sink_rate_curve: Float[Tensor, "epsilon position"] | None = measured(
        "share of (prompt, layer, head) whose received attention exceeds epsilon",
        "share",
        weight="prompts_at",
        metric="received",
    )
    prompts_at: Int[Tensor, "position"] | None = measured(
        "prompts that reach this position", "count"
    )
    bucket: Int[Tensor, "bucket"] | None = measured(
        "lower edge of each bucket of query positions", "position", metric="sink_attention"
    )
    received_by_distance: Float[Tensor, "layer head bucket"] | None = measured(
        "attention to the sink(s) from the queries of a bucket, mean over prompts that have any",
        "probability",
        weight="prompts_in_bucket",
        metric="sink_attention",
    )
    prompts_in_bucket: Int[Tensor, "bucket"] | None = measured(
        "prompts with at least one query after the sink in this bucket",
        "count",
        metric="sink_attention",
    )
    attention_entropy: Float[Tensor, "prompt layer head"] | None = measured(
        "mean over queries of the entropy of their attention", "nat", metric="entropy"
    )
    sink_logit_gap: Float[Tensor, "prompt layer head"] | None = measured(
        "mean over queries of the sink's logit less the mean of the other visible keys'",
        "logit",
        metric="logit_gap",
    )
    sink_query_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "mean norm of the queries after the sink", "activation", metric="sink_logit"
    )
    sink_key_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "norm of the sink's key", "activation", metric="sink_logit"
    )
    sink_cosine: Float[Tensor, "prompt layer head"] | None = measured(
        "mean cosine between the queries after the sink and the sink's key",
        "1",
        metric="sink_logit",
    )
    other_cosine: Float[Tensor, "prompt layer head"] | None = measured(
        "mean cosine between the queries after the sink and the other visible keys",
        "1",
        metric="sink_logit",
    )
    learned_sink_mass: Float[Tensor, "prompt layer head"] | None = measured(
        "mean attention that a learned sink logit takes: one less the sum over keys",
        "probability",
        metric="learned_sink",
    )
    value_weighted_sink_share: Float[Tensor, "prompt layer head"] | None = measured(
        "the sink's share of attention times value norm", "share", metric="value_share"
    )

    # Values and heads' outputs
    value_norm: Float[Tensor, "layer kv_head position"] | None = measured(
        "norm of the value vector, mean over prompts",
        "activation",
        weight="prompts_at",
        metric="values",
    )
    value_drain: Float[Tensor, "prompt layer kv_head"] | None = measured(
        "norm of the sink's value over the mean of the others (small: drained)",
        "ratio",
        metric="values",
    )
    value_norm_out: Float[Tensor, "layer head position"] | None = measured(
        "norm of the value vector through W_O, mean over prompts",
        "activation",
        weight="prompts_at",
        metric="through_output",
    )
    value_drain_out: Float[Tensor, "prompt layer head"] | None = measured(
        "value_drain with the values taken through W_O", "ratio", metric="through_output"
    )
    first_value_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "norm of the first token's value (FTVVN)", "activation", metric="values"
    )
    mean_value_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "mean norm of the values (AVVN)", "activation", metric="values"
    )
    head_output_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "mean norm of the head's output before W_O (AHON)", "activation", metric="head_outputs"
    )
    head_output_norm_out: Float[Tensor, "prompt layer head"] | None = measured(
        "mean norm of the head's output after W_O", "activation", metric="through_output"
    )
    last_output_norm: Float[Tensor, "prompt layer head"] | None = measured(
        "norm of the head's output at the last token (LTHON)", "activation", metric="head_outputs"
    )
    honor: Float[Tensor, "prompt layer head"] | None = measured(
        "head_output_norm over the mean of its layer (HONOR)", "ratio", metric="head_outputs"
    )
    honor_out: Float[Tensor, "prompt layer head"] | None = measured(
        "head_output_norm_out over the mean of its layer", "ratio", metric="through_output"
    )

    # Residual stream
    residual_norm: Float[Tensor, "layer position"] | None = measured(
        "norm of the residual state after each block, mean over prompts",
        "activation",
        weight="prompts_at",
        metric="residual",
    )
    residual_peak: Float[Tensor, "prompt layer"] | None = measured(
        "norm of the sink's residual state over the median of the others",
        "ratio",
        metric="residual",
    )
    sink_residual_norm: Float[Tensor, "prompt layer"] | None = measured(
        "norm of the sink's residual state", "activation", metric="residual"
    )
    median_residual_norm: Float[Tensor, "prompt layer"] | None = measured(
        "median norm of the other positions' residual states", "activation", metric="residual"
    )
    residual_outlier: Float[Tensor, "prompt position"] | None = measured(
        "largest over layers of the norm of a residual state over its layer's median norm",
        "ratio",
        metric="residual",
    )
    cosine_to_sink: Float[Tensor, "layer position"] | None = measured(
        "cosine of a residual state to the sink's, mean over prompts that have one",
        "1",
        weight="prompts_with_sink_at",
        metric="cosine",
    )
    prompts_with_sink_at: Int[Tensor, "position"] | None = measured(
        "prompts with a sink that reach this position", "count", metric="cosine"
    )
    massive: MassiveActivations | None = None

    # FFN output
    ffn_sink: Float[Tensor, "prompt layer dim"] | None = measured(
        "FFN output at the first sink", "activation", metric="ffn"
    )
    ffn_mixed_max: Float[Tensor, "prompt layer dim"] | None = measured(
        "largest |FFN output| over the positions that mix", "activation", metric="ffn"
    )
    ffn_sink_median: Float[Tensor, "prompt layer"] | None = measured(
        "median over dims of |FFN output| at the first sink", "activation", metric="ffn"
    )

    # Position embedding
    position_embedding_norm: Float[Tensor, "context"] | None = measured(
        "norm of each learned position embedding", "activation"
    )


_DERIVED = {
    "massive": "massive",
    "massive_activations": "massive",
    "nonmixture_dims": "ffn",
    "sink_logit_parts": "sink_logit",
}
"""What a report derives from fields, and the metric that measures those."""


def metric_of(name: str) -> str | None:
    """The metric to ask a scan for, so that its report holds a field or what derives from one.

    Args:
        name: A field of the report, or a name from `Capabilities.available`.

    Returns:
        The metric, as `scan` takes it; None where no metric measures it.
    """
    variable = SinkFields.variables().get(name)
    return _DERIVED.get(name) if variable is None else variable.metric

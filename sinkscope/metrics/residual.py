"""The residual stream at the sinks: norms, peaks, massive activations, secondary sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics.magnitude_median import magnitude_median
from sinkscope.metrics.positions import first_true, masked_mean
from sinkscope.metrics.reductions import (
    at_least_fp32,
    largest_magnitude,
    masked_median,
    position_chunks,
    token_kernels,
    vector_norm,
)


def residual_norms(
    hidden: Float[Tensor, "prompt position dim"],
) -> Float[Tensor, "prompt position"]:
    """‖h_j‖ of the residual stream at every position [activation]."""
    return vector_norm(hidden)


def mean_at_sinks(
    norms: Float[Tensor, "prompt position"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt"]:
    """‖h_sink‖, averaged over the sinks if there are several [activation]."""
    return masked_mean(norms, sinks & mask, dim=1)


def pivot_tokens(
    hidden: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    entries: int = 20,
) -> Bool[Tensor, "prompt position"]:
    """Pivot tokens: the tokens with the largest |a| of a hidden state.

    Su et al. 2025, "RotateKV: Accurate and Robust 2-Bit KV Cache Quantization for LLMs via
    Outlier-Aware Adaptive Rotations" (arXiv 2501.16383): keys and values of these tokens stay in
    full precision. Twenty entries give at most twenty tokens, or a single one if a massive token
    contains them all.

    Args:
        hidden: The input of a block.
        mask: True at real tokens.
        entries: Number of largest entries.
    """
    size = hidden.abs().masked_fill(~mask[:, :, None], -1).flatten(1)
    top = size.topk(min(entries, size.shape[1]), dim=1).indices
    return torch.zeros_like(mask).scatter_(1, top // hidden.shape[2], True) & mask


def median_of_others(
    norms: Float[Tensor, "prompt position"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt"]:
    """Median of ‖h_j‖ over the real positions that are not sinks [activation]."""
    return masked_median(norms, mask & ~sinks)


def residual_peak(
    norms: Float[Tensor, "prompt position"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt"]:
    """‖h_sink‖ over the median of the others [ratio].

    The median is used because the others may include peaks (a first full stop, secondary sinks).
    """
    return mean_at_sinks(norms, sinks, mask) / median_of_others(norms, sinks, mask)


def excess_norm(
    norms: Float[Tensor, "prompt position"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt"]:
    """‖h_sink‖ minus the mean of the others [activation] (code of Guo et al. 2410.13835)."""
    return mean_at_sinks(norms, sinks, mask) - masked_mean(norms, mask & ~sinks, dim=1)


def cosine_to_sink(
    hidden: Float[Tensor, "prompt position dim"], sinks: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt position"]:
    """cos(h_j, h_s) with s the first sink; nan in a prompt without one.

    Values near ±1 at other positions indicate a secondary sink (2512.22213 uses |cos| > 0.9).
    """
    first = first_true(sinks)
    rows = torch.arange(len(first), device=first.device)
    sink = at_least_fp32(hidden[rows, first.clamp(max=hidden.shape[1] - 1)])
    sink = sink / vector_norm(sink)[:, None]
    along = torch.cat(
        [(hidden[:, chunk] * sink[:, None]).sum(dim=2) for chunk in position_chunks(hidden)], dim=1
    )
    return torch.where(sinks.any(dim=1, keepdim=True), along / vector_norm(hidden), torch.nan)


class TokenSummary(NamedTuple):
    """Three quantities of every residual state, computed in one pass.

    Attributes:
        norm: See `residual_norms` [activation].
        peak: The largest |a|, pads included [activation].
        cosine: See `cosine_to_sink`.
    """

    norm: Float[Tensor, "prompt position"]
    peak: Float[Tensor, "prompt position"]
    cosine: Float[Tensor, "prompt position"]


def token_summary(
    hidden: Float[Tensor, "prompt position dim"], first_sink: Int[Tensor, "prompt"]
) -> TokenSummary | None:
    """Compute all three with one kernel on CUDA; None elsewhere, where it would be no faster.

    Args:
        hidden: Residual states.
        first_sink: The first sink position of each prompt; its length if there is none.
    """
    kernels = token_kernels(hidden)
    return None if kernels is None else TokenSummary(*kernels.token_summary(hidden, first_sink))


MASSIVE_MINIMUM, MASSIVE_RATIO = 100.0, 1000.0
"""Thresholds of massive activations: |a| [activation], and |a| over the median (Sun et al.)."""


class MassiveEntries(NamedTuple):
    """Massive activations of one hidden state, one entry each."""

    prompt: Int[Tensor, "entry"]
    position: Int[Tensor, "entry"]
    dim: Int[Tensor, "entry"]
    value: Float[Tensor, "entry"]
    """Signed [activation]."""
    ratio: Float[Tensor, "entry"]
    """|value| over the median of its prompt."""


def massive_activations(
    hidden: Float[Tensor, "prompt position dim"],
    mask: Bool[Tensor, "prompt position"],
    minimum: float = MASSIVE_MINIMUM,
    ratio: float = MASSIVE_RATIO,
) -> MassiveEntries:
    """Entries a with |a| > minimum and |a| > ratio × the median |a| of that prompt's hidden state.

    The rule of Sun et al. (2402.17762) with their thresholds as defaults. The median is exact, over
    all real positions and dims of the prompt (the mean of the middle two for an even count), and
    computed only if some activation exceeds ``minimum``.
    """
    peak = token_peaks(hidden, mask)
    if (peak > minimum).any():
        median = magnitude_median(hidden, mask)
    else:
        median = torch.full_like(peak[:, 0], torch.inf)  # not needed: no entry passes
    passing = peak > (ratio * median).clamp(min=minimum)[:, None]
    tokens = passing.flatten().nonzero().squeeze(1)
    return MassiveRows.at(hidden, tokens, median).entries(minimum, ratio)


@dataclass(frozen=True)
class MassiveRows:
    """Rows of hidden states that may contain massive activations.

    Attributes:
        token: Index of each row in the concatenated prompts.
        state: Hidden state of each row.
        median: Median |a| of each prompt.
        length: Positions of a prompt.
    """

    token: Int[Tensor, "row"]
    state: Float[Tensor, "row dim"]
    median: Float[Tensor, "prompt"]
    length: int

    @classmethod
    def at(
        cls,
        hidden: Float[Tensor, "prompt position dim"],
        token: Int[Tensor, "row"],
        median: Float[Tensor, "prompt"],
    ) -> MassiveRows:
        """Select rows of a hidden state."""
        state = hidden.flatten(end_dim=1).index_select(0, token)
        return cls(token, state, median, hidden.shape[1])

    def entries(
        self, minimum: float = MASSIVE_MINIMUM, ratio: float = MASSIVE_RATIO
    ) -> MassiveEntries:
        """The massive activations in the rows, see :func:`massive_activations`."""
        state, median = at_least_fp32(self.state), self.median[self.token // self.length]
        bound = (ratio * median).clamp(min=minimum)
        row, dim = (state.abs() > bound[:, None]).nonzero(as_tuple=True)
        token, value = self.token[row], state[row, dim]
        prompt, position = token // self.length, token % self.length
        return MassiveEntries(prompt, position, dim, value, value.abs() / median[row])


def token_peaks(
    hidden: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt position"]:
    """The largest |a| of each real position [activation]; 0 at pads."""
    return torch.where(mask, largest_magnitude(hidden, dim=2), 0)


def largest_activation(
    hidden: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """The largest |a| over the real positions and all dims of a hidden state [activation].

    Chen et al. 2026 (2605.15572) report it in place of a rule with thresholds, which 4 of 24
    checkpoints do not pass.
    """
    return token_peaks(hidden, mask).amax(dim=1)


def kurtosis(
    hidden: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt"]:
    """Kurtosis over dims of their root mean square over the real positions, in [1, dims].

    With s_d² = mean_j h_jd² it is mean_d s_d⁴ / (mean_d s_d²)²: no mean is subtracted and it is no
    excess over a Gaussian's 3. It is 1 where all dims are of one size, and the number of dims where
    one dim holds everything (He et al. 2024, 2405.19279, "neuron RMS"). nan if all is zero.
    """
    square = torch.stack(
        [
            vector_norm(torch.where(mask[:, chunk, None], hidden[:, chunk], 0).mT).square()
            for chunk in position_chunks(hidden)
        ]
    ).sum(dim=0)
    relative = square / square.mean(dim=1, keepdim=True)
    return relative.square().mean(dim=1)


def topk_tokens(
    hidden: Float[Tensor, "prompt position dim"], mask: Bool[Tensor, "prompt position"], k: int = 20
) -> Bool[Tensor, "prompt position"]:
    """Positions with any of the k largest |h| entries of their prompt (RotateKV, 2501.16383).

    These "pivot tokens" are excluded from quantisation there, with k = 20 entries per layer.
    """
    peak = largest_magnitude(hidden, dim=2).masked_fill(~mask, -torch.inf)
    # The k largest entries are in at most k rows: those with the k largest peaks.
    rows = peak.topk(min(k, peak.shape[1]), dim=1).indices
    picked = torch.arange(len(rows), device=rows.device)[:, None], rows
    size = hidden[picked].abs().masked_fill(~mask[picked][:, :, None], -torch.inf)
    entries = rearrange(size, "prompt row dim -> prompt (row dim)")
    bound = entries.topk(min(k, entries.shape[1]), dim=1).values[:, -1:]
    return mask & (peak >= bound)


def sink_lifetime(
    cosine: Float[Tensor, "prompt layer position"], threshold: float = 0.9
) -> Int[Tensor, "prompt position"]:
    """Number of layers in which a position resembles the sink: |cos(h_j, h_s)| > threshold.

    Computed from :func:`cosine_to_sink` of every given layer. The secondary-sink study (2512.22213)
    counts only the layers between the rise and the fall of the sink's norm, and calls a lifetime of
    at least L - 15 of these layers primary-like, and one from 4 up to that secondary. For
    comparable numbers pass only these layers: the first and last layers, whose states also resemble
    the sink's, would otherwise be counted (30 instead of 17 layers in one case).
    """
    return (cosine.abs() > threshold).sum(dim=1)


def perturbation_spread(
    hidden: Float[Tensor, "prompt position dim"], changed: Float[Tensor, "prompt position dim"]
) -> Float[Tensor, "prompt position"]:
    """Effect of a perturbed input on each position: ‖h_i(x) - h_i(x')‖ [activation].

    Barbero et al. (2504.02732, Fig. 2) change one token, with and without the sink.
    """
    return vector_norm(at_least_fp32(hidden) - at_least_fp32(changed))

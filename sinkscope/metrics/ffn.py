"""Non-mixture dimensions: outlier dims of the FFN output at a token that attends only to itself.

Under a causal mask position 0 attends only to itself, so its attention output depends on one value
vector, whereas every later position averages several. Yan et al. (2407.01601) show that the second
layer's FFN converts this into a few huge channels. As their exact rule is not public, we use an
operational one with its thresholds as arguments.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics.positions import first_true
from sinkscope.metrics.reductions import (
    at_least_fp32,
    largest_magnitude,
    largest_magnitude_at,
    position_chunks,
)

LARGEST = 32
"""Number of dims with the largest |x| at the sink that a scan stores per prompt and layer."""


def ffn_profile(
    x: Float[Tensor, "prompt position dim"],
    nonmixed: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> tuple[Float[Tensor, "prompt dim"], Float[Tensor, "prompt dim"], Float[Tensor, "prompt"]]:
    """Reduce the FFN output of one layer to the inputs of :func:`nonmixture_dims`.

    Args:
        x: FFN output before it is added to the residual stream [activation].
        nonmixed: positions that attend only to themselves; usually the sinks.
        mask: real positions.

    Returns:
        x at the first non-mixed position (nan if there is none); max |x| over the mixed real
        positions (nan if there are none); median over dims of |x| at that first position. The
        median is numpy's: the mean of the middle two.
    """
    nonmixed = nonmixed & mask
    at_sink = at_first(x, first_true(nonmixed))
    at_sink = torch.where(nonmixed.any(dim=1, keepdim=True), at_sink, torch.nan)
    mixed = mask & ~nonmixed
    mixed_max = torch.where(mixed.any(dim=1, keepdim=True), largest_where(x, mixed), torch.nan)
    return at_sink, mixed_max, median_over_dims(at_sink)


def at_first(
    x: Float[Tensor, "prompt position dim"], first: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt dim"]:
    """Select one position of each prompt; indices beyond the end select the last position."""
    rows = torch.arange(len(first), device=first.device)
    return at_least_fp32(x[rows, first.clamp(max=x.shape[1] - 1)])


def largest(x: Float[Tensor, "prompt position dim"]) -> Float[Tensor, "prompt dim"]:
    """Largest |x| of each dim over all positions [activation]; 0 where there are none."""
    if x.shape[1] == 0:
        return at_least_fp32(x.new_zeros(x.shape[0], x.shape[2]))
    return _largest_of([largest_magnitude(x[:, chunk], dim=1) for chunk in position_chunks(x)])


def largest_where(
    x: Float[Tensor, "prompt position dim"], where: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt dim"]:
    """Largest |x| of each dim over the positions where ``where`` holds; 0 where there are none."""
    return _largest_of(
        [largest_magnitude_at(x[:, chunk], where[:, chunk]) for chunk in position_chunks(x)]
    )


def _largest_of(parts: list[Float[Tensor, "prompt dim"]]) -> Float[Tensor, "prompt dim"]:
    return parts[0] if len(parts) == 1 else torch.stack(parts).amax(dim=0)


def median_over_dims(x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch"]:
    """Median over dims of |x| as numpy takes it: the mean of the middle two."""
    ordered, dims = x.abs().sort(dim=-1).values, x.shape[-1]
    return ordered[..., (dims - 1) // 2 : dims // 2 + 1].mean(dim=-1)


def folded(
    at_sink: Float[Tensor, "layer prompt dim"], mixed: Float[Tensor, "layer prompt dim"]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reduce FFN outputs to the fields of a report, whose size hardly depends on the prompts.

    Args:
        at_sink: x at the first sink, nan in a prompt without one [activation].
        mixed: max |x| over the mixed positions, nan in a prompt without any [activation].

    Returns:
        Fields of a report by name. First those with prompts, [layer prompt ...]: the median of |x|
        over dims, and the `LARGEST` dims by |x|, with both inputs in these dims (dim -1 in a prompt
        without a sink). Then sums [layer dim] over the prompts in which both are defined, of x, of
        max |x|, of |x| over its median, and of |x| over max |x|, and the number of these prompts
        [layer].
    """
    median, size = median_over_dims(at_sink), at_sink.abs()
    largest = size.nan_to_num(-1).topk(min(LARGEST, at_sink.shape[-1]), dim=-1).indices
    has_sink = ~median.isnan()[..., None]
    both = has_sink & ~mixed[..., :1].isnan()

    def over_prompts(values: Float[Tensor, "layer prompt dim"]) -> Float[Tensor, "layer dim"]:
        return torch.where(both, values, 0).sum(dim=1)

    by_prompt = {
        "ffn_sink_median": median,
        "ffn_largest_dim": torch.where(has_sink, largest, -1),
        "ffn_largest_sink": at_sink.gather(-1, largest),
        "ffn_largest_mixed": mixed.gather(-1, largest),
    }
    sums = {
        "ffn_sink_mean": over_prompts(at_sink),
        "ffn_mixed_mean": over_prompts(mixed),
        "ffn_over_median": over_prompts(size / median[..., None]),
        "ffn_over_mixed": over_prompts(size / mixed),
        "ffn_prompts": both.sum(dim=(1, 2)),
    }
    return by_prompt, sums


def as_means(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Convert the sums of :func:`folded` to means over prompts."""
    prompts = sums["ffn_prompts"]
    means = {name: x / prompts[:, None] for name, x in sums.items() if name != "ffn_prompts"}
    return means | {"ffn_prompts": prompts}


def nonmixture_dims(
    x_sink: Float[Tensor, "*batch dim"],
    mixed_max: Float[Tensor, "*batch dim"],
    sink_median: Float[Tensor, "*batch"],
    over_median: float = 100.0,
    over_mixed: float = 10.0,
) -> Bool[Tensor, "*batch dim"]:
    """Dims d with |x_d| > over_median · median_d |x_d| and |x_d| > over_mixed · max_mixed |x_d|.

    The three inputs are those of :func:`ffn_profile`; the rule is our operational definition (see
    the module). A prompt without a mixed position has no such dims. The first default is lower than
    the 1000 of massive activations because a ratio to the median is less extreme over few dims. In
    SmolLM2-135M (576 dims) the channel of the peak is 500 times the median and 1000 times any mixed
    position, while ordinary channels are below 40 and 3 times.
    """
    size = x_sink.abs()
    return (size > over_median * sink_median[..., None]) & (size > over_mixed * mixed_max)

"""Tests that hold for many heads at once, and rank correlations with intervals over prompts."""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import TextError
from sinkscope.experiments._result import Estimate

_CHUNK = 2**24  # numbers of one piece of the permutations


def max_t(
    one: Float[Tensor, "prompt *head"],
    other: Float[Tensor, "other_prompt *head"],
    permutations: int = 10_000,
    seed: int = 0,
) -> Float[Tensor, "*head"]:
    """Two-sided p-values for a difference of means, corrected for the number of heads.

    Welch's t of each head, against how large the largest |t| of any head gets when prompts change
    sides at random (Westfall & Young 1993, single step). That bounds the probability of naming even
    one head wrongly, however much heads resemble each other: exactly where a head that does not
    differ has one distribution on both kinds of text, and for many prompts where only its mean is
    the same (Janssen 1997: what Welch's t is for). Prompts count as independent of each other.

    Args:
        one: A figure on one kind of text.
        other: The same on another, on other prompts.
        permutations: How often prompts change sides; no p-value is below 1 / (permutations + 1).
        seed: Of the permutations.

    Returns:
        (1 + how many permutations reach the head's |t|) / (1 + permutations), on the CPU.

    Raises:
        TextError: With fewer than two prompts on a side: one says nothing about how prompts differ.
    """
    sizes = len(one), len(other)
    if min(sizes) < 2:
        raise TextError(
            f"Comparing two kinds of text needs at least two prompts of each, not {sizes[0]} and "
            f"{sizes[1]}."
        )
    both = torch.cat([one.detach().cpu().double(), other.detach().cpu().double()])
    both = rearrange(both, "prompt ... -> prompt (...)")
    both = both - both.mean(dim=0)  # keeps the sums of squares below from cancelling
    first = torch.zeros(1, len(both), dtype=torch.float64)
    first[:, : sizes[0]] = 1
    seen = _welch(both, first).abs()[0]
    generator = torch.Generator().manual_seed(seed)
    reached = torch.ones(both.shape[1], dtype=torch.float64)
    left = permutations
    while left:
        some = min(left, max(1, _CHUNK // both.numel()))
        order = torch.rand(some, len(both), generator=generator).argsort(dim=1)
        largest = _welch(both, (order < sizes[0]).double()).abs().amax(dim=1)
        # A permutation that only swaps equal prompts is the data itself, rounding apart.
        reached += (largest[:, None] >= seen * (1 - 1e-9)).sum(dim=0)
        left -= some
    return (reached / (1 + permutations)).reshape(one.shape[1:])


def _welch(
    figures: Float[Tensor, "prompt head"], first: Float[Tensor, "split prompt"]
) -> Float[Tensor, "split head"]:
    """Welch's t of the prompts marked 1 against the others, for each way to split them."""
    means, errors = [], []
    for side in (first, 1 - first):
        size = side.sum(dim=1, keepdim=True)
        mean = side @ figures / size
        spread = (side @ figures**2 - size * mean**2).clamp(min=0) / (size - 1)
        means.append(mean)
        errors.append(spread / size)
    difference, error = means[0] - means[1], (errors[0] + errors[1]).sqrt()
    # A head that is the same on every prompt differs by nothing, or for sure.
    return torch.where(difference == 0, 0, difference / error)


def ranks(x: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """Ranks from 1 along the last axis; equal values share the mean of theirs."""

    def places(x: Tensor) -> Tensor:
        return x.argsort(dim=-1, stable=True).argsort(dim=-1)

    # Among equal values the first comes first; from the other end, the last does.
    return (places(x) + places(x.flip(-1)).flip(-1)) / 2 + 1


def spearman(x: Float[Tensor, "*batch n"], y: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch"]:
    """Spearman's rank correlation along the last axis; nan where either is constant."""
    x, y = ranks(x).double(), ranks(y).double()
    x, y = x - x.mean(-1, keepdim=True), y - y.mean(-1, keepdim=True)
    return (x * y).sum(-1) / (x.square().sum(-1) * y.square().sum(-1)).sqrt()


def rank_correlation(
    x: Float[Tensor, "prompt head"],
    y: Float[Tensor, "prompt head"],
    resamples: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Spearman's correlation over heads of two figures' means over prompts.

    The heads are all there are, so what is uncertain is the texts: the 95 % interval is the
    percentile bootstrap over prompts, both figures drawn together. Noise in either figure pulls the
    resampled correlations towards zero, so that the interval errs on the side of "no relation".
    """
    x, y = x.detach().cpu().double(), y.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randint(len(x), (resamples, len(x)), generator=generator)
    rho = float(spearman(x.mean(dim=0), y.mean(dim=0)))
    if len(x) < 2:
        return Estimate(rho, torch.nan, torch.nan)
    times = torch.zeros(resamples, len(x), dtype=torch.float64)
    times.scatter_add_(1, drawn, torch.ones_like(times))
    again = spearman(times @ x, times @ y)
    low, high = again.nanquantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return Estimate(rho, low, high)

"""Norms of values and head outputs, before and after the output projection."""

from __future__ import annotations

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sinkscope.metrics.positions import masked_mean
from sinkscope.metrics.reductions import at_least_fp32, position_chunks, token_kernels, vector_norm


def norms(x: Float[Tensor, "prompt position head d_head"]) -> Float[Tensor, "prompt head position"]:
    """‖x‖ of every head's vector at every position [activation]: values v_j or outputs z_i."""
    return vector_norm(x).transpose(1, 2)


def gram(w_o: Float[Tensor, "head d_head d_model"]) -> Float[Tensor, "head d_head d_head"]:
    """G^h = W_O^h W_O^hᵀ, with which ‖x W_O^h‖² = xᵀ G^h x is d_model / d_head times cheaper.

    Accumulated in float64 and returned in at least fp32: the rounding of G is the only difference
    between :func:`norms_through` and the norm of the projected vector.
    """
    wide = w_o.double()
    return (wide @ wide.mT).to(torch.promote_types(w_o.dtype, torch.float32))


def norms_through(
    x: Float[Tensor, "prompt position kv_head d_head"], gram: Float[Tensor, "head d_head d_head"]
) -> Float[Tensor, "prompt head position"]:
    """‖x W_O^h‖ of every head's vector [activation], as sqrt(xᵀ G^h x) with G from :func:`gram`.

    Vectors of KV heads are repeated for the query heads of their group (see `per_query_head`).
    """
    kernels = token_kernels(x)
    if kernels is not None and x.shape[-1] <= kernels.WIDEST_HEAD:
        return kernels.norms_through(x, gram)
    x = x.repeat_interleave(len(gram) // x.shape[2], dim=2)
    sizes = []
    for chunk in position_chunks(x):
        part = at_least_fp32(x[:, chunk])
        through = torch.einsum("pthd,hde->pthe", part, gram.to(part.dtype))
        sizes.append((through * part).sum(dim=-1).clamp(min=0).sqrt())
    return torch.cat(sizes, dim=1).transpose(1, 2)


def drain(
    norms: Float[Tensor, "prompt head position"],
    sinks: Bool[Tensor, "prompt position"],
    mask: Bool[Tensor, "prompt position"],
) -> Float[Tensor, "prompt head"]:
    """Value-state drain: mean ‖v_sink‖ over mean ‖v_j‖ of the other real positions [ratio].

    Small values mean drained (Guo et al. 2410.13835); a sink is a no-op sink below 0.2 and a
    broadcasting one near 1 (Fesser et al. 2606.08105).
    """
    at_sinks = masked_mean(norms, (sinks & mask)[:, None, :], dim=-1)
    return at_sinks / masked_mean(norms, (mask & ~sinks)[:, None, :], dim=-1)


def mean_norm(
    norms: Float[Tensor, "prompt head position"], mask: Bool[Tensor, "prompt position"]
) -> Float[Tensor, "prompt head"]:
    """Mean of ‖x‖ over all real positions [activation]: AVVN for values, AHON for head outputs."""
    return masked_mean(norms, mask[:, None, :], dim=-1)


def norm_at(
    norms: Float[Tensor, "prompt head position"], index: Int[Tensor, "prompt"]
) -> Float[Tensor, "prompt head"]:
    """‖x‖ at one position of each prompt: the first for FTVVN, the last real one for LTHON."""
    return at_least_fp32(norms[torch.arange(len(index), device=index.device), :, index])


def per_query_head(
    kv: Float[Tensor, "prompt kv_head *rest"], n_heads: int
) -> Float[Tensor, "prompt head *rest"]:
    """Repeat values of KV heads for the query heads of their group (grouped-query attention).

    Query head h belongs to KV head h // (n_heads / n_kv_heads).
    """
    return repeat(kv, "prompt kv ... -> prompt (kv group) ...", group=n_heads // kv.shape[1])


def output_from(
    pattern: Float[Tensor, "prompt head query key"],
    v: Float[Tensor, "prompt key kv_head d_head"],
    keys: Bool[Tensor, "prompt key"],
) -> Float[Tensor, "prompt query head d_head"]:
    """Contribution of a set of keys to each head's output, Σ_{j∈keys} A_ij v_j [activation].

    With the massive tokens as ``keys`` this is the implicit bias of Sun et al. (2402.17762); the
    rest of the output comes from the other keys.
    """
    chosen = torch.where(keys[:, :, None, None], at_least_fp32(v), 0)
    paid = torch.where(keys[:, None, None, :], at_least_fp32(pattern), 0)
    grouped = rearrange(paid, "p (kv group) query key -> p kv group query key", kv=v.shape[2])
    parts = torch.einsum("pkgij,pjkd->pikgd", grouped, chosen)
    return rearrange(parts, "p query kv group d -> p query (kv group) d")


def variance_over_queries(
    output: Float[Tensor, "prompt query head d_head"], queries: Bool[Tensor, "prompt query"]
) -> Float[Tensor, "prompt head"]:
    """Variance over queries, mean_i ‖b_i - mean_i b_i‖² [activation²]; 0 for a constant bias."""
    where = queries[:, :, None, None]
    centre = masked_mean(output, where, dim=1)
    squares = (at_least_fp32(output) - centre[:, None]).square().sum(dim=-1)
    return masked_mean(squares, queries[:, :, None], dim=1)

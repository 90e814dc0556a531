"""W_O of every head, defined as the map that the model applies to z rather than a stored weight.

The output projection need not be a plain linear layer: an adapter adds its own term, a quantised
layer stores integers, a hook scales the result, a custom class may use any layout. Unless it is a
plain layer of known layout, the map is therefore determined by applying it to unit vectors, and
z · W_O + b is compared with the projection's output on real activations.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from sinkscope.errors import UnsupportedError


def output_weight(model: Any, layer: int) -> Float[Tensor, "head d_head d_model"]:
    """W_O of every head of a layer, in the convention z · W_O.

    Args:
        model: A bridge.
        layer: Index of the block.

    Raises:
        UnsupportedError: If the layer has no output projection, or its weights are offloaded.
    """
    weight, _ = _map(_projection(model, layer))
    return rearrange(weight, "(head d_head) d_model -> head d_head d_model", head=model.cfg.n_heads)


def why_no_map(
    model: Any,
    layers: tuple[int, ...],
    z: list[Tensor] | None,
    given: list[Tensor] | None,
    tolerance: float,
) -> str | None:
    """Why the output projections of a model are not linear maps of z, or None if they are.

    Args:
        model: A bridge.
        layers: Indices of the layers with attention.
        z: Input of each layer's projection in a forward pass [prompt position head d_head].
        given: Its output [prompt position d_model].
        tolerance: Relative error due to the model's dtype.
    """
    if z is None or given is None:
        return "the bridge does not expose input and output of its output projections"
    if len({x.shape[2:] for x in z}) > 1:
        return "its layers differ in the number or the width of their heads"
    for layer, read, wanted in zip(layers, z, given, strict=True):
        try:
            weight, bias = _map(_projection(model, layer))
        except UnsupportedError as error:
            return str(error).rstrip(".")
        if read.shape[2] * read.shape[3] != weight.shape[0]:
            return f"the output projection of layer {layer} reads more than the heads"
        flat = rearrange(read, "b t h d -> b t (h d)").to(weight)
        mapped = (flat @ weight + (0 if bias is None else bias)).float().cpu()
        size = wanted.abs().max().clamp_min(1e-30)
        if not bool((mapped - wanted).abs().max() <= tolerance * size):
            return f"the output projection of layer {layer} is not a linear map of z"
    return None


def _projection(model: Any, layer: int) -> nn.Module:
    component = getattr(model.blocks[layer].attn, "o", None)
    projection = getattr(component, "original_component", None)
    if projection is None:
        raise UnsupportedError(f"layer {layer} has no output projection of its own.")
    if any(x.is_meta for x in projection.parameters()):
        raise UnsupportedError("the weights of its output projections are offloaded.")
    return projection


def _map(projection: nn.Module) -> tuple[Float[Tensor, "z d_model"], Tensor | None]:
    """Weight and bias of a projection, in the convention input · weight + bias."""
    weight: Any = getattr(projection, "weight", None)
    bias: Any = getattr(projection, "bias", None)
    plain = type(weight) is nn.Parameter and weight.is_floating_point() and weight.itemsize > 1
    if plain and not _hooked(projection):
        if type(projection) is nn.Linear:
            return weight.detach().T, bias
        if type(projection) is Conv1D:
            return weight.detach(), bias
    width = getattr(projection, "in_features", None)
    if width is None and not isinstance(weight, Tensor):
        raise UnsupportedError(
            f"its output projection, a {type(projection).__name__}, states neither in_features nor "
            "a weight."
        )
    width = width or weight.shape[-1]
    parameter = next((p for p in projection.parameters() if p.is_floating_point()), None)
    like = torch.zeros(()) if parameter is None else parameter
    dtype = like.dtype if like.dtype.itemsize > 1 else torch.get_default_dtype()
    unit = torch.eye(width, dtype=dtype, device=like.device)
    with torch.no_grad():
        offset = projection(torch.zeros_like(unit[:1])[None])[0]
        return projection(unit[None])[0] - offset, offset[0]


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))

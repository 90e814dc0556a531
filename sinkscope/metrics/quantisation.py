"""Simulated quantisation: a tensor is rounded as if stored with few bits and read back.

A `Scheme` sets the number format, the granularity of ranges, and whether a range comes from the
tensor itself (dynamic) or from other text (static). `limits` computes the range, `rounded` rounds
to the grid spanned by it, and `quantised` does both. Entries kept in full precision are unchanged
and excluded from the range, as in a quantiser that stores them separately.

The grids, with [low, high] the range and b the bits:

* symmetric integers: x̂ = s · clamp(round(x / s), −n, n) with s = max(|low|, |high|) / n and
  n = 2^(b−1) − 1;
* asymmetric integers: x̂ = low + s · clamp(round((x − low) / s), 0, n) with s = (high − low) / n and
  n = 2^b − 1, the grid of KIVI (Liu et al. 2024, arXiv 2402.02750), which need not contain 0;
* fp8 (e4m3, largest number 448): x̂ = s · fp8(x / s), s = max(|low|, |high|) / 448.

Ties round to even and x / s is computed as x · (1 / s), as in torch's fake quantisation.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.errors import UnsupportedError
from sinkscope.metrics.reductions import at_least_fp32
from sinkscope.validation import one_of, shown, whole_number

BITS = {"int8": 8, "fp8": 8, "int4": 4, "int2": 2}
"""Bits of each number format."""
RANGES = ("tensor", "token", "channel", "group")
"""Granularity of ranges: a prompt's whole tensor, a token, a channel, or a group of channels."""
_FP8_LARGEST = 448.0
_NOTHING = 2.0**-100  # smaller ranges count as 0, so that 1 / s is finite
_GROUP = 64

Activation = Float[Tensor, "prompt position channel"]
Kept = Bool[Tensor, "_ _ _"]
"""Entries kept in full precision, broadcast to [prompt position channel]."""
Limit = Float[Tensor, "_ _ _"]


@dataclass(frozen=True)
class Scheme:
    """A quantisation scheme.

    Attributes:
        format: "int8", "fp8" (e4m3), "int4" or "int2".
        per: Granularity of ranges: "tensor" (all tokens and channels of a prompt), "token",
            "channel" (all tokens of a prompt) or "group" (`group` adjacent channels of a token;
            the last group may be smaller).
        symmetric: Whether the grid is symmetric about 0; fp8 always is.
        static: Whether the range is that of calibration texts instead of the tensor itself.
        group: Number of channels in a group.

    Raises:
        UnsupportedError: If the format or granularity does not exist, fp8 is asymmetric, or a
            static range is requested per token or group, which differ between texts.
    """

    format: str = "int8"
    per: str = "tensor"
    symmetric: bool = True
    static: bool = False
    group: int = _GROUP

    def __post_init__(self) -> None:
        one_of("format", self.format, tuple(BITS), error=UnsupportedError)
        one_of("per", self.per, RANGES, error=UnsupportedError)
        whole_number("group", self.group, at_least=1, error=UnsupportedError)
        if self.format == "fp8" and not self.symmetric:
            raise UnsupportedError(
                "fp8 is symmetric about 0; choose an integer format, or leave out asym."
            )
        if self.static and self.per in ("token", "group"):
            raise UnsupportedError(
                f"A static range cannot be taken per {self.per}, since tokens differ between "
                "texts; choose tensor or channel."
            )

    @classmethod
    def parse(cls, text: Any) -> Scheme:
        """Parse the name of a scheme: FORMAT-RANGE, optionally with -asym and -static.

        Args:
            text: For example "int8-tensor", "int4-group32-asym" or "fp8-channel-static".

        Raises:
            UnsupportedError: If the name does not have this form, or the scheme is invalid.
        """
        if isinstance(text, Scheme):
            return text
        parts = text.split("-") if isinstance(text, str) else []
        group = re.fullmatch(r"group(\d+)", parts[1]) if len(parts) > 1 else None
        options = parts[2:]
        if (
            len(parts) < 2
            or not set(options) <= {"asym", "static"}
            or len(set(options)) < len(options)
        ):
            raise UnsupportedError(
                f"{shown(text)} is not a scheme; expected FORMAT-RANGE such as int8-tensor, "
                "int4-token or int4-group64-asym, optionally with -asym and -static."
            )
        return cls(
            format=parts[0],
            per="group" if group else parts[1],
            symmetric="asym" not in options,
            static="static" in options,
            group=int(group[1]) if group else _GROUP,
        )

    @property
    def bits(self) -> int:
        """Number of bits per value."""
        return BITS[self.format]

    @property
    def whole_prompts(self) -> bool:
        """Whether a range is taken over all tokens of a prompt, padding included."""
        return not self.static and self.per in ("tensor", "channel")

    def __str__(self) -> str:
        per = f"group{self.group}" if self.per == "group" else self.per
        asymmetric = "" if self.symmetric else "-asym"
        return f"{self.format}-{per}{asymmetric}{'-static' if self.static else ''}"


def limits(x: Activation, scheme: Scheme, keep: Kept | None = None) -> tuple[Limit, Limit]:
    """The range of a dynamic scheme: smallest and largest entry.

    Args:
        x: A tensor.
        scheme: The scheme, which sets the granularity.
        keep: Entries excluded from the range.

    Returns:
        Two tensors that broadcast to `x`; 0 where all entries are excluded.
    """
    low = high = at_least_fp32(x)
    if keep is not None:
        low, high = low.masked_fill(keep, torch.inf), high.masked_fill(keep, -torch.inf)
    if scheme.per == "group":
        low = -_largest_in_groups(-low, scheme.group)
        high = _largest_in_groups(high, scheme.group)
    else:
        dims = {"tensor": (1, 2), "token": (2,), "channel": (1,)}[scheme.per]
        low, high = low.amin(dims, keepdim=True), high.amax(dims, keepdim=True)
    nothing = low > high
    return low.masked_fill(nothing, 0), high.masked_fill(nothing, 0)


def _largest_in_groups(x: Activation, size: int) -> Activation:
    channels = x.shape[2]
    padded = torch.nn.functional.pad(x, (0, -channels % size), value=-torch.inf)
    groups = rearrange(padded, "b t (g s) -> b t g s", s=size).amax(3)
    return repeat(groups, "b t g -> b t (g s)", s=size)[:, :, :channels]


def rounded(x: Activation, low: Limit, high: Limit, scheme: Scheme) -> Activation:
    """Round to the grid spanned by a range; values outside it are clipped.

    Args:
        x: A tensor.
        low: Lower end of the range, broadcast to `x`.
        high: Upper end.
        scheme: The scheme, which sets format and symmetry.

    Returns:
        The rounded tensor, in the dtype of `x`.
    """
    exact = at_least_fp32(x)
    low, high = low.to(exact), high.to(exact)
    largest = torch.maximum(low.abs(), high.abs())
    if scheme.format == "fp8":
        step = largest / _FP8_LARGEST
        unit = (exact * step.reciprocal()).clamp(-_FP8_LARGEST, _FP8_LARGEST)
        result, empty = unit.to(torch.float8_e4m3fn).to(exact) * step, largest
    elif scheme.symmetric:
        n = 2 ** (scheme.bits - 1) - 1
        step = largest / n
        result, empty = (exact * step.reciprocal()).round().clamp(-n, n) * step, largest
    else:
        n = 2**scheme.bits - 1
        step = (high - low) / n
        result = ((exact - low) * step.reciprocal()).round().clamp(0, n) * step + low
        empty = high - low
    flat = torch.zeros_like(low) if scheme.symmetric else low
    return torch.where(empty < _NOTHING, flat, result).to(x.dtype)


def quantised(
    x: Activation,
    scheme: Scheme,
    keep: Kept | None = None,
    between: tuple[Limit, Limit] | None = None,
) -> Activation:
    """Quantise and dequantise a tensor, optionally with some entries kept in full precision.

    Args:
        x: A tensor.
        scheme: The scheme.
        keep: Entries that are left unchanged and excluded from the range.
        between: The range of a static scheme.

    Raises:
        UnsupportedError: If the scheme is static and no range is given.
    """
    if scheme.static and between is None:
        raise UnsupportedError(f"{scheme} takes its range from calibration texts; give some.")
    low, high = limits(x, scheme, keep) if between is None else between
    result = rounded(x, low, high, scheme)
    return result if keep is None else torch.where(keep, x, result)

"""Simulated quantisation: what a tensor becomes when it is stored with few bits and read again.

`Scheme` says how: the number format, over what a range is taken, and whether the range is that of
the tensor itself (dynamic) or of other text (static). `limits` takes the range, `rounded` rounds to
the grid that the range spans, `quantised` does both. Entries that are kept in full precision pass
unchanged and do not enter the range, as where a deployed quantiser stores them apart.

The grids, with [low, high] the range and b the bits:

* symmetric integers: x̂ = s · clamp(round(x / s), −n, n) with s = max(|low|, |high|) / n and
  n = 2^(b−1) − 1;
* asymmetric integers: x̂ = low + s · clamp(round((x − low) / s), 0, n) with s = (high − low) / n and
  n = 2^b − 1, the grid of KIVI (Liu et al. 2024, arXiv 2402.02750), which need not hold 0;
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
from sinkscope.validation import one_of, whole_number

BITS = {"int8": 8, "fp8": 8, "int4": 4, "int2": 2}
"""Bits of each number format."""
RANGES = ("tensor", "token", "channel", "group")
"""Over what a range is taken: a prompt's whole tensor, a token, a channel, some channels of one."""
_FP8_LARGEST = 448.0
_NOTHING = 2.0**-100  # a range below this is taken for 0, so that 1 / s stays finite
_GROUP = 64

Activation = Float[Tensor, "prompt position channel"]
Kept = Bool[Tensor, "_ _ _"]
"""Entries kept in full precision, to be broadcast to [prompt position channel]."""
Limit = Float[Tensor, "_ _ _"]


@dataclass(frozen=True)
class Scheme:
    """How a tensor is quantised.

    Attributes:
        format: "int8", "fp8" (e4m3), "int4" or "int2".
        per: Over what one range is taken: "tensor" (all tokens and channels of a prompt), "token",
            "channel" (all tokens of a prompt) or "group" (`group` neighbouring channels of a token;
            the last group may be smaller).
        symmetric: Whether the grid is symmetric about 0; fp8 always is.
        static: Whether the range is that of calibration texts; otherwise of the tensor itself.
        group: Channels of a group.

    Raises:
        UnsupportedError: If there is no such format or range, fp8 is to be asymmetric, or a static
            range is asked for of tokens or groups, which differ from text to text.
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
                "fp8 is symmetric about 0; choose an integer format, or no asym."
            )
        if self.static and self.per in ("token", "group"):
            raise UnsupportedError(
                f"A static range cannot be taken per {self.per}, since tokens differ from text to "
                "text; choose tensor or channel."
            )

    @classmethod
    def parse(cls, text: Any) -> Scheme:
        """A scheme from its name: FORMAT-RANGE, with -asym and -static where wanted.

        Args:
            text: Such as "int8-tensor", "int4-group32-asym" or "fp8-channel-static".

        Raises:
            UnsupportedError: If the name is not of that form, or as for the class.
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
                f"{text!r} is no scheme; expected FORMAT-RANGE such as int8-tensor, int4-token or "
                "int4-group64-asym, with -asym and -static where wanted."
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
        """Bits of a number."""
        return BITS[self.format]

    @property
    def whole_prompts(self) -> bool:
        """Whether a range is taken over all tokens of a prompt, padding too."""
        return not self.static and self.per in ("tensor", "channel")

    def __str__(self) -> str:
        per = f"group{self.group}" if self.per == "group" else self.per
        asymmetric = "" if self.symmetric else "-asym"
        return f"{self.format}-{per}{asymmetric}{'-static' if self.static else ''}"


def limits(x: Activation, scheme: Scheme, keep: Kept | None = None) -> tuple[Limit, Limit]:
    """The range that a dynamic scheme takes: the least and the largest entry.

    Args:
        x: A tensor.
        scheme: Over what the range is taken.
        keep: Entries that do not count.

    Returns:
        Two tensors that broadcast to `x`; 0 where no entry counts.
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
    """The nearest points of the grid that a range spans; what lies beyond it is clipped.

    Args:
        x: A tensor.
        low: Lower end of the range, to be broadcast.
        high: Upper end.
        scheme: The format, and whether the grid is symmetric.

    Returns:
        In the dtype of `x`.
    """
    exact = at_least_fp32(x)
    low, high = low.to(exact), high.to(exact)
    largest = torch.maximum(low.abs(), high.abs())
    if scheme.format == "fp8":
        step = largest / _FP8_LARGEST
        unit = (exact * step.reciprocal()).clamp(-_FP8_LARGEST, _FP8_LARGEST)
        found, empty = unit.to(torch.float8_e4m3fn).to(exact) * step, largest
    elif scheme.symmetric:
        n = 2 ** (scheme.bits - 1) - 1
        step = largest / n
        found, empty = (exact * step.reciprocal()).round().clamp(-n, n) * step, largest
    else:
        n = 2**scheme.bits - 1
        step = (high - low) / n
        found = ((exact - low) * step.reciprocal()).round().clamp(0, n) * step + low
        empty = high - low
    flat = torch.zeros_like(low) if scheme.symmetric else low
    return torch.where(empty < _NOTHING, flat, found).to(x.dtype)


def quantised(
    x: Activation,
    scheme: Scheme,
    keep: Kept | None = None,
    between: tuple[Limit, Limit] | None = None,
) -> Activation:
    """A tensor after it was stored by a scheme, with some entries kept in full precision.

    Args:
        x: A tensor.
        scheme: How it is stored.
        keep: Entries that stay as they are, and do not enter the range.
        between: The range of a static scheme.

    Raises:
        UnsupportedError: If the scheme is static and no range is given.
    """
    if scheme.static and between is None:
        raise UnsupportedError(f"{scheme} takes its range from calibration texts; give some.")
    low, high = limits(x, scheme, keep) if between is None else between
    found = rounded(x, low, high, scheme)
    return found if keep is None else torch.where(keep, x, found)

"""Arrays for the page: base64 of their bytes, and references that the page's script resolves."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np
from plotly.utils import PlotlyJSONEncoder

_TYPES = {"f": "float32", "i": "int32", "u": "int32", "b": "uint8"}
_BYTE = np.dtype("uint8")
_SHORT = 2**16  # whole numbers below it take two bytes


class Pack:
    """Arrays by name, each stored once, however many figures refer to it."""

    def __init__(self) -> None:
        self.arrays: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: np.ndarray) -> None:
        """Store an array, unless the name is already in use."""
        if name not in self.arrays:
            self.arrays[name] = packed(values)

    @staticmethod
    def ref(name: str, *at: str, take: str | None = None) -> dict[str, Any]:
        """Return the reference to an array that is used in a figure in its place.

        Args:
            name: of the array.
            at: what is chosen on the page along its first dimensions, such as "layer", "head".
            take: name of an array of indices into what is left.
        """
        return {"$array": name, "at": list(at), "take": take}


def packed(values: np.ndarray) -> dict[str, Any]:
    """An array as its little-endian bytes in base64: float32, int32, uint16 or uint8."""
    kind = "uint8" if values.dtype == _BYTE else _TYPES[values.dtype.kind]
    if kind == "int32" and values.size and 0 <= values.min() and values.max() < _SHORT:
        kind = "uint16"
    data = np.ascontiguousarray(values, dtype=np.dtype(kind).newbyteorder("<"))
    return {
        "dtype": kind,
        "shape": list(values.shape),
        "data": base64.b64encode(data.tobytes()).decode("ascii"),
    }


def script_json(value: Any) -> str:
    """JSON that is safe inside a script element, whatever text it contains.

    Everything beyond ASCII is escaped already; without "<" no text can end the element or open a
    comment in it.
    """
    text = json.dumps(value, cls=PlotlyJSONEncoder, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")

"""Settings of a scan: provenance for reproducing a report and deciding which may be merged."""

from __future__ import annotations

import dataclasses
import platform
import typing
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from typing import Any

from sinkscope.errors import ReportError
from sinkscope.validation import fits, shown

_LIBRARIES = ("sinkscope", "torch", "transformers", "transformer-lens")

# Settings that do not affect the meaning of the values: two reports that differ only in these may
# be merged. All others must agree.
_PROVENANCE = ("device", "attention", "seed", "length", "versions", "weights", "output", "hooks")


def library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that affect results, read without importing them.

    Returns:
        Library name (``transformer_lens`` with an underscore) to version; "" if not installed.
    """
    installed = {library.replace("-", "_"): _version(library) for library in _LIBRARIES}
    return {"python": platform.python_version()} | installed


@cache  # reading four files takes noticeable time in a short scan
def _version(library: str) -> str:
    try:
        return metadata.version(library)
    except metadata.PackageNotFoundError:
        return ""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Provenance of a report. Every field can be written as JSON.

    Attributes:
        model: name, hub id or path as the user gave it.
        revision: hub revision or hash of the weight file; "" if there is none.
        architecture: name of the model's class or family, for example "LlamaForCausalLM".
        dtype: the weights' dtype, for example "float32".
        device: where the model ran.
        source: source of the tokens, for example "prose".
        bos: BOS policy and its result, for example "auto (none)".
        length: number of positions of the longest prompt, BOS included (T).
        epsilon: threshold of `SinkReport.sink_rate`.
        sinks: the requested sink positions: "0", "0,255" or "auto".
        attention: attention path: "eager" or "streaming". Both are exact.
        causal: whether a query attends only to itself and earlier positions.
        windows: each layer's sliding window in positions; None for full attention.
        without_attention: layers without attention, or whose attention TransformerLens does not
            expose; fields of attention, values and heads are undefined (nan) there.
        metrics: the measured metrics.
        seed: seed of the texts and of the scan; None if merged reports differ.
        nulls_seed: seed of the nulls' draws.
        interventions: interventions active during the scan, outermost first.
        hooks: places with user hooks during the scan.
        weights: hash of all weights; "" in reports of earlier versions, which did not record it.
        output: hash of the model's output on a few tokens if user code is involved (a replaced
            ``forward``, a custom module); otherwise "".
        versions: see `library_versions`.
    """

    model: str
    architecture: str
    dtype: str
    device: str
    source: str
    bos: str
    length: int
    epsilon: float
    sinks: str
    attention: str
    causal: bool
    windows: tuple[int | None, ...]
    metrics: tuple[str, ...]
    n_layers: int
    n_heads: int
    n_kv_heads: int
    without_attention: tuple[int, ...] = ()
    revision: str = ""
    seed: int | None = 0
    nulls_seed: int = 0
    interventions: tuple[str, ...] = ()
    hooks: tuple[str, ...] = ()
    weights: str = ""
    output: str = ""
    versions: dict[str, str] = field(default_factory=library_versions)

    @property
    def attending(self) -> tuple[int, ...]:
        """The layers with attention."""
        return tuple(i for i in range(self.n_layers) if i not in self.without_attention)

    @property
    def heads_per_kv_head(self) -> int:
        """Size of the groups of adjacent query heads that share a KV head; 0 without attention."""
        return self.n_heads // max(self.n_kv_heads, 1)

    @property
    def windows_attended(self) -> tuple[int | None, ...]:
        """The sliding window of each layer with attention."""
        return tuple(self.windows[layer] if self.windows else None for layer in self.attending)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, ready for JSON."""
        plain = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in plain.items()
        }

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Settings:
        """Restore settings written by `to_dict`, also by earlier versions.

        Raises:
            ReportError: if a setting is not of its type.
        """
        plain = dict(plain)
        if "path" in plain:  # its name until 0.1
            words = plain.pop("path").split(", ")
            plain["attention"] = ", ".join("eager" if w == "stock" else w for w in words)
        kinds = typing.get_type_hints(cls)
        for name, value in plain.items():  # reports of earlier versions lack some
            if name not in kinds or not fits(value, kinds[name]):
                raise ReportError(
                    f"The settings of this report have {name} {shown(value)}, which no report has; "
                    "it is damaged."
                )
            if isinstance(value, list):
                plain[name] = tuple(value)
        return cls(**plain)

    def merge(self, other: Settings) -> Settings:
        """Merge the settings of two reports.

        Raises:
            ReportError: if a setting that affects the meaning of the values differs; the message
                names the first.
        """
        self._refuse_another_model(other)
        self._refuse_other(other, [name for name in self.to_dict() if name not in _PROVENANCE])
        made = [settings.versions.get("sinkscope", "") for settings in (self, other)]
        if made[0] != made[1]:
            raise ReportError(
                f"These reports cannot be merged because one is from sinkscope {made[0]} and the "
                f"other from {made[1]}; scan again with one version."
            )
        libraries = dict.fromkeys([*self.versions, *other.versions])
        return dataclasses.replace(
            self,
            device=_either(self.device, other.device),
            attention=_either(self.attention, other.attention),
            weights=self.weights or other.weights,
            seed=self.seed if self.seed == other.seed else None,
            length=max(self.length, other.length),
            versions={
                library: _either(self.versions.get(library, ""), other.versions.get(library, ""))
                for library in libraries
            },
        )

    def _refuse_other(self, other: Settings, names: Iterable[str]) -> None:
        """Refuse reports if one of these settings differs."""
        ours, theirs = self.to_dict(), other.to_dict()
        for name in names:
            if ours[name] != theirs[name]:
                raise ReportError(
                    f"These reports cannot be merged because their {name} differs: "
                    f"{ours[name]!r} and {theirs[name]!r}; merge only reports that were scanned "
                    "with the same settings."
                )

    def _refuse_another_model(self, other: Settings) -> None:
        """Refuse reports of models that may compute different results.

        Checked first, because other differences (a metric undefined under a hook) may follow from
        it.
        """
        if hooks := self.hooks or other.hooks:
            raise ReportError(
                f"These reports cannot be merged because user hooks were at "
                f"{', '.join(hooks[:3])} while one was measured, and it is unknown whether they "
                "were the same in the other; scan all texts at once."
            )
        self._refuse_other(other, ("model", "revision", "architecture", "dtype", "interventions"))
        if not (self.weights and other.weights):  # a report of an earlier version
            return
        if self.weights != other.weights:
            raise ReportError(
                f"These reports cannot be merged because {self.model} had different weights "
                "or module settings in each; scan both texts with one model."
            )
        if self.output != other.output:
            raise ReportError(
                f"These reports cannot be merged because {self.model} has the same weights in both "
                "but computes different results: a replaced forward or a custom module differs; "
                "scan both texts with one model, on one device."
            )


def _either(mine: str, theirs: str) -> str:
    """Both values joined, without duplicates and unknown ones."""
    both = [*mine.split(", "), *theirs.split(", ")]
    return ", ".join(value for value in dict.fromkeys(both) if value)

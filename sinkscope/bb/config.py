"""The settings of a model and of a training run, in two frozen dataclasses.

Every value is checked on construction, whether by a user or from a file.
"""

from __future__ import annotations

import dataclasses
import functools
import warnings
from dataclasses import dataclass, field
from typing import Any, TypeVar

from sinkscope.errors import ModelError
from sinkscope.validation import one_of, real_number, shown, whole_number

ATTENTIONS = (
    *("softmax", "relu", "sigmoid", "off-by-one"),
    *("learned-sink", "key-bias", "softpick", "gated"),
)
"""Kinds of attention; `sinkscope.bb.model.Attention` defines each."""

CLAMPS = ("values", "logits", "sink")
"""What can be clamped during training; see `sinkscope.bb.clamping`."""

LEARNING_RATES = {"adamw": 3e-4, "sgd": 3e-2, "muon": 3e-4}
OPTIMIZERS = tuple(LEARNING_RATES)

_RENAMED = "`hold` is now called `clamp`."
_T = TypeVar("_T")


@dataclass(frozen=True)
class ModelConfig:
    """The architecture of a toy model. The defaults are the paper's one-layer model.

    Attributes:
        layers: Number of blocks.
        heads: Heads per block.
        width: Dims of the residual stream, a multiple of `heads`.
        context: Longest sequence [tokens].
        vocab: Number of token ids, BOS and delimiter included.
        attention: One of `ATTENTIONS`.
        no_attention: Layers without attention (the paper's minimal structures).
        no_ffn: Layers without a feed-forward network.
        linear_ffn: Layers with a single matrix as their feed-forward network.
        no_norm: Leave out every LayerNorm. (The reference code's flag removes only the final one.)

    Raises:
        ModelError: If a value is invalid.
    """

    layers: int = 1
    heads: int = 1
    width: int = 256
    context: int = 256
    vocab: int = 67
    attention: str = "softmax"
    no_attention: tuple[int, ...] = ()
    no_ffn: tuple[int, ...] = ()
    linear_ffn: tuple[int, ...] = ()
    no_norm: bool = False

    def __post_init__(self) -> None:
        _check_at_least(1, self, "layers", "heads", "width", "context", "vocab")
        _check_at_least(0, self, "no_attention", "no_ffn", "linear_ffn", several=True)
        for name in ("no_attention", "no_ffn", "linear_ffn"):
            if any(layer >= self.layers for layer in getattr(self, name)):
                raise ModelError(
                    f"{name}={getattr(self, name)} names a layer outside 0 to {self.layers - 1}."
                )
        one_of("attention", self.attention, ATTENTIONS, ModelError)
        if not isinstance(self.no_norm, bool):
            raise ModelError(f"no_norm is {shown(self.no_norm)}; expected True or False.")
        if self.width % self.heads:
            raise ModelError(f"width {self.width} must be a multiple of the {self.heads} heads.")

    @property
    def d_head(self) -> int:
        """Dims of a head."""
        return self.width // self.heads


def _accepts_hold(cls: type[_T]) -> type[_T]:
    """Take `hold=`, the former name of `clamp`, with a warning."""
    make = cls.__init__

    @functools.wraps(make)
    def init(self: _T, *args: Any, **settings: Any) -> None:
        if "hold" in settings:
            warnings.warn(_RENAMED, DeprecationWarning, stacklevel=2)
            settings["clamp"] = settings.pop("hold")
        make(self, *args, **settings)

    cls.__init__ = init
    return cls


@_accepts_hold
@dataclass(frozen=True)
class TrainConfig:
    """A training run. The defaults are the paper's (one layer, AdamW, 10,000 steps).

    Attributes:
        model: The architecture.
        triggers: The task's triggers; see `BigramBackcopy`.
        bos: Number of BOS tokens; see `BigramBackcopy`.
        optimizer: "adamw", "sgd" (with momentum) or "muon".
        learning_rate: Constant learning rate; None for the optimiser's default (3e-4, SGD 3e-2).
        weight_decay: Weight decay of every optimiser.
        betas: β of AdamW.
        eps: ε of AdamW.
        momentum: Momentum of SGD.
        batch: Prompts per step.
        length: Tokens per prompt.
        steps: Optimiser steps.
        seed: Seed of the initial weights and the data.
        measure_every: Steps between two measurements (a few early ones are always taken).
        measure_prompts: Sequences in the fixed evaluation batch.
        save_every: Steps between two checkpoints.
        snapshots: Steps after which the weights are saved in separate files.
        precision: "fp32", "bf16" (autocast; weights and residual stream stay fp32), or "auto":
            bf16 on a GPU, fp32 on a CPU. Measurements are always fp32.
        compile: Use torch.compile; None: on a GPU only.
        clamp: What is clamped during training, some of `CLAMPS`; see `sinkscope.bb.clamping`.

    Raises:
        ModelError: If a value is invalid.
    """

    model: ModelConfig = field(default_factory=ModelConfig)
    triggers: int | tuple[int, ...] = 3
    bos: int = 1
    optimizer: str = "adamw"
    learning_rate: float | None = None
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.99)
    eps: float = 1e-8
    momentum: float = 0.9
    batch: int = 512
    length: int = 256
    steps: int = 10_000
    seed: int = 42
    measure_every: int = 100
    measure_prompts: int = 64
    save_every: int = 1000
    snapshots: tuple[int, ...] = ()
    precision: str = "auto"
    compile: bool | None = None
    clamp: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.model, ModelConfig):
            raise ModelError(f"model is {self.model!r}, it must be a ModelConfig.")
        _check_at_least(1, self, "batch", "length", "measure_every", "measure_prompts")
        _check_at_least(1, self, "save_every")
        _check_at_least(0, self, "steps", "seed", "bos")
        _check_at_least(0, self, "snapshots", several=True)
        _check_at_least(0, self, "triggers", several=not isinstance(self.triggers, int))
        one_of("optimizer", self.optimizer, OPTIMIZERS, ModelError)
        one_of("precision", self.precision, ("auto", "fp32", "bf16"), ModelError)
        if not isinstance(self.compile, bool | None):
            raise ModelError(f"compile is {shown(self.compile)}; expected True, False or None.")
        if not isinstance(self.clamp, tuple) or set(self.clamp) - set(CLAMPS):
            raise ModelError(f"clamp is {self.clamp!r}, it must name some of {', '.join(CLAMPS)}.")
        if self.length > self.model.context:
            raise ModelError(
                f"Sequences of {self.length} tokens do not fit a context of {self.model.context}."
            )
        for step in self.snapshots:
            if step > self.steps:
                raise ModelError(
                    f"snapshot {step} lies beyond the run's {self.steps} steps; leave it out, or "
                    "ask for more steps."
                )
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimizer])
        for name in ("learning_rate", "weight_decay", "eps", "momentum"):
            value = real_number(name, getattr(self, name), at_least=0, error=ModelError)
            object.__setattr__(self, name, value)
        if not isinstance(self.betas, tuple) or len(self.betas) != 2:
            raise ModelError(f"betas are {self.betas!r}, they must be two numbers.")
        for beta in self.betas:
            real_number("betas", beta, at_least=0, below=1, error=ModelError)

    @property
    def hold(self) -> tuple[str, ...]:
        """The former name of `clamp`."""
        warnings.warn(_RENAMED, DeprecationWarning, stacklevel=2)
        return self.clamp

    @classmethod
    def classroom(cls, **changes: Any) -> TrainConfig:
        """Return a one-layer run that forms a visible sink on two CPU cores in a few minutes."""
        small = ModelConfig(width=64, context=64)
        settings = {
            "model": small,
            "batch": 64,
            "length": 64,
            "steps": 2000,
            "learning_rate": 3e-3,
            "measure_every": 50,
        }
        return cls(**{**settings, **changes})

    @classmethod
    def from_dict(cls, stored: Any) -> TrainConfig:
        """Read a configuration from `dataclasses.asdict` or JSON; `hold` is read as `clamp`.

        Raises:
            ModelError: If it is not a configuration, or has unknown settings.
        """
        run = _settings(stored, cls, "configuration", renamed={"hold": "clamp"})
        if "model" in run:
            run["model"] = ModelConfig(**_settings(run["model"], ModelConfig, "model"))
        return cls(**run)

    def replace(self, **changes: Any) -> TrainConfig:
        """Return a copy with changed settings; `attention=`, `layers=` etc. apply to the model."""
        inner = {f.name for f in dataclasses.fields(ModelConfig)} & changes.keys()
        if inner:
            model = changes.pop("model", self.model)
            model = dataclasses.replace(model, **{name: changes.pop(name) for name in inner})
            changes["model"] = model
        if "optimizer" in changes and "learning_rate" not in changes:
            changes["learning_rate"] = None  # the new optimiser's default
        return dataclasses.replace(self, **changes)

    def measures_at(self, step: int) -> bool:
        """Whether the model is measured before this step: early, at regular steps, at the end."""
        return step in (0, 1, 2, 5, 10, 20, 50, self.steps) or step % self.measure_every == 0


def _check_at_least(
    least: int, config: ModelConfig | TrainConfig, *names: str, several: bool = False
) -> None:
    for name in names:
        value = getattr(config, name)
        if not several:
            checked = whole_number(name, value, at_least=least, error=ModelError)
        elif isinstance(value, tuple):
            checked = tuple(whole_number(name, n, at_least=least, error=ModelError) for n in value)
        else:
            raise ModelError(f"{name} is {shown(value)}; expected a tuple of whole numbers.")
        object.__setattr__(config, name, checked)


def _settings(
    stored: Any, of: type, what: str, renamed: dict[str, str] | None = None
) -> dict[str, Any]:
    """Return stored settings by their current names, with JSON's lists as tuples."""
    if not isinstance(stored, dict):
        raise ModelError(f"The {what} is {stored!r}, which is no object of settings.")
    former = renamed or {}
    settings: dict[str, Any] = {str(former.get(k, k)): value for k, value in stored.items()}
    if unknown := settings.keys() - {f.name for f in dataclasses.fields(of)}:
        raise ModelError(f"The {what} has a setting {min(unknown)!r}, which is not known.")
    return {name: tuple(v) if isinstance(v, list) else v for name, v in settings.items()}

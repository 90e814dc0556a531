"""What to build and how to train it: two frozen records that decide a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from sinkscope.attention.operators import ATTENTIONS
from sinkscope.errors import ModelError

LEARNING_RATES = {"adamw": 3e-4, "sgd": 3e-2, "muon": 3e-4}
OPTIMIZERS = tuple(LEARNING_RATES)


@dataclass(frozen=True)
class ModelConfig:
    """What to build. The defaults are the paper's one-layer model.

    Attributes:
        layers, heads, width, context: blocks, heads per block, residual dims, longest sequence.
        vocab: token ids, BOS and delimiter included.
        attention: one of `sinkscope.attention.operators.ATTENTIONS`.
        no_attention, no_ffn, linear_ffn: layers without attention, without feed-forward, or with
            one plain matrix for it (the paper's minimal structures).
        no_norm: leave out every LayerNorm. (The reference code's flag drops only the final one.)
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
        for name in ("no_attention", "no_ffn", "linear_ffn"):
            chosen = getattr(self, name)
            if any(not 0 <= layer < self.layers for layer in chosen):
                raise ModelError(f"{name}={chosen} names a layer outside 0 … {self.layers - 1}")
        if self.attention not in ATTENTIONS:
            raise ModelError(
                f"attention {self.attention!r} is not known, choose one of {', '.join(ATTENTIONS)}"
            )
        if self.width % self.heads:
            raise ModelError(f"width {self.width} must be a multiple of the {self.heads} heads")

    @property
    def d_head(self) -> int:
        """Dims of a head."""
        return self.width // self.heads


@dataclass(frozen=True)
class TrainConfig:
    """A whole run. The defaults are the paper's (its one-layer model, AdamW, 10,000 steps).

    Attributes:
        model: what to build.
        triggers, bos: the task; see `BigramBackcopy`.
        optimizer: "adamw", "sgd" (with momentum) or "muon".
        learning_rate: constant; None takes the optimiser's usual one (3e-4, SGD 3e-2).
        weight_decay, betas, eps, momentum: the optimiser's own.
        batch, length, steps: prompts per step, tokens per prompt, optimiser steps.
        seed: weights and data.
        measure_every: steps between two measurements (a few early ones are always taken).
        measure_prompts: sequences in the fixed evaluation batch.
        save_every: steps between two checkpoints.
        snapshots: steps whose weights are kept in files of their own.
        precision: "fp32", "bf16" (autocast; weights and residual stream stay fp32), or "auto":
            bf16 on a GPU, fp32 on a CPU. Measurements are always fp32.
        compile: use torch.compile; None: on a GPU only.
        hold: what to hold fixed while training; see `sinkscope.bb.holds`.
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
    hold: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_at_least(1, self, "batch", "length", "measure_every", "measure_prompts")
        _check_at_least(1, self, "save_every")
        _check_at_least(0, self, "steps", "seed", "bos")
        if self.optimizer not in OPTIMIZERS:
            raise ModelError(
                f"optimizer {self.optimizer!r} is not known, choose one of {', '.join(OPTIMIZERS)}"
            )
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ModelError(f"precision {self.precision!r} must be 'auto', 'fp32' or 'bf16'")
        if self.length > self.model.context:
            raise ModelError(
                f"sequences of {self.length} tokens do not fit a context of {self.model.context}"
            )
        if self.learning_rate is None:
            object.__setattr__(self, "learning_rate", LEARNING_RATES[self.optimizer])

    @classmethod
    def classroom(cls, **changes: Any) -> TrainConfig:
        """A one-layer model that grows a visible sink on two CPU cores in a few minutes."""
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
    def from_dict(cls, stored: dict[str, Any]) -> TrainConfig:
        """Undo `dataclasses.asdict`, also after a trip through JSON."""
        return cls(**{**_tuples(stored), "model": ModelConfig(**_tuples(stored["model"]))})

    def replace(self, **changes: Any) -> TrainConfig:
        """A copy with some fields changed; `attention=` and `layers=` reach into the model."""
        inner = {f.name for f in dataclasses.fields(ModelConfig)} & changes.keys()
        if inner:
            model = changes.pop("model", self.model)
            model = dataclasses.replace(model, **{name: changes.pop(name) for name in inner})
            changes["model"] = model
        if "optimizer" in changes and "learning_rate" not in changes:
            changes["learning_rate"] = None  # the usual one of the new optimiser
        return dataclasses.replace(self, **changes)

    def measures_at(self, step: int) -> bool:
        """Whether the model is measured before this step: early, at even spaces, and at the end."""
        return step in (0, 1, 2, 5, 10, 20, 50, self.steps) or step % self.measure_every == 0


def _check_at_least(least: int, config: ModelConfig | TrainConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if type(value) is not int or value < least:
            raise ModelError(f"{name} is {value!r}, it must be a whole number from {least}")


def _tuples(stored: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists only."""
    return {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}

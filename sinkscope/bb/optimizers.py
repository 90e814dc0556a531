"""PyTorch's optimisers for the comparison, and their state as tensors."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sinkscope.bb.config import OPTIMIZERS, TrainConfig
from sinkscope.errors import ModelError


@dataclass
class Optimizers:
    """One or two optimisers that share a model's parameters and step together."""

    parts: list[torch.optim.Optimizer]

    def step(self) -> None:
        """Update the parameters."""
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        """Clear the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole state as named tensors: `{optimiser}.{parameter}.{entry}`."""
        return {
            f"{i}.{parameter}.{entry}": torch.as_tensor(value)
            for i, part in enumerate(self.parts)
            for parameter, entries in part.state_dict()["state"].items()
            for entry, value in entries.items()
            if value is not None
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Restore the state that `tensors` returned."""
        states: list[dict[int, dict[str, Tensor]]] = [{} for _ in self.parts]
        for name, tensor in tensors.items():
            i, parameter, entry = name.split(".")
            states[int(i)].setdefault(int(parameter), {})[entry] = tensor
        for part, state in zip(self.parts, states, strict=True):
            groups = part.state_dict()["param_groups"]
            part.load_state_dict({"state": state, "param_groups": groups})


def make_optimizers(model: nn.Module, config: TrainConfig) -> Optimizers:
    """Build the optimiser of a configuration.

    `adamw` and `sgd` are the paper's. `muon` (Jordan et al. 2024, as in `torch.optim.Muon`) takes
    the blocks' matrices, with its updates scaled to AdamW's size so that one learning rate suits
    both, and AdamW takes embeddings, norms and the unembedding.

    Raises:
        ModelError: for an optimiser that is unknown or missing in this PyTorch.
    """
    rate = config.learning_rate
    if config.optimizer == "adamw":
        return Optimizers([_adamw(model.parameters(), config, rate)])
    if config.optimizer == "sgd":
        return Optimizers(
            [
                torch.optim.SGD(
                    model.parameters(),
                    lr=rate,
                    momentum=config.momentum,
                    weight_decay=config.weight_decay,
                )
            ]
        )
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ModelError(f"'muon' needs torch 2.9 or newer, this is {torch.__version__}")
        inside = {m.weight for m in model.layers.modules() if isinstance(m, nn.Linear)}
        muon = torch.optim.Muon(
            [p for p in model.parameters() if p in inside],
            lr=rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="match_rms_adamw",
        )
        outside = [p for p in model.parameters() if p not in inside]
        return Optimizers([muon, _adamw(outside, config, rate)])
    raise ModelError(f"optimizer {config.optimizer!r} is not known, choose one of {OPTIMIZERS}")


def _adamw(parameters: Iterable[Tensor], config: TrainConfig, rate: float) -> torch.optim.AdamW:
    parameters = list(parameters)
    return torch.optim.AdamW(
        parameters,
        lr=rate,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        fused=parameters[0].is_cuda,
    )

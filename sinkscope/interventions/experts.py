"""Ablate experts of a routed model: replace their outputs by zero or by their mean."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sinkscope.errors import TextError, UnsupportedError
from sinkscope.interventions.base import Intervention, check_indices, check_mode
from sinkscope.interventions.calibration import needs_calibration, run_through
from sinkscope.models.experts import Routing, experts_of, routed


class AblateExperts(Intervention):
    """Ablate experts: replace their output out_e in Σ_e w_e · out_e for every token sent to them.

    The router and the weights w_e of the other experts do not change, so that no other expert
    replaces an ablated one. Shared experts cannot be ablated.

    Args:
        model: A bridge.
        experts: (layer, expert) pairs.
        mode: "zero": out_e = 0, which corresponds to pruning in the source; or "mean": the
            mean of out_e over the non-padding tokens of the calibration texts that are sent to it.
        calibration: Texts for "mean"; they run immediately, on the model in its current state.

    Raises:
        UnsupportedError: If an expert does not exist, or the model's experts cannot be
            distinguished (see `sinkscope.models.experts.experts_of`).
        TextError: If no calibration token is sent to one of the experts.

    Source: Su et al. (2025), Unveiling Super Experts in Mixture-of-Experts Large Language Models,
    arXiv 2507.23279, who prune super experts.

    Examples:
        >>> with AblateExperts(model, [(1, 68), (2, 92)]):  # doctest: +SKIP
        ...     after = scan(model, texts)
    """

    def __init__(
        self,
        model: Any,
        experts: Iterable[tuple[int, int]],
        mode: str = "zero",
        *,
        calibration: Any = None,
    ) -> None:
        super().__init__(model)
        self.mode = check_mode(mode, ("zero", "mean"))
        self._routed = experts_of(model)
        self.experts = self._by_layer(experts)
        self.replacement: dict[int, Float[Tensor, "expert dim"]] = {}
        if mode == "mean":
            self.replacement = self._means(needs_calibration(mode, calibration))

    def _by_layer(self, experts: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
        grouped: dict[int, list[int]] = defaultdict(list)
        try:
            pairs = dict.fromkeys((layer, expert) for layer, expert in experts)
        except (TypeError, ValueError):
            raise UnsupportedError(
                "Experts should be (layer, expert) pairs, such as [(1, 68), (2, 92)]."
            ) from None
        for layer, expert in pairs:
            if layer not in self._routed:
                raise UnsupportedError(
                    f"Layer {layer!r} routes to no experts; those that do are "
                    f"{', '.join(map(str, self._routed))}."
                )
            check_indices(expert, self._routed[layer].count, "expert")
            grouped[layer].append(expert)
        if not grouped:
            raise UnsupportedError("No expert is named; name at least one (layer, expert) pair.")
        return dict(grouped)

    def _means(self, texts: Any) -> dict[int, Float[Tensor, "expert dim"]]:
        """Return the mean output of each expert over the non-padding tokens that are sent to it."""
        calls: dict[int, Routing] = {}
        total: dict[tuple[int, int], Tensor] = {}
        count: dict[tuple[int, int], int] = defaultdict(int)

        def listener(layer: int) -> Callable[..., None]:
            def listen(x: Tensor, batch: Any) -> None:
                real = batch.mask.flatten()
                for one in self._routed[layer].split(calls.pop(layer)):
                    if one.expert in self.experts[layer]:
                        kept = one.added[real[one.token]].float()
                        key = layer, one.expert
                        total[key] = total.get(key, 0) + kept.sum(0)
                        count[key] += len(kept)

            return listen

        chosen = {layer: self._routed[layer] for layer in self.experts}
        hooks = {self.caps.hook("resid_post", layer): listener(layer) for layer in chosen}
        with routed(self.model, chosen, calls.__setitem__):
            run_through(self.model, texts, hooks)
        for layer, experts in self.experts.items():
            for expert in experts:
                if not count[layer, expert]:
                    raise TextError(
                        f"No calibration token is sent to expert {expert} of layer {layer}, so it "
                        "has no mean output; give more or other texts."
                    )
        return {
            layer: torch.stack([total[layer, e] / count[layer, e] for e in experts])
            for layer, experts in self.experts.items()
        }

    def _begin(self, undo: ExitStack) -> None:
        self._follow_hooks(undo)
        for layer in self.experts:
            for remove in self._edit(layer):
                undo.callback(remove)

    def _edit(self, layer: int) -> list[Callable[[], None]]:
        """Set the weights of the ablated experts to zero; with "mean" add w_e times their mean."""
        one, ablated = self._routed[layer], self.experts[layer]
        owed: list[Tensor] = []

        def silence(expert: Tensor, weight: Tensor) -> Tensor:
            hit = expert[..., None] == torch.tensor(ablated, device=expert.device)
            if self.mode == "mean":
                owed[:] = [(weight[..., None] * hit).sum(1).float()]  # [token ablated]
            return weight.masked_fill(hit.any(-1), 0.0)

        def before(module: Any, args: Any, kwargs: Any) -> Any:
            owed.clear()  # left over from a pass that ended with an error
            return one.reweighted(args, kwargs, silence) if self._in_force() else None

        def after(module: Any, args: Any, output: Tensor) -> Tensor | None:
            if not owed:
                return None
            mean = owed.pop() @ self.replacement[layer].to(output.device)
            return (output.float() + mean).to(output.dtype)

        pre = one.module.register_forward_pre_hook(before, with_kwargs=True)
        post = one.module.register_forward_hook(after)
        return [pre.remove, post.remove]

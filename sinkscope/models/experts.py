"""Individual experts of a mixture of experts, computed from transformers' own modules.

transformers runs all experts of a block in one fused module, which receives the tokens, the experts
chosen by the router for each and their weights, and returns Σ_e w_e · out_e. Its parameters stack
the experts, so that no hook point carries a single one. `experts_of` finds these modules;
`Experts.split` recomputes neurons and output of every expert from the inputs of one call, and the
sum is compared with the output of that call. Nothing depends on the name of the architecture.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformer_lens.model_bridge.generalized_components.moe import MoEBridge

from sinkscope.errors import UnsupportedError
from sinkscope.models.anatomy import stacks_experts
from sinkscope.models.probe import evaluating, input_device, only_hooks, probe_tokens
from sinkscope.models.signals import close


class Routing(NamedTuple):
    """Inputs and output of one call of a block's experts.

    `token` runs over all positions of all prompts, prompt by prompt; `choice` over the experts to
    which a token is routed.
    """

    hidden: Float[Tensor, "token dim"]
    expert: Int[Tensor, "token choice"]
    weight: Float[Tensor, "token choice"]
    output: Float[Tensor, "token dim"]


class ExpertCall(NamedTuple):
    """One expert on the tokens routed to it.

    Attributes:
        expert: Index of the expert.
        token: Indices of the tokens.
        choice: Index of the expert among each token's choices.
        neurons: Input of its down-projection [activation].
        out: Output of its down-projection [activation].
        added: The summand before weighting: `out`, normalised in some models.
    """

    expert: int
    token: Int[Tensor, "routed"]
    choice: Int[Tensor, "routed"]
    neurons: Float[Tensor, "routed neuron"]
    out: Float[Tensor, "routed dim"]
    added: Float[Tensor, "routed dim"]


@dataclass(frozen=True)
class Experts:
    """The routed experts of one block.

    Attributes:
        layer: The block.
        module: transformers' fused module of all experts.
        parent: The module that calls it after routing; its output is the block's FFN output.
    """

    layer: int
    module: Any
    parent: nn.Module

    @property
    def count(self) -> int:
        """Number of experts."""
        return self.module.down_proj.shape[0]

    @property
    def n_neurons(self) -> int:
        """Number of neurons of one expert."""
        return self.module.down_proj.shape[1 if self.module.is_transposed else 2]

    def routing(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Routing:
        """Inputs and output of a call of the module."""
        hidden, expert, weight = self._bound(args, kwargs).args[1:]
        return Routing(hidden, expert, weight, output)

    def reweighted(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], new: Callable[[Tensor, Tensor], Tensor]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the call with the weights replaced by ``new(expert, weight)``."""
        bound = self._bound(args, kwargs)
        _, _, expert, weight = bound.arguments
        bound.arguments[weight] = new(bound.arguments[expert], bound.arguments[weight])
        return bound.args[1:], bound.kwargs

    def split(self, routing: Routing) -> Iterator[ExpertCall]:
        """Compute each expert that receives a token separately, in the module's dtype."""
        for expert in range(self.count):
            token, choice = (routing.expert == expert).nonzero(as_tuple=True)
            if len(token):
                neurons = self._neurons(routing.hidden[token], expert)
                out = self._linear("down_proj", neurons, expert)
                norm = getattr(self.module, "has_post_expert_norm", False)  # not in 5.17
                added = self.module.post_expert_norm(out) if norm else out
                yield ExpertCall(expert, token, choice, neurons, out, added)

    def contributions(
        self, expert: int, neurons: Float[Tensor, "row neuron"], dim: Int[Tensor, "row"]
    ) -> Float[Tensor, "row neuron"]:
        """Contribution of each neuron to one dim of its expert's output: a_n · W_down[n, dim].

        Args:
            expert: Index of the expert.
            neurons: Input of its down-projection.
            dim: Output dim for each row.
        """
        weight = self.module.down_proj[expert].detach()
        rows = weight.T[dim] if self.module.is_transposed else weight[dim]
        return neurons.float() * rows.float()

    def check(self, routing: Routing, total: Float[Tensor, "token dim"]) -> None:
        """Check that the weighted sum of the experts equals the module's output.

        Args:
            routing: The call.
            total: Σ_e w_e · out_e, float32.

        Raises:
            UnsupportedError: If they differ by more than rounding in the dtype.
        """
        half = routing.output.dtype in (torch.float16, torch.bfloat16)
        if not close(total, routing.output.float(), 3e-2 if half else 1e-5):
            raise UnsupportedError(
                f"The experts of block {self.layer}, computed one by one, do not add up to the "
                f"output of its {type(self.module).__name__}, so none can be measured exactly."
            )

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> inspect.BoundArguments:
        return inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs)

    def _neurons(self, hidden: Float[Tensor, "row dim"], expert: int) -> Tensor:
        if self.module.has_gate:
            return self.module._apply_gate(self._linear("gate_up_proj", hidden, expert))
        return self.module.act_fn(self._linear("up_proj", hidden, expert))

    def _linear(self, name: str, x: Tensor, expert: int) -> Tensor:
        weight = getattr(self.module, name)[expert]
        x = x.to(weight.dtype)
        y = x @ weight if self.module.is_transposed else F.linear(x, weight)
        return y + getattr(self.module, f"{name}_bias")[expert] if self.module.has_bias else y


def experts_of(model: Any) -> dict[int, Experts]:
    """The routed experts of a bridge by block index; blocks with a dense FFN are left out.

    Each block is tested on a few tokens: the FFN's output with the experts must equal its output
    without them plus theirs. Then Σ_e w_e · out_e is their contribution to the FFN's output, and
    the remainder (a shared expert) does not depend on them.

    Args:
        model: A TransformerBridge.

    Raises:
        UnsupportedError: If no block routes tokens to experts, or one does so in a different form.
    """
    name = model.cfg.architecture or type(model.original_model).__name__
    found = {
        layer: experts
        for layer, block in enumerate(model.blocks)
        if (experts := _find(layer, block, name)) is not None
    }
    if not found:
        raise UnsupportedError(_why_none(model, name))
    _check_additive(model, found)
    return found


@contextmanager
def routed(model: Any, experts: dict[int, Experts], hear: Callable[[int, Routing], None]) -> Any:
    """Within the context, call `hear(layer, routing)` for every call of a block's experts."""

    def listening(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            hear(layer, experts[layer].routing(args, kwargs, output))

        return hook

    with ExitStack() as undo:
        for layer, one in experts.items():
            handle = one.module.register_forward_hook(listening(layer), with_kwargs=True)
            undo.callback(handle.remove)
        yield


def _find(layer: int, block: nn.Module, name: str) -> Experts | None:
    """The module of a block that stacks its experts, or None."""
    stacks = {
        id(module): (path, module)
        for path, module in block.named_modules()
        if stacks_experts(module)
    }
    if not stacks:
        return None
    ((path, module), *others) = stacks.values()
    known = hasattr(module, "has_gate") and hasattr(module, "_apply_gate")
    arguments = len(inspect.signature(type(module).forward).parameters) == 4
    if others or not (known and arguments) or getattr(module, "_is_expert_parallel", False):
        raise UnsupportedError(
            f"The experts of {name} are a {type(module).__name__}, which is not called with "
            "tokens, experts and weights like transformers' fused experts, so individual experts "
            "cannot be computed."
        )
    if any(parameter.is_meta for parameter in module.parameters()):
        raise UnsupportedError(
            f"The experts of block {layer} of {name} are offloaded, so their weights cannot be "
            "read; load the model with all of its weights on devices."
        )
    while path.endswith("_original_component"):  # the bridge wraps the module itself
        path = path.rpartition(".")[0]
    return Experts(layer, module, block.get_submodule(path.rpartition(".")[0]))


def _why_none(model: Any, name: str) -> str:
    """Why no block has experts that can be computed one by one."""
    routed = [part for part in model.blocks.modules() if isinstance(part, MoEBridge)]
    if not routed:
        return (
            f"{name} has no mixture of experts: its FFNs are dense; choose a model with experts, "
            "such as Mixtral, Qwen-MoE, OLMoE, DeepSeek or gpt-oss."
        )
    kind = type(routed[0].original_component).__name__
    return (
        f"The experts of {name} are part of a {kind}, not one module that stacks their "
        "down-projections like transformers' fused experts, so individual experts cannot be "
        "computed."
    )


def _check_additive(model: Any, experts: dict[int, Experts]) -> None:
    """Check that each FFN's output is the sum of its experts' output and a term without them.

    Raises:
        UnsupportedError: If it is not, or the experts are not called exactly once.
    """
    calls: dict[int, list[Routing]] = {layer: [] for layer in experts}
    inputs: dict[int, tuple[Any, Any, Any]] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs[layer] = args, kwargs, _first(output)

        return hook

    aside = only_hooks(set(model.hook_dict.values()), (), lambda x, hook: None)
    with aside, evaluating(model), torch.no_grad():
        with ExitStack() as undo:
            for layer, one in experts.items():
                handle = one.parent.register_forward_hook(keep(layer), with_kwargs=True)
                undo.callback(handle.remove)
            undo.enter_context(routed(model, experts, lambda layer, x: calls[layer].append(x)))
            model(probe_tokens(model).to(input_device(model)), return_type=None)
        for layer, one in experts.items():
            if len(calls[layer]) != 1 or layer not in inputs:
                raise UnsupportedError(
                    f"The experts of block {layer} are called {len(calls[layer])} times in one "
                    "forward pass, expected once, so their contributions cannot be separated."
                )
            args, kwargs, output = inputs[layer]
            silence = one.module.register_forward_hook(lambda m, x, y: torch.zeros_like(y))
            try:
                rest = _first(one.parent(*args, **kwargs))
            finally:
                silence.remove()
            (call,) = calls[layer]
            one.check(call, _total(one, call))
            half = output.dtype in (torch.float16, torch.bfloat16)
            together = rest.float() + call.output.reshape(rest.shape).float()
            if not close(together, output.float(), 3e-2 if half else 1e-5):
                raise UnsupportedError(
                    f"The FFN of block {layer} does more with the output of its experts than add "
                    "it, so the contribution of each expert is not defined."
                )


def _total(experts: Experts, call: Routing) -> Float[Tensor, "token dim"]:
    total = call.output.new_zeros(call.output.shape, dtype=torch.float32)
    for one in experts.split(call):
        weight = call.weight[one.token, one.choice, None].float()
        total.index_add_(0, one.token, one.added.float() * weight)
    return total


def _first(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output

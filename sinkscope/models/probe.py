"""A tiny forward pass that records which hook points of a bridge fire, and their activations.

The names of hook points are not reliable: some never fire, and some carry other quantities than
their names suggest (a "score" that is already a probability, an "attention output" after the next
norm). Hook points are therefore verified on their actual activations.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from sinkscope.devices import ran_out_of_memory
from sinkscope.prompts.tokens import context_size

# -- names of the hook points that may carry a signal, and the results of the checks ---------------

B = "blocks.{layer}."
PATTERN = B + "attn.hook_pattern"
SCORES = B + "attn.hook_attn_scores"
QUERY_KEY = (
    (B + "attn.hook_rot_q", B + "attn.hook_rot_k"),
    (B + "attn.hook_q", B + "attn.hook_k"),
)
VALUE, Z = B + "attn.hook_v", B + "attn.hook_z"
GATES = (B + "attn.hook_gate", B + "attn.hook_q_gate", B + "attn.gate.hook_out")
RESID_PRE, RESID_POST = B + "hook_resid_pre", B + "hook_resid_post"
# A block of GPT-1 returns a list, at which hook_resid_post does not fire; it ends in this norm.
BLOCK_OUT = (RESID_POST, B + "ln2.hook_out")
# On BERT hook_attn_out is the state after the next norm; the attention output is that of attn.o.
PROJECTED = B + "attn.o.hook_out"
ATTN_OUT = (B + "hook_attn_out", PROJECTED)
# Outputs of the modules in place of attention in the other layers of a hybrid model.
MIXER_OUT = (
    *(B + "hook_attn_out", B + "linear_attn.hook_out", B + "mixer.hook_out", B + "conv.hook_out"),
)
MLP_OUT = (B + "hook_mlp_out", B + "mlp.out.hook_out")
LN1_IN, LN1_OUT, LN2_IN = B + "ln1.hook_in", B + "ln1.hook_out", B + "ln2.hook_in"
# Multi-head latent attention: the latent before and after its norm, and its projection.
LATENT, NORMED_LATENT = B + "attn.kv_a_layernorm.hook_in", B + "attn.hook_kv_latent"
LATENT_NORM_OUT = B + "attn.kv_a_layernorm.hook_out"
UP_IN, UP_OUT = B + "attn.kv_b_proj.hook_in", B + "attn.kv_b_proj.hook_out"
NEURONS, DOWN_IN = B + "mlp.hook_post", B + "mlp.out.hook_in"

CANDIDATES = (
    *(PATTERN, SCORES, *QUERY_KEY[0], *QUERY_KEY[1], VALUE, Z, *GATES),
    *(RESID_PRE, *BLOCK_OUT, *ATTN_OUT, *MIXER_OUT, *MLP_OUT),
    *(LN1_IN, LN1_OUT, LN2_IN, NEURONS, DOWN_IN),
    *(LATENT, NORMED_LATENT, LATENT_NORM_OUT, UP_IN, UP_OUT),
)
"""Templates of all hook points that may carry a signal or serve to check one."""


@dataclass
class Findings:
    """Results of the checks.

    Attributes:
        scales: The factor on q·k in each layer with attention.
        stock_differs: How the unmodified bridge deviates from the model, or None.
        signals: Signal name to hook template, for the signals that passed.
        elsewhere: The same in layers without attention, for signals on another hook point there.
        reasons: Signal name to the reason why it is not available.
        softmax: Whether the pattern is a softmax of the scores, of which a term that is not a key
            (a learned sink, a key bias without value, off-by-one) may take a share.
        gated: Whether a gate multiplies the weighted sum of values before it becomes ``z``.
        gate: Activation that maps the hook of the signal "gate" to the gate's factors, a name in
            `metrics.gates.ACTIVATIONS`, or None.
    """

    scales: tuple[float, ...]
    stock_differs: str | None = None
    signals: dict[str, str] = field(default_factory=dict)
    elsewhere: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    softmax: bool = True
    gated: bool = False
    gate: str | None = None

    def accept(self, **hooks: str) -> None:
        """Record the hooks of signals that passed."""
        self.signals |= hooks

    def reject(self, reason: str, *signals: str) -> None:
        """Record the reason why signals are not available."""
        self.reasons |= dict.fromkeys(signals, reason)


PROBE_LENGTH = 12
"""Positions of the probe: enough for patterns to differ, and longer than a tiny model's window.

Models with a shorter context are probed with their full context.
"""


@dataclass(frozen=True)
class Probe:
    """Hook points that fired in a forward pass over the probe's tokens.

    Attributes:
        tokens: Two prompts that differ only in their last token.
        fired: How often each hook point fired; every alias of a hook point is listed.
        kept: The tensors of the requested hook points, float32 on the CPU.
    """

    tokens: Int[Tensor, "prompt position"]
    fired: Counter[str]
    kept: dict[str, Tensor]

    def layers(self, template: str, layers: Iterable[int]) -> list[Tensor] | None:
        """The tensor at ``template`` in each of the given layers.

        Args:
            template: Hook name with ``{layer}`` in place of the block's index.
            layers: Indices of the blocks.

        Returns:
            One tensor per layer, or ``None`` unless the hook fired exactly once in each of them.
        """
        names = [template.format(layer=layer) for layer in layers]
        if any(self.fired[name] != 1 or name not in self.kept for name in names):
            return None
        return [self.kept[name] for name in names]


def probe(bridge: Any, wanted: Callable[[str], bool]) -> Probe:
    """Run the bridge once on a few tokens and record the hook points that fire.

    The caller's hooks are temporarily removed, except permanent ones, which are part of the model.

    Args:
        bridge: A TransformerBridge.
        wanted: Whether to record the tensor at the hook point of this name.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, point in bridge.hook_dict.items():
        names.setdefault(point, []).append(name)
    tokens = probe_tokens(bridge)
    result = Probe(tokens, Counter(), {})

    def record(activation: Any, hook: Any) -> None:
        for name in names[hook]:
            result.fired[name] += 1
            if isinstance(activation, Tensor) and name not in result.kept and wanted(name):
                result.kept[name] = activation.detach().float().cpu().clone()

    # no_grad instead of inference_mode: buffers that the model caches on its first call would
    # otherwise be inference tensors, unusable in a later training step.
    with only_hooks(names, names, record), evaluating(bridge), torch.no_grad():
        bridge(tokens.to(input_device(bridge)), return_type="logits")
    return result


def fails_without_cache(bridge: Any) -> str | None:
    """The error of TransformerLens in a forward pass without KV cache, as in a scan; or None.

    Some of its attention then combines float32 weights with half-precision values.
    """
    backbone = getattr(bridge.original_model, "base_model", None)
    if backbone is None:
        return None
    aside = only_hooks(set(bridge.hook_dict.values()), (), lambda x, hook: None)
    with aside, evaluating(bridge), torch.no_grad():
        try:
            backbone(input_ids=probe_tokens(bridge).to(input_device(bridge)), use_cache=False)
        except RuntimeError as error:
            if ran_out_of_memory(error):
                raise
            return str(error).splitlines()[0]
    return None


def input_device(model: Any) -> torch.device:
    """Device of the first weight of a bridge or transformers model, where token ids belong.

    Later layers may be on others. A bridge's ``cfg.device`` is where it was loaded, and it may have
    been moved since.
    """
    return next(getattr(model, "original_model", model).parameters()).device


def probe_tokens(model: Any, at_least: int = 0) -> Int[Tensor, "prompt position"]:
    """Two prompts of distinct, ordinary ids; the second differs only in its last token.

    Args:
        model: A bridge, or a transformers model.
        at_least: Minimum number of positions, if more than usual are needed.
    """
    if hasattr(model, "cfg"):
        vocabulary, context = model.cfg.d_vocab, context_size(model)
    else:
        config = model.config.get_text_config()
        vocabulary = config.vocab_size
        context = getattr(config, "max_position_embeddings", None)
    length = max(PROBE_LENGTH, at_least)
    length = min(length, context or length)
    # Special ids are at the ends of a vocabulary, so use the middle half.
    ids = torch.linspace(vocabulary // 4, 3 * vocabulary // 4, length + 1).long()
    return torch.stack([ids[:-1], torch.cat([ids[:-2], ids[-1:]])])


@contextmanager
def only_hooks(
    points: Iterable[Any], hooked: Iterable[Any], hook: Callable[[Any, Any], Any]
) -> Iterator[None]:
    """Temporarily replace the caller's hooks on ``points`` by ``hook`` on those in ``hooked``."""
    aside = [(point, point.fwd_hooks, point._forward_hooks) for point in points]
    try:
        for point, handles, functions in aside:
            point.fwd_hooks = [handle for handle in handles if handle.is_permanent]
            permanent = {handle.hook.id for handle in point.fwd_hooks}
            point._forward_hooks = OrderedDict(
                (key, function) for key, function in functions.items() if key in permanent
            )
        for point in hooked:
            point.add_hook(hook)
        yield
    finally:
        for point, handles, functions in aside:
            point.fwd_hooks, point._forward_hooks = handles, functions


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set eval mode within the context; the mode of every module is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    if training:  # calling eval() on a large model takes tens of milliseconds
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True

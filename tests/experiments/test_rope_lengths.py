"""Frequencies that depend on the length of the batch: every prompt's numbers are those of it alone.

Compared with transformers' own eager forward pass over each prompt alone, from a fresh model.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.partial_forward import Partway, PromptLosses
from sinkscope.interventions.calibration import mean_at, mean_output
from sinkscope.models.load import load_model
from sinkscope.prompts.texts import as_texts
from tests.families.architectures import BY_NAME

PROMPTS = [list(range(3, 3 + length)) for length in (5, 30, 8, 20)]
LONG = {
    "longrope": dict(
        original_max_position_embeddings=8,
        short_factor=[1.0] * 4,
        long_factor=[4.0, 3.0, 2.0, 8.0],
        factor=4.0,
    ),
    "dynamic": dict(factor=4.0),
}


def build(kind: str) -> Any:
    family = BY_NAME["phi3" if kind == "longrope" else "llama"]
    rope = dict(rope_type=kind, rope_theta=1e4, **LONG[kind])
    settings: dict[str, Any] = dict(rope_parameters=rope)
    if kind == "longrope":
        settings["original_max_position_embeddings"] = 8
    else:
        settings["max_position_embeddings"] = 8
    made = type(family)(family.name, family.model_class, family.settings | settings).build()
    made.set_attn_implementation("eager")
    return made


def bridged(kind: str) -> Any:
    bridge = load_model(build(kind))
    bridge.cfg.n_ctx = 64
    return bridge


def alone(kind: str, head: int | None = None) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """Each prompt alone, perhaps without a head of the first layer.

    Returns:
        The loss of each prompt, the outputs of its heads in the last layer [position head d_head],
        and the residual stream after the last block [position channel].
    """
    losses, outputs, states = [], [], []
    for prompt in PROMPTS:
        model = build(kind)
        size = model.config.hidden_size // model.config.num_attention_heads
        first, last = model.model.layers[0], model.model.layers[-1]

        def cut(module: Any, args: Any, size: int = size) -> Any:
            assert head is not None
            z = args[0].clone()
            z[..., head * size : (head + 1) * size] = 0
            return (z,)

        def keep_z(module: Any, args: Any, size: int = size) -> None:
            outputs.append(args[0][0].unflatten(-1, (-1, size)))

        def keep_state(module: Any, args: Any, output: Any) -> None:
            states.append((output[0] if isinstance(output, tuple) else output)[0])

        if head is not None:
            first.self_attn.o_proj.register_forward_pre_hook(cut)
        last.self_attn.o_proj.register_forward_pre_hook(keep_z)
        last.register_forward_hook(keep_state)
        ids = torch.tensor([prompt])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, :-1]
        losses.append(torch.nn.functional.cross_entropy(logits, ids[0, 1:]))
    return torch.stack(losses), outputs, states


@pytest.mark.parametrize("kind", LONG)
def test_losses_and_ablated_losses(kind: str) -> None:
    wanted, without = alone(kind)[0], alone(kind, head=1)[0]
    found = ablate_heads(bridged(kind), PROMPTS, heads=[(0, 1)], progress=False)
    torch.testing.assert_close(found.loss, wanted, atol=1e-5, rtol=0)
    torch.testing.assert_close(found.ablated_loss[:, 0, 1], without, atol=1e-5, rtol=0)
    assert (without - wanted).abs().min() > 1e-4
    bridge = bridged(kind)
    partway = Partway(bridge)
    with partway.opened():
        losses = PromptLosses(partway, as_texts(PROMPTS).tokenize(bridge).right_padded())()
    torch.testing.assert_close(losses, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", LONG)
def test_calibration(kind: str) -> None:
    bridge = bridged(kind)
    _, outputs, states = alone(kind)
    hook = f"blocks.{len(bridge.blocks) - 1}.attn.hook_z"
    found = mean_output(bridge, PROMPTS, [hook])[hook]
    torch.testing.assert_close(found, torch.cat(outputs).mean(dim=0), atol=1e-5, rtol=0)
    last = f"blocks.{len(bridge.blocks) - 1}.hook_resid_post"
    found = mean_at(bridge, PROMPTS, last, (4,))[0]
    wanted = torch.stack([state[4] for state in states]).mean(dim=0)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)

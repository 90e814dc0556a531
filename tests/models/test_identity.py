"""What identifies a model: every weight, every setting, and what it computes."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama import modeling_llama

from sinkscope.capture.scan import scan
from sinkscope.errors import ReportError
from sinkscope.interventions import SelfOnlyMask
from sinkscope.models.load import load_model
from sinkscope.models.provenance import _bits, model_identity
from tests.families.architectures import BY_NAME

from .files import TOKENS, tiny_llama
from .test_proved import assert_measured


def edit_one_weight(model: Any) -> None:
    """The last of its row: a hash of the first columns would miss it."""
    model.model.layers[1].mlp.down_proj.weight.data[5, -1] += 1e-3


def edit_a_row_that_no_probe_reads(model: Any) -> None:
    model.model.embed_tokens.weight.data[3] *= 1.5


def swap_signs(model: Any) -> None:
    """Two sign bits that a sum of words would cancel."""
    weight = model.model.layers[0].self_attn.q_proj.weight.data
    weight[0, 1], weight[0, 3] = -weight[0, 1], -weight[0, 3]


def swap_two_layers(model: Any) -> None:
    layers = model.model.layers
    layers[0].mlp, layers[1].mlp = layers[1].mlp, layers[0].mlp


def change_epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 1e-2


def hook_a_module(model: Any) -> None:
    model.model.layers[0].mlp.register_forward_hook(lambda module, args, output: output * 1.001)


def put_in_a_module(model: Any) -> None:
    class Half(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.silu(x) / 2

    model.model.layers[1].mlp.act_fn = Half()


def replace_a_forward(model: Any) -> None:
    mlp = model.model.layers[0].mlp
    whole = mlp.forward
    mlp.forward = lambda x: whole(x) * 1.001


def bind_a_forward(model: Any) -> None:
    norm = model.model.layers[1].input_layernorm
    norm.forward = types.MethodType(lambda self, x: type(self).forward(self, x) * 1.001, norm)


EDITS = [
    edit_one_weight,
    edit_a_row_that_no_probe_reads,
    swap_signs,
    swap_two_layers,
    change_epsilon,
    hook_a_module,
    put_in_a_module,
    replace_a_forward,
    bind_a_forward,
]


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_model_is_another(edit: Callable[[Any], None]) -> None:
    model = tiny_llama()
    identity = model_identity(model)
    assert model_identity(tiny_llama()) == identity == model_identity(copy.deepcopy(model))
    edit(model)
    assert model_identity(model) != identity


@pytest.mark.parametrize("name", ["LlamaMLP.forward", "apply_rotary_pos_emb"])
def test_code_replaced_in_the_library_is_seen_and_measured(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As optimised kernels are put in: for a class, or for a function of its file."""
    model = tiny_llama()
    identity, before = model_identity(model), scan(model, TOKENS, progress=False)
    owner = functools.reduce(getattr, name.split(".")[:-1], modeling_llama)
    original = getattr(owner, name.rpartition(".")[2])

    @functools.wraps(original)  # says that it comes from transformers
    def other(*args: Any, **options: Any) -> Any:
        found = original(*args, **options)
        return found * 0.5 if isinstance(found, torch.Tensor) else (found[0] * 2, *found[1:])

    monkeypatch.setattr(owner, name.rpartition(".")[2], other)
    assert model_identity(model) != identity
    now = scan(model, TOKENS, progress=False)
    assert_measured(model)
    assert not now.equals(before)
    with pytest.raises(ReportError, match="a replaced forward"):
        before.merge(now)
    monkeypatch.undo()
    assert model_identity(model) == identity
    assert scan(model, TOKENS, progress=False).equals(before)


def test_a_method_at_the_address_of_the_last_one_is_another() -> None:
    model = tiny_llama()
    mlp = model.model.layers[0].mlp
    identities = set()
    for factor in (0.5, 0.3, 0.2):
        f = functools.partial(lambda x, factor, self: type(self).forward(self, x) * factor)
        mlp.forward = types.MethodType(lambda self, x, by=factor, f=f: f(x, by, self), mlp)
        assert_measured(model)
        identities.add(model_identity(load_model(model)))
        del mlp.forward
    assert len(identities) == 3


def test_hooks_of_a_bridge_count_and_a_scan_leaves_it_the_same() -> None:
    bridge = load_model(tiny_llama())
    identity = model_identity(bridge)
    scan(bridge, TOKENS, progress=False)
    assert model_identity(bridge) == identity
    with bridge.hooks(fwd_hooks=[("blocks.0.attn.hook_z", lambda x, hook: x * 0.5)]):
        assert model_identity(bridge) != identity
    with SelfOnlyMask(bridge, position=15):  # beyond the usual probe
        assert model_identity(bridge) != identity
    bridge.add_hook("blocks.1.hook_mlp_out", lambda x, hook: x * 0.5, is_permanent=True)
    assert model_identity(bridge) != identity


def test_a_processed_bridge_is_not_the_raw_one() -> None:
    raw, processed = load_model(BY_NAME["gpt2"].build()), load_model(BY_NAME["gpt2"].build())
    assert model_identity(raw) == model_identity(processed)
    processed.enable_compatibility_mode(disable_warnings=True)
    assert model_identity(raw) != model_identity(processed)


def test_a_model_that_does_not_run_equals_nothing() -> None:
    model = tiny_llama()

    def fail(module: nn.Module, args: Any) -> None:
        raise ValueError("not on these tokens")

    model.model.register_forward_pre_hook(fail)
    assert model_identity(model) != model_identity(model)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.uint8])
def test_every_bit_counts_whatever_the_layout(dtype: torch.dtype) -> None:
    x = torch.randint(0, 100, (301, 257)).to(dtype)
    assert _bits(x.T.contiguous().T) == _bits(x) == _bits(x.clone())
    raw = x.clone().view(torch.uint8)
    for at in (0, raw.numel() // 2, raw.numel() - 1):
        flipped = raw.clone()
        flipped.view(-1)[at] ^= 128
        assert _bits(flipped.view(dtype)) != _bits(x)

"""A replica computes what its model does, with weights of its own, adapters and edits included."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import sinkscope as ss
from sinkscope.errors import ModelError
from sinkscope.models.provenance import model_identity, probe_logits
from sinkscope.models.replicas import further_devices, replicas
from tests.families.architectures import BY_NAME

CPU = torch.device("cpu")


def numbers(bridge) -> list[torch.Tensor]:
    """Every weight and buffer."""
    modules = bridge.original_model.modules()
    return [
        x for m in modules for x in (*m._parameters.values(), *m._buffers.values()) if x is not None
    ]


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "mixtral", "bloom", "deepseek_v3"])
def test_a_replica_stands_alone(name: str) -> None:
    """Nothing in it reaches back: it computes the same when the model's numbers are gone."""
    model = ss.load_model(BY_NAME[name].build())
    logits, identity = probe_logits(model), model_identity(model)
    (copied,) = replicas(model, [CPU])
    theirs = {x.data_ptr() for x in numbers(copied)}
    assert not theirs & {x.data_ptr() for x in numbers(model)}
    assert not set(copied.original_model.modules()) & set(model.original_model.modules())
    assert model_identity(copied) == identity
    with torch.no_grad():
        for x in numbers(model):
            x.fill_(0) if x.is_floating_point() else x.zero_()
    assert torch.equal(probe_logits(copied), logits)
    assert not torch.equal(probe_logits(model), logits)


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_tokens_go_to_the_weights(name: str) -> None:
    """A bridge's own note of its device is that of where it was loaded, and may be out of date."""
    model = ss.load_model(BY_NAME[name].build())
    want = ss.scan(model, BY_NAME[name].tokens(), progress=False)
    (copied,) = replicas(model, [CPU])
    copied.cfg.device = "cuda:7"
    got = ss.scan(copied, BY_NAME[name].tokens(), progress=False)
    assert got.equals(want)


def test_tied_weights_stay_tied() -> None:
    model = ss.load_model(BY_NAME["gpt2"].build())
    (copied,) = replicas(model, [CPU])
    counts = [len({id(p) for p in one.original_model.parameters()}) for one in (model, copied)]
    assert counts[0] == counts[1]


class Doubled(nn.Module):
    """A module of one's own in the place of a projection."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside
        self.more = nn.Parameter(torch.full((1,), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.more * self.inside(x)


def test_edited_weights_and_modules_of_ones_own_come_along() -> None:
    plain = BY_NAME["llama"].build()
    before = probe_logits(ss.load_model(BY_NAME["llama"].build()))
    plain.model.layers[0].mlp.down_proj = Doubled(plain.model.layers[0].mlp.down_proj)
    model = ss.load_model(plain)
    with torch.no_grad():
        plain.model.layers[1].self_attn.q_proj.weight *= 3  # after the bridge was made
    (copied,) = replicas(model, [CPU])
    assert torch.equal(probe_logits(copied), probe_logits(model))
    assert (probe_logits(copied) - before).abs().max() > 1e-3
    tokens = BY_NAME["llama"].tokens(prompts=2)
    ask = dict(metrics="core", batch=1, progress=False)
    assert ss.scan(plain, tokens, devices=["cpu", "cpu"], **ask).equals(
        ss.scan(plain, tokens, **ask)
    )


def test_a_forward_that_holds_on_to_the_original_is_refused() -> None:
    """The copy would run the original's module, here with the numbers that it has then."""
    plain = BY_NAME["llama"].build()
    calls = []
    original = plain.model.norm.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return original(x) * len(calls)

    plain.model.norm.forward = forward
    model = ss.load_model(plain)
    with pytest.raises(ModelError, match="computes something else than the model"):
        replicas(model, [CPU])


def test_a_model_on_several_devices_is_refused() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    model.original_model.model.norm.register_parameter(
        "elsewhere", nn.Parameter(torch.empty(1, device="meta"))
    )
    with pytest.raises(ModelError, match="spread over several devices"):
        further_devices(model, [CPU, CPU])

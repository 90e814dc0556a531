"""A model that accelerate has spread out, as `device_map` does: its modules' own hooks must run.

There is one device here, and the disk: blocks whose weights lie there hold none of their own, and
fail in whatever goes past the `forward` of their modules.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import dispatch_model
from transformer_lens.model_bridge import TransformerBridge

import sinkscope as ss
from sinkscope.errors import UnsupportedError
from sinkscope.experiments.ablation import ablate_heads

from .architectures import BY_NAME, Family

NAMES = ["llama", "mistral", "gemma2", "gpt2", "gpt_neox", "bert"]
THROUGH_OUTPUT = {"head_output_norm_out", "honor_out", "value_norm_out", "value_drain_out"}


def spread_out(family: Family, folder: Path) -> TransformerBridge:
    """A family's tiny model as a bridge: the first block in memory, the others on disk."""
    original = family.build()
    weighty = (name for name, module in original.named_modules() if module._parameters)
    block = f"{family.parts.blocks}."
    places = {name: "cpu" for name in weighty}
    for name in places:
        if name.startswith(block) and not name.startswith(f"{block}0."):
            places[name] = "disk"
    original = dispatch_model(
        original, places, main_device="cpu", offload_dir=folder, force_hooks=True
    )
    assert {weight.device.type for weight in original.parameters()} == {"cpu", "meta"}
    return ss.load_model(original)


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("name", NAMES)
def test_a_scan_is_that_of_the_model_in_one_place(name: str, path: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = spread_out(family, tmp_path)
    whole = ss.load_model(family.build(), device="cpu")
    tokens = family.tokens()
    want = ss.scan(whole, tokens, attention=path, progress=False)
    got = ss.scan(model, tokens, attention=path, progress=False)
    assert set(want.measured()) - set(got.measured()) <= THROUGH_OUTPUT
    for field in got.measured():
        torch.testing.assert_close(got[field], want[field], equal_nan=True)
    with pytest.raises(UnsupportedError, match="weights are offloaded"):
        ss.scan(model, tokens, attention=path, metrics=["through_output"], progress=False)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_interventions_and_removal_are_too(name: str, tmp_path: Path) -> None:
    family = BY_NAME[name]
    model = spread_out(family, tmp_path)
    whole = ss.load_model(family.build(), device="cpu")
    tokens = family.tokens()
    found = []
    for one in (model, whole):
        with ss.SelfOnlyMask(one, position=5):
            masked = ss.scan(one, tokens, metrics="core", progress=False).sink_attention
        found.append((masked, ablate_heads(one, tokens, "zero", progress=False).ablated_loss))
    torch.testing.assert_close(found[0], found[1])


def test_learned_sinks_that_are_not_there_are_refused(tmp_path: Path) -> None:
    model = spread_out(BY_NAME["gpt_oss"], tmp_path)
    with pytest.raises(UnsupportedError, match="learned sinks of GptOssAttention are offloaded"):
        ss.scan(model, BY_NAME["gpt_oss"].tokens(), progress=False)

"""Spikes of tiny hybrids against transformers' eager attention and hidden states, by loops."""

from __future__ import annotations

import json
from itertools import pairwise
from unittest import mock

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope import families
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.spikes import spikes
from sinkscope.families import tiny_model

THIRD = ["linear_attention", "linear_attention", "full_attention"] * 2
HYBRIDS: dict[str, tuple[dict, tuple[int, ...]]] = {
    "Qwen3_5ForCausalLM": ({"num_hidden_layers": 6, "layer_types": THIRD}, (2, 5)),
    "Lfm2ForCausalLM": ({"num_hidden_layers": 6, "full_attn_idxs": [2, 5]}, (2, 5)),
    "JambaForCausalLM": ({"attn_layer_period": 2, "attn_layer_offset": 1}, (1, 3)),
}


def build(name: str):
    with mock.patch.dict(families.OWN, {name: HYBRIDS[name][0]}):
        return tiny_model(name)


def tokens(prompts: int = 3, length: int = 14) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(4, 97, (prompts, length), generator=generator)


def by_hand(name: str, ids: torch.Tensor) -> tuple[np.ndarray, list[int], list[float], list[float]]:
    """Largest |a| [layer position], sinks, alignment and retention of one prompt."""
    model, states, attending = build(name), [], HYBRIDS[name][1]
    for block in model.model.layers:
        block.register_forward_hook(
            lambda m, x, y: states.append(y[0] if isinstance(y, tuple) else y)
        )
    with torch.no_grad():
        patterns = model(ids[None], output_attentions=True).attentions
    value = np.array(
        [state.reshape(len(ids), -1).abs().max(-1).values.tolist() for state in states]
    )
    n, sinks = len(ids), []
    for pattern in (p for p in patterns if p is not None):
        scores = [float(pattern[0, :, k + 1 :, k].mean()) for k in range(n - 1)]
        sinks.append(int(np.argmax(scores)))
    aligned, previous = [], -1
    for at, sink in zip(attending, sinks, strict=True):
        block = value[previous + 1 : at, sink]
        aligned.append(float(block[-1] == max(block)))
        previous = at
    most = max(sinks, key=sinks.count)
    kept = []
    for left, right in pairwise(attending):
        least = min(value[left - 1, most], value[right - 1, most])
        between = [x for x in range(left, right - 1) if x not in attending]
        kept += [np.mean([min(1, value[x, most] / least) for x in between])] if between else []
    return value, sinks, aligned, kept


@pytest.mark.parametrize("name", HYBRIDS)
def test_everything_is_that_of_transformers(name: str) -> None:
    ids = tokens()
    found = spikes(build(name), ss.token_ids(ids))
    assert found.attending == HYBRIDS[name][1]
    assert found.pairs == (() if name == "JambaForCausalLM" else ((1, 4),))
    for row in range(len(ids)):
        value, sinks, aligned, kept = by_hand(name, ids[row])
        np.testing.assert_allclose(found.value[row], value, rtol=1e-5, atol=1e-5)
        assert found.sinks[row].tolist() == sinks
        assert found.aligned[row].tolist() == aligned
        np.testing.assert_allclose(found.retained[row], kept, rtol=1e-5)
        alone = spikes(build(name), ss.token_ids(ids[row : row + 1]))
        torch.testing.assert_close(alone.value[0], found.value[row], atol=1e-5, rtol=1e-5)
        assert torch.equal(alone.sinks[0], found.sinks[row])


def test_a_spike_that_was_put_there_is_found(tmp_path) -> None:
    """Layers 0 and 2 of four write a large dim at position 0; 1 and 3 attend and take it back."""
    bridge = ss.load_model(tiny_model("Lfm2ForCausalLM"))
    texts = ss.token_ids(tokens())

    def write(amount: float):
        def edit(x, hook):
            x = x.clone()
            x[:, 0, 5] += amount
            return x

        return edit

    hooks = [
        (f"blocks.{layer}.hook_resid_post", write(amount))
        for layer, amount in ((0, 500.0), (1, -500.0), (2, 800.0), (3, -800.0))
    ]
    with bridge.hooks(fwd_hooks=hooks):
        found = spikes(bridge, texts, sink=0)
    value = found.value_at_sink
    assert (value[:, [0, 2]] > 400).all() and (value[:, [1, 3]] < 100).all()
    assert found.statistics()["largest_after"] == 2
    assert found.pairs == () and found.statistics()["retention"] is None
    assert found.events == (1, 3) and found.chance == 1.0  # blocks of one layer each
    written = found.save(tmp_path / "spikes")
    kept = json.loads(written[0].read_text())
    assert kept["largest_after"] == 2 and kept["alignment"]["mean"] == 1.0
    frame = found.to_frame()
    assert frame[frame.attends].layer.unique().tolist() == [1, 3]
    assert len(found.figures()["spikes"].layout.shapes) == 2
    assert "no retention" in found.summary()


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("LlamaForCausalLM", "no layer without attention comes before an attention layer"),
        ("MambaForCausalLM", "no block of MambaForCausalLM attends to keys"),
        ("BertForMaskedLM", "is bidirectional"),
    ],
)
def test_what_has_no_spikes_is_refused(name: str, why: str) -> None:
    with pytest.raises(UnsupportedError, match=why):
        spikes(tiny_model(name), ss.token_ids(tokens(1)))


def test_a_sink_beyond_the_prompts_is_refused() -> None:
    with pytest.raises(TextError, match="choose one from 0 to 12"):
        spikes(tiny_model("Lfm2ForCausalLM"), ss.token_ids(tokens(1)), sink=20)

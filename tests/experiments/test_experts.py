"""Experts of routed models against transformers' own modules run by hand.

The reference runs transformers' model alone and repeats each expert in numpy-like loops over
tokens, from the weights of its fused modules; nothing of sinkscope takes part.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments.experts import experts
from sinkscope.experiments.nonmixture import nonmixture
from sinkscope.families import tiny_model
from sinkscope.metrics.experts import forms_massive, super_experts
from sinkscope.models.experts import experts_of
from sinkscope.prompts.tokens import token_ids

FAMILIES = ("Mixtral", "Qwen2Moe", "GptOss", "Glm4Moe", "GraniteMoe")
LAYER, EXPERT, NEURON, DIM, FIRST = 1, 2, 5, 3, 7


def build(family: str):
    return tiny_model(f"{family}ForCausalLM")


def prompts(lengths=(14, 9, 11)) -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(8, 97, (n,), generator=generator).tolist() for n in lengths]


def fused(model) -> dict[int, torch.nn.Module]:
    """transformers' modules of stacked experts, by block."""
    return {
        index: module
        for index, block in enumerate(model.model.layers)
        for module in block.modules()
        if "down_proj" in module._parameters and module.down_proj.ndim == 3
    }


def by_hand(module, hidden: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Neurons and output of one expert on one token, from its weights."""
    if type(module).__name__ == "GptOssExperts":
        both = hidden @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert]
        gate, up = both[::2].clamp(max=module.limit), both[1::2].clamp(-module.limit, module.limit)
        neurons = (up + 1) * gate * torch.sigmoid(gate * module.alpha)
        return neurons, neurons @ module.down_proj[expert] + module.down_proj_bias[expert]
    half = module.gate_up_proj.shape[1] // 2
    gate = module.gate_up_proj[expert, :half] @ hidden
    neurons = module.act_fn(gate) * (module.gate_up_proj[expert, half:] @ hidden)
    return neurons, module.down_proj[expert] @ neurons


def reference(model, prompt: list[int], sink: int = 0) -> dict[str, Tensor]:
    """Every statistic of one prompt alone, token by token [routed expert]."""
    calls: dict[int, tuple] = {}
    handles = [
        module.register_forward_hook(
            lambda m, args, kwargs, y, layer=layer: calls.update(
                {layer: (*args, *kwargs.values())}
            ),
            with_kwargs=True,
        )
        for layer, module in fused(model).items()
    ]
    with torch.no_grad():
        output = model(torch.tensor([prompt]), output_hidden_states=True)
    for handle in handles:
        handle.remove()
    layers = sorted(calls)
    count = fused(model)[layers[0]].down_proj.shape[0]
    shape = len(layers), count
    found = {name: torch.full(shape, math.nan) for name in ("largest", "norm", "sink_norm")}
    found |= {
        name: torch.zeros(shape) for name in ("weight", "chosen", "sink_weight", "sink_chosen")
    }
    found["position"] = torch.full(shape, -1)
    others = len(prompt) - 1
    for row, layer in enumerate(layers):
        module, (hidden, chosen, weight) = fused(model)[layer], calls[layer]
        for expert in range(count):
            norms = []
            for token in range(len(prompt)):
                for choice in range(chosen.shape[1]):
                    if int(chosen[token, choice]) != expert:
                        continue
                    with torch.no_grad():
                        _, out = by_hand(module, hidden[token], expert)
                    w = float(weight[token, choice])
                    if not float(found["largest"][row, expert]) >= float(out.abs().max()):
                        found["largest"][row, expert] = out.abs().max()
                        found["position"][row, expert] = token
                    if token == sink:
                        found["sink_norm"][row, expert] = out.norm()
                        found["sink_weight"][row, expert] = w
                        found["sink_chosen"][row, expert] = 1
                    else:
                        norms.append(float(out.norm()))
                        found["weight"][row, expert] += w / others
                        found["chosen"][row, expert] += 1 / others
            found["norm"][row, expert] = sum(norms) / len(norms) if norms else math.nan
    found["logits"] = output.logits[0]
    return found


def assert_same(got: Tensor, want: Tensor, tolerance: float = 1e-5) -> None:
    assert got.shape == want.shape
    assert torch.equal(got.isnan(), want.isnan())
    size = want.nan_to_num().abs().max().clamp_min(1.0)
    assert (got - want).nan_to_num().abs().max() <= tolerance * size


@pytest.mark.parametrize("family", FAMILIES)
def test_every_number_is_that_of_transformers_modules_padded_and_alone(family: str) -> None:
    model = build(family)
    want = [reference(model, prompt) for prompt in prompts()]
    together = experts(build(family), token_ids(prompts()), ablate=False, progress=False)
    assert together.layers == tuple(fused(model))
    for row, prompt in enumerate(prompts()):
        alone = experts(build(family), token_ids([prompt]), ablate=False, progress=False)
        for name in want[row].keys() - {"logits", "position"}:
            assert_same(together[name][row], want[row][name])
            assert_same(alone[name][0], want[row][name])
        assert torch.equal(together.position[row], want[row]["position"])


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_contributions_of_neurons_sum_to_the_output(family: str) -> None:
    """Of the largest output, all neurons' contributions (and the bias) by hand; the first five."""
    model, (prompt, *_) = build(family), prompts()
    found = experts(build(family), token_ids([prompt]), ablate=False, progress=False)
    inputs: dict[int, Tensor] = {}
    for layer, module in fused(model).items():
        module.register_forward_hook(
            lambda m, args, y, layer=layer: inputs.update({layer: args[0]})
        )
    with torch.no_grad():
        model(torch.tensor([prompt]))
        for row, layer in enumerate(found.layers):
            module = fused(model)[layer]
            for expert in (~found.largest[0, row].isnan()).nonzero().flatten().tolist():
                dim = int(found.dim[0, row, expert])
                hidden = inputs[layer][int(found.position[0, row, expert])]
                neurons, out = by_hand(module, hidden, expert)
                assert float(found.value[0, row, expert]) == pytest.approx(float(out[dim]), 1e-4)
                assert dim == int(out.abs().argmax())
                weight = module.down_proj[expert]
                parts = neurons * (weight[:, dim] if family == "GptOss" else weight[dim])
                order = parts.abs().argsort(descending=True)[:5]
                assert found.neuron[0, row, expert].tolist() == order.tolist()
                assert_same(found.contribution[0, row, expert], parts[order])


def with_super_expert(family: str):
    """A model into which one expert is made super by hand.

    Token FIRST has an embedding of its own; the router of one layer sends it, and it alone, to one
    expert, one of whose neurons answers it and writes one dim.
    """
    model = build(family)
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        direction = torch.zeros(embedding.shape[1])
        direction[0] = 1.0
        embedding[:, 0] = 0
        embedding[FIRST] = 6.0 * direction
        for layer in model.model.layers:  # nothing else writes the direction, or far from it
            for name, parameter in layer.named_parameters():
                if parameter.ndim > 1 and "gate.weight" not in name:
                    parameter *= 0.1
        block = model.model.layers[LAYER]
        router = block.mlp.gate
        router.weight *= 0.1
        router.weight[:, 0] = 0
        router.weight[EXPERT, 0] = 5.0
        module = fused(model)[LAYER]
        half = module.gate_up_proj.shape[1] // 2
        module.gate_up_proj[EXPERT, NEURON] = 4.0 * direction
        module.gate_up_proj[EXPERT, half + NEURON] = 4.0 * direction
        module.down_proj[EXPERT, :, NEURON] = 0
        module.down_proj[EXPERT, DIM, NEURON] = 40.0
    return model


@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe"])
def test_an_expert_made_super_by_hand_is_found_and_its_ablation_removes_the_peak(
    family: str,
) -> None:
    ids = [[FIRST, *prompt] for prompt in prompts()]
    result = experts(with_super_expert(family), token_ids(ids), progress=False)
    assert result.super_experts == ((LAYER, EXPERT),)
    assert result.forms.nonzero().flatten().tolist() == [LAYER]
    (one,) = result.statistics()["super_experts"]
    assert (one["position"], one["dim"]) == (0, DIM)
    assert one["neurons"][0]["neuron"] == NEURON
    assert one["neurons"][0]["contribution"] / one["value"] > 0.99
    assert one["sink_chosen"] == 1
    assert result.ablated == ("super experts", "random experts")
    assert result.peak_without is not None
    before = result.peak[:, 1:].amax(1)
    without, random = result.peak_without[:, :, 1:].amax(2)
    assert (before > 1000).all() and (without < 0.01 * before).all()
    assert (random > 0.9 * before).all()
    assert f"{LAYER}.{EXPERT}" in result.summary() and "Without the super experts" in repr(result)
    assert list(result.figures()) == ["largest", "sink_weight", "weight"]
    assert len(result.to_frame()) == len(ids) * 4 * 4


def ffn_outputs(model, prompt: list[int], alone: int | None) -> Tensor:
    """Output of every block's FFN [layer position dim]; one position may see only itself."""
    outputs: list[Tensor] = []
    for block in model.model.layers:
        block.mlp.register_forward_hook(
            lambda m, x, y: outputs.append(y[0] if isinstance(y, tuple) else y)
        )
    length = len(prompt)
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    if alone is not None:
        seen[alone] = False
        seen[alone, alone] = True
    hidden = torch.zeros(1, 1, length, length).masked_fill(~seen, torch.finfo(torch.float32).min)
    with torch.no_grad():
        model(torch.tensor([prompt]), attention_mask=hidden)
    return torch.stack([x.reshape(length, -1) for x in outputs])


@pytest.mark.parametrize("position", [0, 6])
@pytest.mark.parametrize("family", ["Mixtral", "Qwen3Moe", "GptOss", "Glm4Moe"])
def test_nonmixture_dims_of_routed_layers_are_those_of_transformers_ffns(
    family: str, position: int
) -> None:
    """By loops over prompts, layers and dims; with a self-only mask where it is not position 0."""
    texts = [prompt[:8] for prompt in prompts()]  # no longer than a window
    make = with_super_expert if family in ("Mixtral", "Qwen3Moe") else build
    if make is with_super_expert:
        texts = [[*p[:position], FIRST, *p[position + 1 :]] for p in texts]
    over_median, over_mixed = (4.0, 1.5) if make is with_super_expert else (1.5, 0.9)
    found = nonmixture(
        make(family),
        token_ids(texts),
        position,
        over_median=over_median,
        over_mixed=over_mixed,
        progress=False,
    )
    alone = None if position == 0 else position
    outputs = [ffn_outputs(make(family), prompt, alone) for prompt in texts]
    want: dict[tuple[int, int], float] = {}
    layers, _, dims = outputs[0].shape
    for layer in range(layers):
        for dim in range(dims):
            hits, values = 0, []
            for out in outputs:
                x = float(out[layer, position, dim])
                middle = sorted(out[layer, position].abs().tolist())
                median = (middle[dims // 2 - 1] + middle[dims // 2]) / 2
                others = [float(out[layer, t, dim].abs()) for t in range(8) if t != position]
                hits += abs(x) > over_median * median and abs(x) > over_mixed * max(others)
                values.append(x)
            if 2 * hits >= len(outputs):
                want[layer, dim] = sum(values) / len(values)
    assert want, "the case should have some"
    got = {(one["layer"], one["dim"]): one["value"] for one in found.found}
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert got[key] == pytest.approx(value, rel=1e-4, abs=1e-5)
    if make is with_super_expert:
        assert (LAYER, DIM) in got and found.masked == (position != 0)
    assert found.contributor is None


def silenced(model, chosen: set[tuple[int, int]], means: dict | None = None):
    """transformers' model with some experts replaced, token by token, in its fused modules."""
    for layer, module in fused(model).items():

        def hook(m, args, kwargs, output, layer=layer):
            hidden, index, weight = (*args, *kwargs.values())
            output = output.clone()
            for token in range(len(hidden)):
                for choice in range(index.shape[1]):
                    expert = int(index[token, choice])
                    if (layer, expert) in chosen:
                        w, (_, out) = weight[token, choice], by_hand(m, hidden[token], expert)
                        new = 0.0 if means is None else means[layer, expert]
                        output[token] += w * (new - out)
            return output

        module.register_forward_hook(hook, with_kwargs=True)
    return model


@pytest.mark.parametrize("path", ["eager", "streaming"])
@pytest.mark.parametrize("family", FAMILIES)
def test_ablation_is_that_of_transformers_modules_edited_by_hand(family: str, path: str) -> None:
    (prompt, *_), model = prompts(), ss.load_model(build(family))
    chosen = [(1, 0), (1, 2), (3, 1)]
    tokens = torch.tensor([prompt])
    with torch.no_grad():
        want = silenced(build(family), set(chosen))(tokens).logits
        plain = build(family)(tokens).logits
        with ss.streaming(model) if path == "streaming" else nullcontext():
            with ss.AblateExperts(model, chosen):
                got = model(tokens)
            again = model(tokens)
    assert_same(got, want)
    assert_same(again, plain)
    assert (want - plain).abs().max() > 1e-2 * plain.abs().max()


def test_mean_ablation_puts_the_mean_over_real_calibration_tokens_there() -> None:
    texts, pair = prompts(), (1, 0)
    outputs: list[Tensor] = []
    model = build("Mixtral")
    for prompt in texts:

        def keep(m, args, y):
            hidden, index, _ = args
            for token in (index == pair[1]).any(-1).nonzero().flatten().tolist():
                outputs.append(by_hand(m, hidden[token], pair[1])[1])

        handle = fused(model)[pair[0]].register_forward_hook(keep)
        with torch.no_grad():
            model(torch.tensor([prompt]))
        handle.remove()
    means = {pair: torch.stack(outputs).mean(0)}
    tokens = torch.tensor([texts[0]])
    bridge = ss.load_model(build("Mixtral"))
    with torch.no_grad():
        want = silenced(build("Mixtral"), {pair}, means)(tokens).logits
        with ss.AblateExperts(bridge, [pair], "mean", calibration=token_ids(texts)):
            got = bridge(tokens)
    assert_same(got, want)


def test_a_scan_names_the_ablation_and_the_model_comes_out_as_it_went_in() -> None:
    model, texts = ss.load_model(build("Mixtral")), token_ids(prompts())
    before = ss.scan(model, texts, progress=False)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(KeyError, match="mine"), ss.AblateExperts(model, [(0, 1)]):
        during = ss.scan(model, texts, progress=False)
        raise KeyError("mine")
    assert any("AblateExperts" in str(one) for one in during.settings.interventions)
    assert not torch.equal(before["sink_residual_norm"], during["sink_residual_norm"])
    after = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    assert hooks == after
    again = ss.scan(model, texts, progress=False)
    assert torch.equal(before["sink_residual_norm"], again["sink_residual_norm"])


@pytest.mark.parametrize("family", ["Mixtral", "GptOss"])
def test_bfloat16_is_what_the_modules_are_given_in_that_dtype(family: str) -> None:
    """From the inputs of transformers' own modules in that very pass: a rounded input to a router
    may send a token elsewhere, so that two passes in bfloat16 need not agree."""
    model = ss.load_model(build(family).to(torch.bfloat16))
    stacks = [
        next(m for m in block.modules() if getattr(m._parameters.get("down_proj"), "ndim", 0) == 3)
        for block in model.blocks
    ]
    calls: list[tuple[Tensor, Tensor]] = []
    handles = [
        m.register_forward_hook(
            lambda m, args, kwargs, y: calls.append((*args, *kwargs.values())[:2]),
            with_kwargs=True,
        )
        for m in stacks
    ]
    try:
        prompt = prompts()[0]
        found = experts(model, token_ids([prompt]), ablate=False, progress=False)
    finally:
        for handle in handles:
            handle.remove()
    with torch.no_grad():
        for layer, (module, (hidden, index)) in enumerate(
            zip(stacks, calls[-len(stacks) :], strict=True)
        ):
            for expert in range(found.largest.shape[2]):
                tokens = (index == expert).any(-1).nonzero().flatten().tolist()
                outs = [by_hand(module, hidden[t], expert)[1].abs().max() for t in tokens]
                got = float(found.largest[0, layer, expert])
                if outs:
                    assert got == pytest.approx(float(torch.stack(outs).max()), rel=2**-6)
                else:
                    assert math.isnan(got)


def test_what_is_no_fused_mixture_of_experts_is_refused() -> None:
    with pytest.raises(
        UnsupportedError, match="LlamaForCausalLM has no mixture of experts: its FF"
    ):
        experts_of(ss.load_model(tiny_model("LlamaForCausalLM")))
    with pytest.raises(UnsupportedError, match="part of a JetMoeMoE, not one module that stacks"):
        experts_of(ss.load_model(tiny_model("JetMoeForCausalLM")))


def test_an_ffn_that_does_more_than_add_its_experts_is_refused() -> None:
    model = build("Mixtral")
    block = model.model.layers[2].mlp
    whole = type(block).forward
    block.__class__ = type("Doubled", (type(block),), {"forward": lambda m, x: 2.0 * whole(m, x)})
    with pytest.raises(UnsupportedError, match="block 2 does more"):
        experts_of(ss.load_model(model))


def test_experts_that_do_not_add_up_are_refused() -> None:
    model = build("Mixtral")
    module = fused(model)[1]
    module._apply_gate = lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1]
    model.config._experts_implementation = "eager"  # which does not call _apply_gate
    with pytest.raises(UnsupportedError, match="block 1, computed one by one, do not add up"):
        experts_of(ss.load_model(model))


def test_arguments_that_name_no_expert_are_refused() -> None:
    model = ss.load_model(build("Glm4Moe"))
    with pytest.raises(UnsupportedError, match="Layer 0 routes to no experts"):
        ss.AblateExperts(model, [(0, 0)])
    with pytest.raises(UnsupportedError, match="no expert 4"):
        ss.AblateExperts(model, [(1, 4)])
    with pytest.raises(UnsupportedError, match="No expert is named"):
        ss.AblateExperts(model, [])
    with pytest.raises(TextError, match="should have a token after it"):
        experts(model, token_ids([[5, 6]]), sink=1, progress=False)


def test_the_rule_on_numbers_with_a_known_answer() -> None:
    """The figures of Qwen3-30B-A3B in the paper: 744, 540 and 430, the next 63.5."""
    largest = torch.full((6, 128), 10.0)
    largest[1, 68], largest[2, 92], largest[3, 82], largest[4, 0] = 744.0, 540.0, 430.0, 63.5
    largest[5, 1] = math.nan
    forms = torch.tensor([False, True, True, True, True, False])
    assert super_experts(largest, forms).nonzero().tolist() == [[1, 68], [2, 92], [3, 82]]
    forms[2] = False
    assert super_experts(largest, forms).nonzero().tolist() == [[1, 68], [3, 82]]
    assert not super_experts(torch.full((2, 3), math.nan), forms[:2]).any()


def test_layers_form_massive_activations_where_they_raise_them() -> None:
    peak = torch.tensor([[1.0, 5.0, 900.0, 1500.0, 1510.0, 20.0]])
    median = torch.full_like(peak, 0.5)
    assert forms_massive(peak, median).tolist() == [False, True, True, False, False]
    assert not forms_massive(peak, median * 10).any()

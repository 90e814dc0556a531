"""The bridge is the model: whatever sits on a module is measured, or refused with its name.

Every number is compared with transformers' own eager attention.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from sinkscope.capture.scan import scan
from sinkscope.errors import ModelError, UnsupportedError
from sinkscope.interventions import SelfOnlyMask
from sinkscope.models.bridging import Proof, proof_of
from sinkscope.models.capabilities import capabilities
from sinkscope.models.load import load_model
from sinkscope.models.output import output_weight
from tests.families.architectures import BY_NAME

from .files import TOKENS, llama_gguf, tiny_llama, tokenizer


def eager(model: Any, tokens: Tensor = TOKENS) -> Tensor:
    """Attention paid to position 0, mean over later queries [layer head]."""
    with torch.no_grad():
        found = model(tokens, output_attentions=True).attentions
    return torch.stack([pattern[:, :, 1:, 0].mean(dim=(0, 2)) for pattern in found])


def sink_attention(model: Any, tokens: Tensor = TOKENS, **options: Any) -> Tensor:
    report = scan(model, tokens, progress=False, **options)
    return report.sink_attention.mean(dim=0)


def assert_measured(model: Any, **options: Any) -> None:
    torch.testing.assert_close(sink_attention(model, **options), eager(model), atol=1e-5, rtol=0)


FUSED = {
    "gpt2": "transformer.h.{}.attn.c_attn",
    "gpt_neox": "gpt_neox.layers.{}.attention.query_key_value",
    "phi3": "model.layers.{}.self_attn.qkv_proj",
}


def put_a_class_of_ones_own(module: nn.Module) -> None:
    """A subclass, as an adapter or a fake-quantised layer is."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return type(module).__mro__[1].forward(self, x) * 0.3

    module.__class__ = type("Scaled", (type(module),), {"forward": forward})


def weakened(module: nn.Module, args: Any, output: Any) -> Any:
    return output * 0.3


def put_a_hook(module: nn.Module) -> None:
    module.register_forward_hook(weakened)


def put_a_hook_before(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0] * 0.3,))


@pytest.mark.parametrize("put", [put_a_class_of_ones_own, put_a_hook, put_a_hook_before])
@pytest.mark.parametrize("family", FUSED)
def test_what_sits_on_a_fused_projection_is_measured(
    family: str, put: Callable[[nn.Module], None]
) -> None:
    model = BY_NAME[family].build()
    plain = eager(model)
    for layer in range(3):
        put(model.get_submodule(FUSED[family].format(layer)))
    logits = model(TOKENS).logits
    assert (eager(model) - plain).abs().max() > 1e-2
    for attention in ("streaming", "eager"):
        assert_measured(model, attention=attention)
    assert torch.equal(model(TOKENS).logits, logits)


def test_what_sits_on_a_fused_ffn_is_measured() -> None:
    model = BY_NAME["phi3"].build()
    put_a_hook(model.model.layers[0].mlp.gate_up_proj)
    assert_measured(model)


def test_a_hook_that_comes_or_goes_is_seen() -> None:
    """On the model that is given again; its old bridge is refused, not measured."""
    model = tiny_llama()
    bridge = load_model(model)
    handle = model.model.layers[0].self_attn.q_proj.register_forward_hook(weakened)
    assert_measured(model)
    with pytest.raises(ModelError, match="has been changed since"):
        scan(bridge, TOKENS, progress=False)
    handle.remove()
    assert_measured(model)
    scan(bridge, TOKENS, progress=False)


def test_a_setting_that_changes_is_seen() -> None:
    class Scale(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.scaling = inner, {"default": 1.0}

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) * self.scaling["default"]

    model = tiny_llama()
    projection = Scale(model.model.layers[1].self_attn.k_proj)
    model.model.layers[1].self_attn.k_proj = projection
    before = sink_attention(model)
    projection.scaling["default"] = 0.2
    assert (eager(model) - before).abs().max() > 1e-2
    assert_measured(model)


def test_a_model_that_changes_under_an_intervention_is_refused() -> None:
    model = tiny_llama()
    with SelfOnlyMask(load_model(model), position=5):
        model.model.layers[0].register_forward_hook(weakened)
        with pytest.raises(ModelError, match="since hooks or interventions were put on"):
            scan(model, TOKENS, progress=False)


def test_what_counts_its_calls_does_not_part_a_bridge_from_its_model() -> None:
    class Counting(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return nn.functional.silu(x)

    model = tiny_llama()
    model.model.layers[0].mlp.act_fn = Counting()
    with SelfOnlyMask(load_model(model), position=5):
        masked = sink_attention(model)
        model(TOKENS)
        torch.testing.assert_close(sink_attention(model), masked)


class Transposed(nn.Module):
    """An output projection that keeps its weight in a layout of its own."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


class Untransposed(nn.Module):
    """One that keeps nn.Linear's layout without being one, and adds a share and a bias."""

    def __init__(self, linear: nn.Linear, share: float) -> None:
        super().__init__()
        self.weight, self.share = linear.weight, share
        self.down, self.up = nn.Linear(32, 2, bias=False), nn.Linear(2, 32)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight) + self.share * self.up(self.down(x))


def rounding(module: nn.Module) -> None:
    module.register_forward_pre_hook(lambda module, args: (args[0].round(decimals=1),))


def with_projections(put: Callable[[nn.Module], nn.Module]) -> Any:
    model = tiny_llama()
    torch.manual_seed(1)
    for layer in model.model.layers:
        layer.self_attn.o_proj = put(layer.self_attn.o_proj)
    return model


@pytest.mark.parametrize(
    "put", [Transposed, lambda o: Untransposed(o, 0.0), lambda o: Untransposed(o, 3.0)]
)
def test_norms_through_the_output_projection(put: Callable[[Any], nn.Module]) -> None:
    model = with_projections(put)
    bridge = load_model(model)
    seen: dict[str, Tensor] = {}
    layer = model.model.layers[1].self_attn
    handle = layer.o_proj.register_forward_pre_hook(lambda module, args: seen.update(z=args[0]))
    with torch.no_grad():
        model(TOKENS)
        handle.remove()
        nothing = layer.o_proj(torch.zeros(1, 1, 32))[0, 0]
        for head in range(4):
            alone = torch.zeros_like(seen["z"])
            alone[..., 8 * head : 8 * head + 8] = seen["z"][..., 8 * head : 8 * head + 8]
            wanted = layer.o_proj(alone) - nothing
            found = seen["z"][..., 8 * head : 8 * head + 8] @ output_weight(bridge, 1)[head]
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert capabilities(bridge).split_output


def test_a_projection_that_is_not_linear_has_no_weight_of_a_head() -> None:
    model = tiny_llama()
    for layer in model.model.layers:
        rounding(layer.self_attn.o_proj)
    bridge = load_model(model)
    assert not capabilities(bridge).split_output
    with pytest.raises(UnsupportedError, match="are not linear"):
        scan(bridge, TOKENS, metrics=["through_output"], progress=False)
    assert_measured(model)


def test_a_bridge_that_computes_something_else_is_refused(monkeypatch: Any) -> None:
    """TransformerLens would have to be wrong: here it is made so."""
    from transformer_lens.model_bridge.generalized_components import joint_qkv_attention as joint

    monkeypatch.setattr(
        joint.JointQKVAttentionBridge,
        "_reshape_attn_output",
        lambda self, x, *sizes: x.flatten(-1).reshape(sizes[0], sizes[1], -1),
    )
    bridge = load_model(BY_NAME["gpt2"].build())
    assert "computes block 0 differently" in (proof_of(bridge).stock or "")
    with pytest.raises(UnsupportedError, match="cannot be exact .* computes block 0 differently"):
        scan(bridge, TOKENS, attention="eager", progress=False)
    assert_measured(BY_NAME["gpt2"].build())


FOLDERS = {"gpt2": True, "phi3": False, "llama": True}
"""Families, and whether their folder has a tokenizer, which decides who builds the bridge."""


def saved(family: str, folder: Any) -> Any:
    BY_NAME[family].build().save_pretrained(folder)
    if FOLDERS[family]:
        tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FOLDERS)
def test_a_folder_is_proved(family: str, dtype: str, tmp_path: Any) -> None:
    bridge = load_model(saved(family, tmp_path), dtype=dtype)
    assert bridge.__dict__["_sinkscope_proof"] == Proof()  # it was compared, and nothing differs


def test_a_gguf_file_is_proved(tmp_path: Any) -> None:
    bridge = load_model(llama_gguf(tmp_path / "tiny.gguf"))
    assert bridge.__dict__["_sinkscope_proof"] == Proof()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_folder_whose_bridge_computes_something_else_is_refused(
    dtype: str, tmp_path: Any, monkeypatch: Any
) -> None:
    """TransformerLens would have to change the model when it prepares it: here it is made to."""
    from transformer_lens.model_bridge.supported_architectures import llama

    def prepare(self: Any, model: Any) -> None:
        norm = model.model.layers[1].post_attention_layernorm
        norm.forward = lambda x: x * 0.7

    monkeypatch.setattr(llama.LlamaArchitectureAdapter, "prepare_model", prepare, raising=False)
    bridge = load_model(saved("llama", tmp_path), dtype=dtype)
    found = proof_of(bridge)
    assert "computes block 1 differently" in (found.stock or "")
    assert "computes block 1 differently" in (found.streaming or "")
    for attention in ("eager", "streaming"):
        with pytest.raises(UnsupportedError, match="computes block 1 differently"):
            scan(bridge, TOKENS, attention=attention, progress=False)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_threads_on_one_model(name: str) -> None:
    bridge = load_model(BY_NAME[name].build())
    texts = [
        torch.randint(3, 97, (1, 12), generator=torch.Generator().manual_seed(i)) for i in range(6)
    ]
    alone = [sink_attention(bridge, text, metrics="core") for text in texts]
    with ThreadPoolExecutor(3) as pool:
        together = list(pool.map(lambda text: sink_attention(bridge, text, metrics="core"), texts))
    assert all(map(torch.equal, together, alone))
    assert not any(point.fwd_hooks for point in bridge.hook_dict.values())


ROPES = {
    "longrope": dict(
        factor=4.0,
        original_max_position_embeddings=8,
        rope_theta=1e4,
        short_factor=[1.0] * 4,
        long_factor=[4.0, 3.0, 2.0, 8.0],
    ),
    "dynamic": dict(factor=4.0, rope_theta=1e4),
}


@pytest.mark.parametrize("kind", ROPES)
def test_neighbours_and_history_do_not_matter(kind: str) -> None:
    """Frequencies that depend on the longest prompt of a batch, or of all before it."""
    settings = dict(rope_parameters=dict(rope_type=kind, **ROPES[kind]))
    settings |= dict(max_position_embeddings=8 if kind == "dynamic" else 64)
    prompts = [list(range(3, 3 + length)) for length in (30, 20, 8, 5)]
    bridge = load_model(tiny_llama(**settings))
    bridge.cfg.n_ctx = 64
    for batch in ("auto", 1):
        report = scan(bridge, prompts, batch=batch, progress=False)
        for found, prompt in zip(report.sink_attention, prompts, strict=True):
            wanted = eager(tiny_llama(**settings), torch.tensor([prompt]))
            torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["in place", "data", "another"])
@pytest.mark.parametrize("kind", ["default", "linear", "llama3"])
def test_frequencies_that_are_edited_after_a_scan(kind: str, how: str) -> None:
    """A copy of a model has its own, so that an edit of the model's is a change of the model."""
    stated = dict(factor=2.0, low_freq_factor=1.0, high_freq_factor=4.0)
    stated |= dict(rope_type=kind, rope_theta=1e4, original_max_position_embeddings=16)
    model = tiny_llama(rope_parameters=stated)
    before = sink_attention(model)
    rotary = model.model.rotary_emb
    if how == "in place":
        rotary.inv_freq.mul_(3)
    elif how == "data":
        rotary.inv_freq.data = rotary.inv_freq * 3
    else:
        rotary.inv_freq = rotary.inv_freq * 3
    after = sink_attention(model)
    torch.testing.assert_close(after, eager(model), atol=1e-6, rtol=0)
    assert (after - before).abs().max() > 1e-3


def test_a_tokenizer_is_used_as_it_is(tmp_path: Any) -> None:
    """Although its name points to one without the token that was added."""
    tokenizer().save_pretrained(tmp_path)
    words = transformers.AutoTokenizer.from_pretrained(tmp_path)
    words.add_tokens(["<NEW>"])
    model = tiny_llama()
    model.resize_token_embeddings(len(words), mean_resizing=False)
    bridge = load_model(model, tokenizer=words)
    assert bridge.to_tokens("w5 <NEW>", prepend_bos=False).tolist() == [[5, 97]]
    named = load_model(tiny_llama(), tokenizer=tmp_path)
    assert named.to_tokens("w5 w6", prepend_bos=True).tolist() == [[1, 5, 6]]
    with pytest.raises(ModelError, match="tokenizer is a int; expected a transformers tokenizer"):
        load_model(tiny_llama(), tokenizer=3)


def averaged(model: Any) -> Any:
    return torch.optim.swa_utils.AveragedModel(model)


def with_compiled_block(model: Any) -> Any:
    model.model.layers[1] = torch.compile(model.model.layers[1])
    return model


@pytest.mark.parametrize("wrap", [torch.compile, nn.DataParallel, averaged, with_compiled_block])
def test_wrappers_stand_for_the_model_inside(wrap: Callable[[Any], Any]) -> None:
    wanted = eager(tiny_llama())
    found = sink_attention(wrap(tiny_llama()))  # DataParallel takes a model to a GPU
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=0)


def test_outputs_that_are_tuples() -> None:
    model = tiny_llama()
    wanted = eager(model)
    model.config.return_dict = False
    torch.testing.assert_close(sink_attention(model), wanted, atol=1e-5, rtol=0)
    assert model.config.return_dict is False


def test_repaired_weights() -> None:
    model = tiny_llama()
    weight = model.model.layers[0].mlp.up_proj.weight.data
    kept = weight[0, 0].item()
    weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="NaN or infinite"):
        scan(model, TOKENS, progress=False)
    weight[0, 0] = kept
    assert_measured(model)


@pytest.mark.parametrize("attention", ["streaming", "eager"])
def test_float64_with_two_lengths(attention: str) -> None:
    model = tiny_llama().double()
    report = scan(model, [[5, 6, 7, 8], [5, 6, 7]], attention=attention, progress=False)
    wanted = eager(model, torch.tensor([[5, 6, 7]])).float()
    torch.testing.assert_close(report.sink_attention[1], wanted, atol=1e-5, rtol=0)


def test_eight_bits() -> None:
    model = tiny_llama()
    projection = model.model.layers[0].mlp.up_proj
    small = projection.weight.detach().to(torch.float8_e4m3fn)
    projection.weight = nn.Parameter(small, requires_grad=False)
    projection.forward = lambda x: nn.functional.linear(x, small.float())
    torch.testing.assert_close(sink_attention(model), eager(model), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_defaults_of_torch_do_not_matter(name: str) -> None:
    wanted = sink_attention(BY_NAME[name].build())
    for change, undo in (
        (
            lambda: torch.set_default_dtype(torch.float64),
            lambda: torch.set_default_dtype(torch.float32),
        ),
        (lambda: torch.set_default_device("meta"), lambda: torch.set_default_device(None)),
    ):
        model = BY_NAME[name].build()
        change()
        try:
            found = scan(model, TOKENS, progress=False).sink_attention
        finally:
            undo()
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.mean(dim=0), wanted)


@pytest.mark.parametrize("part", ["q", "k", "v"])
def test_an_edit_in_place_of_an_input_of_a_fused_projection(part: str) -> None:
    """The parts share one tensor, so an edit in place reaches this part and those after it."""
    family = BY_NAME["gpt2"]
    model, tokens = load_model(family.build()), family.tokens()
    point = "blocks.0.attn.{}.hook_in".format
    later = [(point(one), lambda x, hook: x * 0.5) for one in "qkv"["qkv".index(part) :]]
    logits = []
    for hooks in (later, [(point(part), lambda x, hook: x.mul_(0.5))]):
        with torch.no_grad(), model.hooks(fwd_hooks=hooks):
            logits.append(model(tokens))
    torch.testing.assert_close(*logits)
    with torch.no_grad():
        assert (logits[0] - model(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_hook_that_changes_one_position_of_the_last_block_is_seen(dtype: torch.dtype) -> None:
    """The eager bridge goes past a hook on the attention module; only the sink's state shows it."""
    model = tiny_llama().to(dtype)
    last = model.model.layers[-1]

    def drop_the_sink(module: nn.Module, args: Any, output: Any) -> Any:
        changed = output[0].clone()
        changed[:, 0] = 0
        return (changed, *output[1:])

    last.self_attn.register_forward_hook(drop_the_sink)
    states: list[Tensor] = []
    handle = last.register_forward_hook(lambda module, args, output: states.append(output))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    wanted = (states[0][0] if isinstance(states[0], tuple) else states[0]).float().norm(dim=-1)
    with pytest.raises(UnsupportedError, match="Eager attention cannot be exact"):
        scan(model, TOKENS, metrics="residual", attention="eager", progress=False)
    found = scan(model, TOKENS, metrics="residual", attention="streaming", progress=False)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(
        found["residual_norm"][-1], wanted.mean(0), rtol=tolerance, atol=tolerance
    )

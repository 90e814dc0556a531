"""Each intervention equals the same change made by hand on the plain transformers model.

The change by hand is a replaced attention function with a mask written out in loops, an edited
copy of the weights, or a forward hook on transformers' own module; nothing of TransformerLens or
sinkscope takes part.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from unittest import mock

import numpy as np
import pytest
import torch
from einops import repeat
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sinkscope as ss
from sinkscope import interventions
from sinkscope.errors import SinkscopeError, TextError, UnsupportedError
from sinkscope.interventions import (
    AblateExperts,
    AblateHeads,
    PositionEmbeddingEdit,
    PositionIdEdit,
    Quantise,
    RemoveOutput,
    ReplaceSoftmax,
    ScaleActivation,
    ScaleValue,
    SelfOnlyMask,
    SetActivation,
    ShiftSinkLogit,
    SinkTransplant,
    WindowedAttention,
    ZeroValue,
)
from sinkscope.interventions.base import Intervention
from sinkscope.prompts.tokens import Texts

from ..families.architectures import BY_NAME, N_LAYERS, Family, bridge_of
from ..families.oracle import expected
from ..families.reference import reference

P = 10
PATHS = ("eager", "streaming")


def assert_close(got: Tensor, want: Tensor) -> None:
    """Equal to 1e-5 of the largest logit: float32 rounding, whose size the logits set."""
    assert got.shape == want.shape
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest) -> str:
    return request.param


def run(model: object, tokens: Tensor, path: str) -> Tensor:
    """Logits of a bridge on one of its paths."""
    with ss.streaming(model) if path == "streaming" else nullcontext(), torch.no_grad():
        return model(tokens)


# -- the same by hand ---------------------------------------------------------------------------

Attend = Callable[..., tuple[Tensor, Tensor]]


@contextmanager
def attention(model: PreTrainedModel, change: Callable[[Attend], Attend]) -> Iterator[None]:
    """Replace the eager attention function of the model's own module."""
    home = sys.modules[type(model).__module__]
    changed = change(home.eager_attention_forward)
    with mock.patch.object(home, "eager_attention_forward", changed):
        yield


def layer_of(model: PreTrainedModel, module: torch.nn.Module, family: Family) -> int:
    for index, block in enumerate(model.get_submodule(family.parts.blocks)):
        if any(part is module for part in block.modules()):
            return index
    raise AssertionError("no block holds this attention")


def hand_made_mask(family: Family, layer: int, length: int) -> Tensor:
    """What each query sees in the model as it is, written out [query key]."""
    seen = torch.zeros(length, length, dtype=torch.bool)
    window = family.windows[layer]
    for i in range(length):
        for j in range(length):
            later, far = j > i, window is not None and abs(i - j) >= window
            seen[i, j] = not (family.causal and later) and not far
    return seen


def masked(
    model: PreTrainedModel, family: Family, positions: list[int], layers: list[int] | None = None
) -> Callable[[Attend], Attend]:
    """Self-only rows at some positions."""

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            layer = layer_of(model, module, family)
            seen = hand_made_mask(family, layer, query.shape[2])
            if layers is None or layer in layers:
                for p in positions:
                    for j in range(len(seen)):
                        seen[p, j] = j == p
            by_hand = torch.zeros(1, 1, *seen.shape).masked_fill(~seen, torch.finfo().min)
            return eager(module, query, key, value, by_hand, **kwargs)

        return attend

    return change


# -- the structured mask ------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [None, [0, 2]], ids=["every layer", "layers 0 and 2"])
def test_self_only_mask(family: Family, path: str, layers: list[int] | None) -> None:
    tokens, plain = family.tokens(), family.build()
    with attention(plain, masked(plain, family, [P, 13], layers)), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    before = run(model, tokens, path)
    with SelfOnlyMask(model, [P, 13], layers=layers):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-2, "the mask changed nothing"
    assert torch.equal(run(model, tokens, path), before)


def test_a_scan_sees_the_mask(family: Family, path: str) -> None:
    """Received attention, entropies and all else are those of the masked model."""
    tokens, plain = family.tokens(), family.build()
    with attention(plain, masked(plain, family, [P])):
        ref = reference(plain, tokens, parts=family.parts)
    oracle = expected(ref, np.ones(tokens.shape, dtype=bool), family.causal)
    model = bridge_of(family)
    with SelfOnlyMask(model, P):
        report = ss.scan(model, ss.token_ids(tokens), attention=path, progress=False)
    for name in (
        "sink_attention",
        "received_attention",
        "sink_importance",
        "attention_entropy",
        "value_weighted_sink_share",
        "residual_norm",
        "value_norm",
        "head_output_norm",
        "ffn_sink_mean",
    ):
        got = getattr(report, name)
        assert got is not None, name
        np.testing.assert_allclose(
            got.double().numpy(), oracle[name], atol=1e-5, rtol=1e-4, err_msg=name
        )
    assert report.received_attention[:, :, P].max() > 0


def test_the_masked_row_reads_itself_alone(family: Family) -> None:
    """Streaming: exp(s - lse) of the masked query is 1 at itself (less a learned sink's share)."""
    model = bridge_of(family)
    rows = []

    def keep(pattern: Tensor, hook: object) -> None:
        rows.append(pattern[:, :, P])

    with SelfOnlyMask(model, P), ss.streaming(model), torch.no_grad():
        model.run_with_hooks(
            family.tokens(), fwd_hooks=[(lambda name: name.endswith("hook_pattern"), keep)]
        )
    assert len(rows) == N_LAYERS
    for row in rows:
        others = torch.cat([row[..., :P], row[..., P + 1 :]], -1)
        assert others.abs().max() == 0
        assert (row[..., P] < 1).all() if family.learned_sinks else (row[..., P] == 1).all()


def test_masks_reach_through_a_kv_cache(path: str) -> None:
    """In two chunks, the second with the position in it."""
    family = BY_NAME["llama"]
    tokens, plain = family.tokens(), family.build()
    with attention(plain, masked(plain, family, [P])), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    how = ss.streaming(model) if path == "streaming" else nullcontext()
    with how, torch.no_grad():
        first = model.original_model(tokens[:, :8], use_cache=True)
        with SelfOnlyMask(model, P):
            cache = first.past_key_values
            second = model.original_model(tokens[:, 8:16], past_key_values=cache, use_cache=True)
            third = model.original_model(tokens[:, 16:], past_key_values=cache, use_cache=True)
    got = torch.cat([part.logits for part in (first, second, third)], dim=1)
    assert_close(got, want)


def test_padding_of_a_bidirectional_model_stays_hidden(path: str) -> None:
    family = BY_NAME["bert"]
    tokens = family.tokens(prompts=2)
    model = bridge_of(family)
    padded = torch.ones(2, 24, dtype=torch.long)
    padded[1, 15:] = 0
    with SelfOnlyMask(model, P), torch.no_grad():
        with ss.streaming(model) if path == "streaming" else nullcontext():
            both = model.original_model(tokens, attention_mask=padded).logits
            alone = model.original_model(tokens[1:, :15]).logits
    assert_close(both[1:, :15], alone)


# -- logits and values --------------------------------------------------------------------------


@pytest.mark.parametrize("heads", [None, [1, 3]], ids=["all heads", "heads 1 and 3"])
def test_shift_sink_logit(family: Family, path: str, heads: list[int] | None) -> None:
    tokens, plain = family.tokens(), family.build()

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            layer = layer_of(plain, module, family)
            seen = hand_made_mask(family, layer, query.shape[2])
            bias = torch.zeros(1, query.shape[1], *seen.shape)
            for head in range(query.shape[1]) if heads is None else heads:
                for i in range(len(seen)):
                    bias[0, head, i, 2] += -1.5
            bias = bias.masked_fill(~seen, torch.finfo().min)
            return eager(module, query, key, value, bias, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    before = run(model, tokens, path)
    with ShiftSinkLogit(model, -1.5, position=2, heads=heads):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


def test_windowed_attention(family: Family, path: str) -> None:
    """Two heads with a window of 4 and the first two tokens, in layer 1; and a scan of it."""
    heads = [1, 3]
    tokens, plain = family.tokens(), family.build()

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            layer = layer_of(plain, module, family)
            seen = hand_made_mask(family, layer, query.shape[2])
            seen = seen.repeat(query.shape[1], 1, 1)
            for head in heads:
                for i in range(seen.shape[1]):
                    for j in range(seen.shape[2]):
                        if layer == 1 and abs(i - j) >= 4 and j > 1:
                            seen[head, i, j] = False
            bias = torch.zeros(1, *seen.shape).masked_fill(~seen, torch.finfo().min)
            return eager(module, query, key, value, bias, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
        ref = reference(plain, tokens, parts=family.parts)
    model = bridge_of(family)
    before = run(model, tokens, path)
    with WindowedAttention(model, 4, sinks=2, layers=1, heads=heads):
        got = run(model, tokens, path)
        names = ["sink_attention", "recency", "entropy"]
        report = ss.scan(model, ss.token_ids(tokens), metrics=names, attention=path, progress=False)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)
    oracle = expected(ref, np.ones(tokens.shape, dtype=bool), family.causal)
    for name in ("sink_attention", "recent_attention", "remaining_attention", "attention_entropy"):
        np.testing.assert_allclose(
            report[name].double().numpy(), oracle[name], atol=1e-5, rtol=1e-4, err_msg=name
        )


def test_windowed_attention_in_pieces(path: str) -> None:
    """Through a KV cache, a window of 4 and the first token are what they are in one piece."""
    family = BY_NAME["llama"]
    model, tokens, plain = bridge_of(family), family.tokens(), family.build()

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            i, j = torch.arange(24)[:, None], torch.arange(24)[None]
            seen = (j <= i) & ((i - j < 4) | (j == 0))
            bias = torch.zeros(1, 1, 24, 24).masked_fill(~seen, torch.finfo().min)
            return eager(module, query, key, value, bias, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
    with WindowedAttention(model, 4, sinks=1):
        assert_close(run(model, tokens, path), want)
        with ss.streaming(model) if path == "streaming" else nullcontext(), torch.no_grad():
            first = model.original_model(tokens[:, :9], use_cache=True)
            cache = first.past_key_values
            second = model.original_model(tokens[:, 9:], past_key_values=cache, use_cache=True)
    assert_close(torch.cat([first.logits, second.logits], dim=1), want)


@pytest.mark.parametrize("factor", [0.0, -2.5])
def test_scale_value(family: Family, path: str, factor: float) -> None:
    tokens, plain = family.tokens(), family.build()

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, **kwargs):
            value = value.clone()
            if layer_of(plain, module, family) == 1:
                value[:, 1, [0, P]] *= factor
            return eager(module, query, key, value, attention_mask, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    before = run(model, tokens, path)
    which = dict(positions=[0, P], layers=1, kv_heads=1)
    with ScaleValue(model, factor, **which) if factor else ZeroValue(model, **which):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


def test_replace_softmax(family: Family, path: str) -> None:
    tokens, plain = family.tokens(), family.build()
    model = bridge_of(family)
    if family.learned_sinks:
        with pytest.raises(UnsupportedError, match="learned sinks"):
            ReplaceSoftmax(model, "sigmoid")
        return
    if path == "eager" and not family.stock_scores:
        with pytest.raises(UnsupportedError, match="ignores an edited pattern"):
            with ReplaceSoftmax(model, "sigmoid"):
                run(model, tokens, path)
        return

    def change(eager: Attend) -> Attend:
        def attend(module, query, key, value, attention_mask, scaling=None, **kwargs):
            seen = hand_made_mask(family, layer_of(plain, module, family), query.shape[2])
            group = query.shape[1] // key.shape[1]
            key, value = (repeat(x, "b k t d -> b (k g) t d", g=group) for x in (key, value))
            scale = query.shape[-1] ** -0.5 if scaling is None else scaling
            scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
            if family.softcap is not None:
                scores = family.softcap * torch.tanh(scores / family.softcap)
            weights = torch.zeros_like(scores)
            for i in range(len(seen)):
                shifted = scores[:, :, i] - np.log(int(seen[i].sum()))
                weights[:, :, i] = torch.sigmoid(shifted) * seen[i]
            kept.append(weights[:, :, 1:, 0].mean(-1))
            return torch.einsum("bhqk,bhkd->bqhd", weights, value), weights

        return attend

    kept: list[torch.Tensor] = []
    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
    before = run(model, tokens, path)
    with ReplaceSoftmax(model, "sigmoid"):
        got = run(model, tokens, path)
        report = ss.scan(model, ss.token_ids(tokens), attention=path, progress=False)
        with ss.streaming(model), pytest.raises(UnsupportedError, match="log-sum-exp"):
            model.run_with_hooks(
                tokens, fwd_hooks=[("blocks.0.attn.hook_lse", lambda x, hook: None)]
            )
    assert_close(report.sink_attention, torch.stack(kept, dim=1))
    assert_close(got, want)
    assert torch.equal(run(model, tokens, path), before)


@pytest.mark.parametrize("operator", ["sigmoid", "relu", "off-by-one", "softpick", "off_by_one"])
def test_replace_softmax_beside_left_pads(path: str, operator: str) -> None:
    """A padded prompt is what it is alone: rotary positions only say how far apart tokens are."""
    model, tokens = bridge_of(BY_NAME["llama"]), BY_NAME["llama"].tokens(2, 12)
    real = torch.ones_like(tokens)
    real[0, :4] = 0
    with ReplaceSoftmax(model, operator):
        alone = run(model, tokens[:1, 4:], path), run(model, tokens[1:], path)
        with ss.streaming(model) if path == "streaming" else nullcontext(), torch.no_grad():
            padded = model(tokens, attention_mask=real)
    assert_close(padded[:1, 4:], alone[0])
    assert_close(padded[1:], alone[1])


# -- heads --------------------------------------------------------------------------------------

HEADS = [(0, 1), (2, 0), (2, 3)]


def with_heads(
    plain: PreTrainedModel, family: Family, new: Callable[[int, int, Tensor], Tensor]
) -> Callable[[Attend], Attend]:
    """Outputs of `HEADS` replaced by new(layer, head, output)."""

    def change(eager: Attend) -> Attend:
        def attend(module, *args, **kwargs):
            z, pattern = eager(module, *args, **kwargs)  # z [prompt position head d_head]
            z = z.clone()
            for layer, head in HEADS:
                if layer == layer_of(plain, module, family):
                    z[:, :, head] = new(layer, head, z[:, :, head])
            return z, pattern

        return attend

    return change


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_ablate_heads(family: Family, path: str, mode: str) -> None:
    tokens, plain = family.tokens(), family.build()
    other = family.tokens(prompts=5, length=16, seed=1)
    ref = reference(family.build(), other, parts=family.parts)

    def new(layer: int, head: int, z: Tensor) -> Tensor:
        if mode == "zero":
            return torch.zeros_like(z)
        typical = np.mean(ref["z"][layer, :, :, head].double().numpy(), axis=(0, 1))
        return torch.tensor(typical).float().expand_as(z)

    with attention(plain, with_heads(plain, family, new)), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    before = run(model, tokens, path)
    calibration = ss.token_ids(other) if mode == "mean" else None
    with AblateHeads(model, HEADS, mode=mode, calibration=calibration):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


def test_resampled_heads_are_those_of_one_calibration_prompt(family: Family, path: str) -> None:
    """With a single calibration prompt there is nothing to draw."""
    tokens, plain = family.tokens(), family.build()
    other = family.tokens(prompts=1, length=30, seed=1)
    ref = reference(family.build(), other, parts=family.parts)

    def new(layer: int, head: int, z: Tensor) -> Tensor:
        return ref["z"][layer, :, : z.shape[1], head].expand_as(z)

    with attention(plain, with_heads(plain, family, new)), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    with AblateHeads(model, HEADS, mode="resample", calibration=ss.token_ids(other)):
        got = run(model, tokens, path)
    assert_close(got, want)


# -- activations --------------------------------------------------------------------------------


@contextmanager
def module_output(
    model: PreTrainedModel, name: str, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]
) -> Iterator[None]:
    """Change what a module puts out, seen as [prompt position dim]."""

    def hook(module, args, output):
        first = output[0] if isinstance(output, tuple) else output
        new = change(first.reshape(*shape, -1).clone()).reshape(first.shape)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.get_submodule(name).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def module_of(family: Family, layer: int, at: str) -> str:
    block = f"{family.parts.blocks}.{layer}"
    part = {"resid_post": "", "attn_out": f".{family.parts.attention}"}
    return block + {**part, "mlp_out": f".{family.parts.ffn}"}[at]


@pytest.mark.parametrize("at", ["resid_post", "attn_out", "mlp_out"])
def test_set_activation(family: Family, path: str, at: str) -> None:
    tokens, plain = family.tokens(), family.build()
    dims, positions = [3, 17, 4], [P, 0]  # in no order: rows and columns of the value follow
    value = torch.arange(6.0).reshape(2, 3)

    def change(x: Tensor) -> Tensor:
        for row, p in enumerate(positions):
            for column, d in enumerate(dims):
                x[:, p, d] = value[row, column]
        return x

    with module_output(plain, module_of(family, 1, at), tokens.shape, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    before = run(model, tokens, path)
    with SetActivation(model, 1, dims, positions, value, at=at):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("part", ["attn", "mlp"])
def test_remove_output(family: Family, path: str, part: str, mode: str) -> None:
    tokens, plain = family.tokens(), family.build()
    other = family.tokens(prompts=5, seed=1)
    ref = reference(family.build(), other, parts=family.parts)[f"{part}_out"][1]
    typical = torch.tensor(np.mean(ref[:, [0, P]].double().numpy(), axis=0)).float()

    def change(x: Tensor) -> Tensor:
        x[:, [0, P]] = 0 if mode == "zero" else typical
        return x

    where = module_of(family, 1, f"{part}_out")
    with module_output(plain, where, tokens.shape, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    calibration = ss.token_ids(other) if mode == "mean" else None
    with RemoveOutput(model, 1, part, [P, 0], mode, calibration=calibration):
        got = run(model, tokens, path)
    assert_close(got, want)


def test_scale_activation(family: Family, path: str) -> None:
    tokens, plain = family.tokens(), family.build()

    def change(x: Tensor) -> Tensor:
        x[:, P] *= 7.0 / (x[:, P].double() ** 2).sum(-1, keepdim=True).float() ** 0.5
        return x

    where = module_of(family, 0, "resid_post")
    with module_output(plain, where, tokens.shape, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    with ScaleActivation(model, 0, P, norm=7.0):
        got = run(model, tokens, path)
    assert_close(got, want)


# -- positions ----------------------------------------------------------------------------------

TABLES = {
    "gpt2": ("transformer.wpe", 0),
    "opt": ("model.decoder.embed_positions", 2),
    "bert": ("bert.embeddings.position_embeddings", 0),
}


@pytest.mark.parametrize("mode", ["replace", "swap"])
@pytest.mark.parametrize("source", [0, -1], ids=["the first", "the last"])
def test_position_embedding_edit(family: Family, path: str, mode: str, source: int) -> None:
    model, tokens = bridge_of(family), family.tokens()
    if family.positions != "learned":
        with pytest.raises(UnsupportedError, match="PositionIdEdit"):
            PositionEmbeddingEdit(model, source, P, mode)
        return
    plain = family.build()
    name, first = TABLES[family.name]
    table = plain.get_submodule(name).weight
    old = table.detach().clone()
    other = first + (source if source >= 0 else len(table) - first + source)
    with torch.no_grad():
        table[first + P] = old[other]
        if mode == "swap":
            table[other] = old[first + P]
        want = plain(tokens).logits
    before, weights = run(model, tokens, path), model.W_pos.detach().clone()
    with PositionEmbeddingEdit(model, source, P, mode):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)
    assert torch.equal(model.W_pos, weights)


@pytest.mark.parametrize("mode", ["replace", "swap"])
def test_position_id_edit(family: Family, path: str, mode: str) -> None:
    model, tokens = bridge_of(family), family.tokens()
    if family.positions != "rotary":
        with pytest.raises(UnsupportedError, match="PositionEmbeddingEdit"):
            PositionIdEdit(model, 0, P, mode)
        return
    plain = family.build()
    ids = list(range(tokens.shape[1]))
    ids[P] = 1
    if mode == "swap":
        ids[1] = P
    # An explicit mask: ids out of order would otherwise be taken for packed sequences.
    real = torch.ones_like(tokens)
    with torch.no_grad():
        want = plain(tokens, attention_mask=real, position_ids=torch.tensor([ids])).logits
    before = run(model, tokens, path)
    with PositionIdEdit(model, 1, P, mode):
        got = run(model, tokens, path)
    assert_close(got, want)
    assert (got - before).abs().max() > 1e-3
    assert torch.equal(run(model, tokens, path), before)


@pytest.mark.parametrize("target, source, mode", [(24, 0, "replace"), (3, 24, "swap")])
def test_a_position_id_that_no_token_has_is_refused(
    path: str, target: int, source: int, mode: str
) -> None:
    """Source 24 may be given to a token (a plain model shows what comes out), but not swapped."""
    family = BY_NAME["llama"]
    model, plain, tokens = bridge_of(family), family.build(), family.tokens(length=24)
    edit = PositionIdEdit(model, source, target, mode)
    with pytest.raises(TextError, match="24 lies outside .* 0 to 23"), edit:
        run(model, tokens, path)
    with pytest.raises(TextError, match="0 to 23"), edit:
        ss.scan(model, ss.token_ids(tokens), attention=path, progress=False)
    ids, real = list(range(24)), torch.ones_like(tokens)
    ids[3] = 24
    with torch.no_grad():
        want = plain(tokens, attention_mask=real, position_ids=torch.tensor([ids])).logits
    with PositionIdEdit(model, 24, 3):
        assert_close(run(model, tokens, path), want)


ROPES = {
    "dynamic": {"factor": 2.0},
    "longrope": {
        "factor": 2.0,
        "original_max_position_embeddings": 32,
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
    },
    "yarn": {"factor": 2.0, "original_max_position_embeddings": 32},
}


@pytest.mark.parametrize("kind", ROPES)
def test_position_ids_that_turn_other_tokens_are_refused(kind: str) -> None:
    """Where an id beyond the trained length changes what plain transformers does before it."""
    config = LlamaConfig(
        **{"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
        **{"num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0},
        initializer_range=0.3,
        rope_parameters={"rope_type": kind, "rope_theta": 1e4, **ROPES[kind]},
    )
    torch.manual_seed(0)
    plain = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    tokens = BY_NAME["llama"].tokens(length=24)
    ids, real = torch.arange(24)[None], torch.ones_like(tokens)
    far = ids.masked_fill(ids == 15, 40)
    with torch.no_grad():
        first, second = (
            plain(tokens, attention_mask=real, position_ids=i).logits for i in (ids, far)
        )
    others_turn = bool((first[:, :15] - second[:, :15]).abs().max() > 1e-4)
    assert others_turn == (kind != "yarn")
    model = ss.load_model(copy.deepcopy(plain))
    if others_turn:
        with pytest.raises(UnsupportedError, match=kind):
            PositionIdEdit(model, 40, 15)
    else:
        with PositionIdEdit(model, 40, 15):
            assert_close(run(model, tokens, "eager"), second)


# -- manners ------------------------------------------------------------------------------------


def fingerprint(model: object) -> tuple:
    """Everything an intervention could leave behind."""
    modules = list(model.modules())
    hooks = [
        (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_pre_hooks_with_kwargs))
        for m in modules
    ]
    points = [len(point.fwd_hooks) for point in model.hook_dict.values()]
    state = {name: tensor.clone() for name, tensor in model.original_model.state_dict().items()}
    return hooks, points, state, model.context_level


def same(one: tuple, other: tuple) -> bool:
    states = one[2].keys() == other[2].keys() and all(
        torch.equal(one[2][name], other[2][name]) for name in one[2]
    )
    return states and one[:2] == other[:2] and one[3] == other[3]


def every_intervention(model: object, family: Family) -> list:
    """One of each kind, as far as the family has what it edits (see `Family` and the signals)."""
    signals = ss.capabilities(model).signals
    found = [
        SelfOnlyMask(model, P),
        ShiftSinkLogit(model, 2.0),
        WindowedAttention(model, 4, sinks=1),
        ScaleValue(model, 0.5, P),
        AblateHeads(model, HEADS),
        SetActivation(model, 1, [0, 5], P, 3.0),
        RemoveOutput(model, 0, "mlp", 0),
        ScaleActivation(model, 0, P, 2.0),
        Quantise(model, "int4-token", "value", keep=0),
    ]
    if family.moe:
        found.append(AblateExperts(model, [(1, 0), (1, 2)]))
    if family.stock_scores and not family.learned_sinks:
        found.append(ReplaceSoftmax(model, "sigmoid"))
    if "key" in signals:
        found.append(SinkTransplant(model, ss.token_ids(family.tokens(seed=1)), what="both"))
    if family.positions == "learned":
        return [*found, PositionEmbeddingEdit(model, 0, P, "swap")]
    return [*found, PositionIdEdit(model, 0, P)]


def test_every_intervention_is_public_and_among_those_tested_below() -> None:
    kinds = {
        name: kind
        for name in interventions.__all__
        if issubclass(kind := getattr(interventions, name), Intervention)
    }
    for name in kinds.keys() - set(ss.__all__):
        raise AssertionError(f"{name} lacks a line in sinkscope/__init__.pyi")
    families = [BY_NAME[name] for name in ("llama", "gpt2", "mixtral")]
    tested = tuple(
        type(one)
        for family in families
        for one in every_intervention(ss.load_model(family.build()), family)
    )
    for name, kind in kinds.items():  # ZeroValue is a ScaleValue
        assert issubclass(kind, tested), f"add {name} to every_intervention() in this file"


def test_the_model_comes_out_as_it_went_in(family: Family) -> None:
    """After an error inside, after nesting, and when entered a second time."""
    model, tokens = ss.load_model(family.build()), family.tokens()
    every = every_intervention(model, family)
    before = fingerprint(model)
    logits = run(model, tokens, "eager")
    for intervention in every:
        with pytest.raises(KeyError, match="mine"), intervention:
            run(model, tokens, "eager")
            raise KeyError("mine")
        assert same(fingerprint(model), before), type(intervention).__name__
        assert torch.equal(run(model, tokens, "eager"), logits)
    first, second = every[0], every[-1]
    for _ in range(2):
        with first, second:
            changed = run(model, tokens, "eager")
        assert same(fingerprint(model), before)
    with second, first:
        assert_close(run(model, tokens, "eager"), changed)


def test_nested_interventions_compose(family: Family, path: str) -> None:
    """A mask and a value edit at once equal both by hand."""
    tokens, plain = family.tokens(), family.build()

    def change(eager: Attend) -> Attend:
        inner = masked(plain, family, [P])(eager)

        def attend(module, query, key, value, attention_mask, **kwargs):
            value = value.clone()
            value[:, :, 0] = 0
            return inner(module, query, key, value, attention_mask, **kwargs)

        return attend

    with attention(plain, change), torch.no_grad():
        want = plain(tokens).logits
    model = bridge_of(family)
    with SelfOnlyMask(model, P), ZeroValue(model, 0):
        got = run(model, tokens, path)
    assert_close(got, want)


def test_a_look_at_the_model_sees_no_intervention(family: Family) -> None:
    """Capabilities are those of the model itself, also when first asked for inside."""
    model = ss.load_model(family.build())
    with ss.streaming(model):
        plain = ss.capabilities(model)
    before = ss.capabilities(model)
    entered = [SelfOnlyMask(model, 3), ShiftSinkLogit(model, 2.0)]
    if family.positions == "rotary":
        entered.append(PositionIdEdit(model, 0, 20))  # beyond the probe's tokens
    with ExitStack() as stack:
        for intervention in entered:
            stack.enter_context(intervention)
        stack.enter_context(ss.streaming(model))
        inside = ss.capabilities(model)
    assert inside == plain
    assert ss.capabilities(model) == before


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("kind", ["mask", "shift", "value", "set", "scale"])
def test_a_prompt_that_ends_before_the_position_is_refused(kind: str, batch: int) -> None:
    """Whatever else is in its batch; where all reach it, each is measured as if it were alone."""
    family = BY_NAME["llama"]
    model, tokens = ss.load_model(family.build()), family.tokens(prompts=3, length=24)
    make = {
        "mask": lambda: SelfOnlyMask(model, 15),
        "shift": lambda: ShiftSinkLogit(model, 2.0, 15),
        "value": lambda: ZeroValue(model, [0, 15]),
        "set": lambda: SetActivation(model, 0, 1, 15),
        "scale": lambda: ScaleActivation(model, 0, 15, 2.0),
    }[kind]

    def ends_after(length: int) -> Texts:
        mask = torch.ones_like(tokens, dtype=torch.bool)
        mask[0, length:] = False
        return Texts(tokens.masked_fill(~mask, 0), mask, bos="", source="")

    def measure(texts: object) -> Tensor:
        with make():
            report = ss.scan(model, texts, metrics="sink_attention", batch=batch, progress=False)
        return report.sink_attention

    with pytest.raises(TextError, match="position 15, .* 0 to 14"):
        measure(ends_after(15))
    with make(), pytest.raises(TextError, match="position 15, .* 0 to 14"):
        AblateHeads(model, HEADS, "mean", calibration=ends_after(15))
    together = measure(ends_after(16))
    alone = [measure(ss.token_ids(tokens[:1, :16])), measure(ss.token_ids(tokens[1:]))]
    torch.testing.assert_close(together, torch.cat(alone))
    ss.scan(model, ends_after(15), metrics="sink_attention", progress=False)  # nothing is left


def test_an_edit_to_another_number_of_heads_is_refused() -> None:
    """A kernel of torch would end the process: it divides by the heads of a KV head."""
    model = ss.load_model(BY_NAME["llama"].build())
    point = ss.capabilities(model).hook("query", 0)
    with model.hooks(fwd_hooks=[(point, lambda x, hook: x[:, :, :1])]):
        with pytest.raises(UnsupportedError, match="1 heads of queries, 2 of keys"):
            run(model, BY_NAME["llama"].tokens(), "streaming")


def test_refusals() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    tokens = BY_NAME["llama"].tokens(length=8)
    with pytest.raises(TextError, match="0 to 7"), SelfOnlyMask(model, 8):
        run(model, tokens, "eager")
    with pytest.raises(TextError, match="0 to 7"), RemoveOutput(model, 0, "mlp", 8):
        run(model, tokens, "eager")
    with pytest.raises(TextError, match="whole numbers"):
        SelfOnlyMask(model, -1)
    with pytest.raises(UnsupportedError, match="layers run from 0 to 2"):
        SelfOnlyMask(model, 0, layers=3)
    with pytest.raises(UnsupportedError, match="heads run from 0 to 3"):
        AblateHeads(model, [(0, 4)])
    with pytest.raises(UnsupportedError, match="pairs"):
        AblateHeads(model, iter([3]))
    with pytest.raises(UnsupportedError, match="kv_heads run from 0 to 1"):
        ZeroValue(model, 0, kv_heads=2)
    with pytest.raises(UnsupportedError, match="dims run from 0 to 31"):
        SetActivation(model, 0, 32, 0)
    with pytest.raises(UnsupportedError, match="calibration"):
        SetActivation(model, 0, 1, 0, "mean")
    with pytest.raises(UnsupportedError, match="mode is .median.; expected one of"):
        SetActivation(model, 0, 1, 0, "median")
    with pytest.raises(UnsupportedError, match="broadcast"):
        SetActivation(model, 0, [1, 2], 0, torch.zeros(3))
    with pytest.raises(UnsupportedError, match=r"shape \(3,\), .* broadcast .* \[1, 2\]"):
        SetActivation(model, 0, [1, 2], 0, [1.0, 2.0, 3.0])
    for value in ([[1.0], [2.0, 3.0]], [None]):
        with pytest.raises(UnsupportedError, match="a number or a tensor"):
            SetActivation(model, 0, [1, 2], 0, value)
    held = SetActivation(model, 0, [1, 2], [9, 4], [[1.0, 2.0], [3.0, 4.0]])
    assert held.value.tolist() == [[3.0, 4.0], [1.0, 2.0]]  # in the order of the positions 4, 9
    with pytest.raises(TextError, match="No calibration prompt reaches"):
        SetActivation(model, 0, 1, 9, "mean", calibration=ss.token_ids(tokens))
    with pytest.raises(UnsupportedError, match="finite number"):
        ShiftSinkLogit(model, float("-inf"))
    with pytest.raises(UnsupportedError, match="window"):
        WindowedAttention(model, 0)
    with pytest.raises(UnsupportedError, match="heads run from 0 to 3"):
        WindowedAttention(model, 4, heads=4)
    with pytest.raises(UnsupportedError, match="one mask for all heads"):
        WindowedAttention(ss.load_model("bb-3l"), 4, heads=0)
    with pytest.raises(UnsupportedError, match="either a factor or a norm"):
        ScaleActivation(model, 0, 0)
    with pytest.raises(UnsupportedError, match="mode is .tanh.; expected one of"):
        ReplaceSoftmax(model, "tanh")
    mask = SelfOnlyMask(model, 0)
    with mask, pytest.raises(SinkscopeError, match="active already"), mask:
        pass
    bert = ss.load_model(BY_NAME["bert"].build())
    with pytest.raises(TextError, match="64 learned positions"):
        PositionEmbeddingEdit(bert, 0, 64)

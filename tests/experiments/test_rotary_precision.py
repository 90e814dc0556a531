"""Shifted rotary positions, against transformers' eager forward called with position ids."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope.attention import rounded
from sinkscope.attention.call import AttentionCall
from sinkscope.errors import ReportError, UnsupportedError
from sinkscope.experiments import rotary_precision as module
from sinkscope.experiments.partial_forward import Partway
from sinkscope.experiments.rotary_precision import RotaryPrecision, rotary_precision

from ..families.architectures import BY_NAME, N_LAYERS, Family

T = 20
SHIFTS = (16, 1000)


@contextmanager
def wide_angles(model: PreTrainedModel, rounds: bool) -> Iterator[None]:
    """Cos and sin in float32; rotated queries and keys rounded, or all of attention in float32."""
    rotary = model.model.rotary_emb
    inner, home = rotary.forward, sys.modules[type(model).__module__]
    eager = home.eager_attention_forward

    def attend(module, query, key, value, mask, **kwargs):
        if rounds:
            return eager(module, query.to(value.dtype), key.to(value.dtype), value, mask, **kwargs)
        mask = None if mask is None else mask.float()
        z, weights = eager(module, query.float(), key.float(), value.float(), mask, **kwargs)
        return z.to(value.dtype), weights

    forward = lambda x, *args, **kwargs: inner(x.float(), *args, **kwargs)  # noqa: E731
    with (
        mock.patch.object(rotary, "forward", forward),
        mock.patch.object(home, "eager_attention_forward", attend),
    ):
        yield


@contextmanager
def wide_scores(model: PreTrainedModel) -> Iterator[None]:
    home = sys.modules[type(model).__module__]
    eager = home.eager_attention_forward

    def attend(module, query, key, value, mask, **kwargs):
        mask = None if mask is None else mask.float()
        z, weights = eager(module, query.float(), key.float(), value.float(), mask, **kwargs)
        return z.to(value.dtype), weights

    with mock.patch.object(home, "eager_attention_forward", attend):
        yield


def by_hand(model: PreTrainedModel, tokens: Tensor, part: str, shift: int) -> tuple[Tensor, Tensor]:
    """Weights [layer head query key] and logits of one prompt, every position id shifted."""
    how = {
        "": nullcontext,
        "angles": lambda: wide_angles(model, rounds=True),
        "scores": lambda: wide_scores(model),
        "both": lambda: wide_angles(model, rounds=False),
    }[part]
    ids = torch.arange(len(tokens))[None] + shift
    with how(), torch.no_grad():
        out = model(tokens[None], position_ids=ids, output_attentions=True, use_cache=False)
    return torch.stack(out.attentions)[:, 0].double(), out.logits[0].double()


def check(
    found: RotaryPrecision,
    family: Family,
    dtype: torch.dtype,
    tokens: Tensor,
    index: int,
    part: str,
) -> None:
    """Every number of one arithmetic. float32 rounding of sums, and no more."""
    model, windows = family.build().to(dtype), family.windows
    near = dict(rtol=1e-3, atol=2e-6)
    for prompt, row in enumerate(tokens):
        before, logits = by_hand(model, row, part, 0)
        targets = row[1:]
        loss = -logits[:-1].log_softmax(-1)[range(len(targets)), targets].mean()
        assert float(found.loss[index, prompt]) == pytest.approx(float(loss), abs=1e-5)
        want = before[:, :, 1:, 0].mean(-1)
        torch.testing.assert_close(found.first_attention[index, prompt].double(), want, **near)
        for at, shift in enumerate(found.shifts):
            after, moved = by_hand(model, row, part, shift)
            change = (after - before).abs()
            where = index, at, prompt
            for name, want in {
                "error": change[:, :, 1:].sum(-1).mean(-1),
                "first_error": change[:, :, 1:, 0].mean(-1),
                "largest_error": change.amax((2, 3)),
                "largest_error_by_key": change.amax((1, 2)),
            }.items():
                got = getattr(found, name)[where].double()
                torch.testing.assert_close(got, want, **near, msg=lambda m, n=name: f"{n}: {m}")
            for layer in range(N_LAYERS):
                for key in range(T):
                    window = windows[layer]
                    seeing = [i for i in range(key, T) if window is None or i - key < window]
                    want = float(change[layer][:, seeing, key].mean())
                    got = float(found.error_by_key[where][layer, key])
                    assert got == pytest.approx(want, rel=1e-3, abs=2e-6)
                for bucket, low in enumerate(found.bucket.tolist()):
                    high = T if bucket + 1 == len(found.bucket) else 2 * low
                    want = float(change[layer, :, low:high].sum(-1).mean())
                    got = float(found.error_by_query[where][layer, bucket])
                    assert got == pytest.approx(want, rel=1e-3, abs=2e-6)
            p, q = logits.log_softmax(-1), moved.log_softmax(-1)
            kl = float((p.exp() * (p - q)).sum(-1).mean())
            assert float(found.divergence[where]) == pytest.approx(kl, rel=1e-2, abs=1e-8)


@pytest.mark.parametrize(
    ("name", "part"),
    [("llama", ""), ("llama", "both"), ("mistral", "")] + [("gemma3", p) for p in module.KEPT],
)
def test_equals_transformers_in_bfloat16(name: str, part: str) -> None:
    """Two prompts; the errors are roundings, so that agreement means the same roundings."""
    family = BY_NAME[name]
    tokens = family.tokens(2, T)
    texts = ss.token_ids(tokens)
    found = rotary_precision(
        family.build(), texts, shifts=SHIFTS, dtypes=["bfloat16"], keep=[part], progress=False
    )
    check(found, family, torch.bfloat16, tokens, 0, part)
    if part in ("", "scores"):
        assert found.error.min() > 1e-4
        assert (found.first_share() < 0.5).all()
    if part == "both":
        assert found.error.max() < 1e-2


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_equals_transformers_in_float32_and_float16(name: str) -> None:
    """In float32 a shift changes next to nothing; what it does is a few units in the last place."""
    family = BY_NAME[name]
    tokens = family.tokens(1, T)
    found = rotary_precision(
        family.build(), ss.token_ids(tokens), shifts=[16], dtypes=["float32", "float16"],
        keep=[""], progress=False,
    )  # fmt: skip
    assert found.arithmetics == ["float32", "float16"]
    assert found.error[0].max() < 1e-4 and found.error[1].min() > found.error[0].max()
    check(found, family, torch.float16, tokens, 1, "")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_learned_sink_is_rounded_as_in_gpt_oss(dtype: torch.dtype) -> None:
    from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

    draw = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(2, heads, 9, 8, generator=draw).to(dtype) for heads in (4, 2, 2)
    )
    core = torch.nn.Module()
    core.num_key_value_groups, core.sinks = 2, torch.randn(4, generator=draw).to(dtype)
    core.eval()
    hidden = torch.ones(9, 9, dtype=torch.bool).triu(1)
    mask = torch.zeros(1, 1, 9, 9, dtype=dtype).masked_fill(hidden, torch.finfo(dtype).min)
    _, want = eager_attention_forward(core, query, key, value, mask, scaling=0.3)
    call = AttentionCall(scale=0.3, learned_sink=core.sinks)
    ((_, _, found),) = rounded.rounded_patterns(query, key, call)
    assert torch.equal(found, want)


def test_pieces_and_padding_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries in pieces of two; a short prompt beside a long one."""
    family = BY_NAME["mistral"]
    rows = family.tokens(2, T)
    texts = ss.token_ids([rows[0].tolist(), rows[1, :9].tolist()])
    options = dict(shifts=[16], dtypes=["float32"], progress=False)
    whole = rotary_precision(family.build(), texts, **options)
    alone = rotary_precision(family.build(), ss.token_ids(rows[1:, :9]), **options)
    monkeypatch.setattr(rounded, "ELEMENTS", 2 * 4 * T)
    pieces = rotary_precision(family.build(), texts, **options)
    near = dict(rtol=0.5, atol=1e-6, equal_nan=True)  # the errors are roundings themselves
    for name in ("error", "first_attention", "error_by_key", "error_by_query", "loss"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name), **near)
    np.testing.assert_allclose(whole.loss[0, 1], alone.loss[0, 0], rtol=1e-6)
    torch.testing.assert_close(whole.error[:, :, 1:], alone.error, **near)
    assert whole.error_by_key[0, 0, 1, :, 9:].isnan().all()


def test_without_a_shift_nothing_changes() -> None:
    """Two runs with the same ids are equal bit by bit, in half precision too."""
    family = BY_NAME["llama"]
    with mock.patch.object(module, "with_ids", lambda args, kwargs, edit: (args, kwargs)):
        found = rotary_precision(
            family.build(), ss.token_ids(family.tokens(1, T)), shifts=[16],
            dtypes=["bfloat16"], progress=False,
        )  # fmt: skip
    assert found.error.abs().max() == 0 and found.divergence.abs().max() == 0
    assert (found.shifted_loss[:, 0] == found.loss).all()


def test_overflow_is_said_and_left_out() -> None:
    """As activations of one prompt beyond 65,504 are in float16."""
    final = Partway.final

    def overflows(self, tokens: Tensor, *rest, **options) -> Tensor:
        x = final(self, tokens, *rest, **options)
        return x / 0 if x.dtype == torch.float16 and tokens.shape[1] == T else x

    tokens = BY_NAME["llama"].tokens(2, T)
    texts = ss.token_ids([tokens[0].tolist(), tokens[1, :9].tolist()])
    with mock.patch.object(Partway, "final", overflows):
        found = rotary_precision(
            BY_NAME["llama"].build(), texts, shifts=[16], dtypes=["float16", "float32"],
            keep=[""], progress=False,
        )  # fmt: skip
    assert found.overflowed.tolist() == [[1, 0], [0, 0]]
    assert found.error[0, :, 0].isnan().all() and not found.error[0, :, 1].isnan().any()
    assert "In float16 activations overflowed on 1 of 2 prompts" in found.summary()
    found.figures()


def test_it_goes_on_from_its_file(tmp_path: Path) -> None:
    family, file = BY_NAME["llama"], tmp_path / "positions.nc"
    texts = ss.token_ids(family.tokens(2, T))
    options = dict(shifts=[16], dtypes=["bfloat16"], keep=["", "both"], progress=False)
    measure, ran = module._Run.measure, []

    def fails(self, prompt: int, tokens: Tensor) -> None:
        if len(ran) == 3:
            raise KeyboardInterrupt
        ran.append(prompt)
        measure(self, prompt, tokens)

    bridge = family.build()
    with mock.patch.object(module._Run, "measure", fails), pytest.raises(KeyboardInterrupt):
        rotary_precision(bridge, texts, file=file, **options)
    with mock.patch.object(module._Run, "measure", autospec=True, side_effect=measure) as again:
        found = rotary_precision(bridge, texts, file=file, **options)
    assert again.call_count == 1
    whole = rotary_precision(bridge, texts, **options)
    torch.testing.assert_close(found.error, whole.error, rtol=0, atol=0)
    with pytest.raises(ReportError, match="shifts"):
        rotary_precision(bridge, texts, file=file, **{**options, "shifts": [32]})
    written = found.save(tmp_path / "positions")
    assert [path.suffix for path in written] == [".json", ".csv", ".html"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gpt2", "has learned positions: a shift gives every token another vector"),
        ("bloom", "adds a position bias to its scores"),
        ("gptj", "computes its rotary angles where its position ids cannot be shifted"),
    ],
)
def test_other_positions_are_refused(name: str, reason: str) -> None:
    family = BY_NAME[name]
    with pytest.raises(UnsupportedError, match=reason):
        rotary_precision(family.build(), ss.token_ids(family.tokens(1, 8)), progress=False)


def test_arguments() -> None:
    bridge = ss.load_model(BY_NAME["llama"].build())
    texts = ss.token_ids(BY_NAME["llama"].tokens(1, 8))
    assert rotary_precision(bridge, texts, progress=False).arithmetics == ["float32"]
    with pytest.raises(UnsupportedError, match="This bridge is in float32, not bfloat16"):
        rotary_precision(bridge, texts, dtypes=["bfloat16"])
    with pytest.raises(UnsupportedError, match="mode is 'half'"):
        rotary_precision(bridge, texts, keep=["half"])
    assert not bridge.blocks[0].attn.hook_rot_q.fwd_hooks

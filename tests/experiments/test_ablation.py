"""Removal: what is refused, what is left behind, what an interrupted run comes to."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.devices import in_pieces
from sinkscope.errors import ModelError, ReportError, TextError, UnsupportedError
from sinkscope.experiments import partial_forward as _partway
from sinkscope.experiments.ablation import ablate_heads
from sinkscope.experiments.partial_forward import Partway
from sinkscope.interventions import (
    AblateHeads,
    PositionIdEdit,
    ScaleActivation,
    SelfOnlyMask,
    SetActivation,
    ShiftSinkLogit,
    WindowedAttention,
    ZeroValue,
)
from tests.families.architectures import BY_NAME

LLAMA = BY_NAME["llama"]
removal_module = sys.modules["sinkscope.experiments.ablation"]  # a name that the function hides


@pytest.fixture
def model():
    return ss.load_model(LLAMA.build())


@pytest.fixture
def texts():
    return ss.token_ids(LLAMA.tokens(prompts=5, length=16))


def test_ragged_prompts_cost_what_they_cost_alone(model) -> None:
    ids = LLAMA.tokens(prompts=3, length=20).tolist()
    ids = [ids[0][:9], ids[1], ids[2][:14]]
    together = ablate_heads(model, ss.token_ids(ids), progress=False)
    for prompt, row in enumerate(ids):
        alone = ablate_heads(model, ss.token_ids([row]), progress=False)
        torch.testing.assert_close(
            together.ablated_loss[prompt], alone.ablated_loss[0], atol=1e-5, rtol=0
        )


def test_a_prompt_that_ends_before_an_intervention_is_refused(model) -> None:
    ids = LLAMA.tokens(prompts=2, length=20).tolist()
    with ZeroValue(model, 15), pytest.raises(TextError, match="outside the shortest prompt"):
        ablate_heads(model, ss.token_ids([ids[0][:9], ids[1]]), progress=False)


def test_some_heads_on_some_prompts(model, texts) -> None:
    whole = ablate_heads(model, texts, progress=False)
    few = ablate_heads(model, texts, heads=[(0, 3), (2, 1)], progress=False)
    assert int((~few.ablated_loss.isnan()).sum()) == 2 * 5
    assert torch.allclose(few.ablated_loss[:, 2, 1], whole.ablated_loss[:, 2, 1], atol=1e-6)
    where = torch.zeros(5, 3, 4, dtype=torch.bool)
    where[:2] = True
    where[:, 1, 1] = True
    both = ablate_heads(model, texts, heads=where, batch=2, progress=False)
    assert torch.equal(~both.ablated_loss.isnan(), where)
    assert torch.allclose(both.ablated_loss[where], whole.ablated_loss[where], atol=1e-6)
    frame = few.to_frame()
    assert list(zip(frame["layer"], frame["head"], strict=True)) == [(0, 3), (2, 1)]
    np.testing.assert_allclose(
        frame["loss_change"], few.loss_change.mean(0)[[0, 2], [3, 1]], atol=1e-6
    )


def test_resampling_takes_another_prompt_and_the_same_for_all_heads(model, texts) -> None:
    """Each head's loss is that of a run in which some other prompt's output stands in."""
    got = ablate_heads(model, texts, "resample", seed=3, progress=False)
    partway = Partway(model)
    fits = torch.zeros(5, 5, dtype=torch.bool)  # [prompt, who may stand in]
    for other in range(5):
        stand_in = ss.token_ids(texts.tokens[other : other + 1])
        agree = torch.ones(5, dtype=torch.bool)
        for layer, head in [(0, 0), (1, 2), (2, 3)]:
            with AblateHeads(model, [(layer, head)], "resample", calibration=stand_in):
                with partway.opened():
                    final = partway.final(texts.tokens, texts.mask)
                    losses = partway.losses(texts.tokens, texts.mask, final)
            agree &= (losses - got.ablated_loss[:, layer, head]).abs() < 1e-5
        fits[:, other] = agree
    assert fits.sum(dim=1).tolist() == [1] * 5, "one prompt stands in for each"
    assert not fits.diagonal().any(), "and never the prompt itself"
    assert fits.sum(dim=0).tolist() == [1] * 5


def test_a_window_is_that_of_whole_passes(model, texts) -> None:
    """Head by head against `WindowedAttention`, on prompts of several lengths."""
    rows = [ids[:n].tolist() for ids, n in zip(texts.tokens, (12, 8, 12, 6, 10), strict=True)]
    ragged = ss.token_ids(rows)
    heads = [(0, 0), (1, 2), (2, 3)]
    got = ablate_heads(model, ragged, "window", heads=heads, window=3, sinks=1, progress=False)
    for prompt, ids in enumerate(rows):
        tokens = torch.tensor([ids])
        for layer, head in heads:
            restricted = WindowedAttention(model, 3, sinks=1, layers=layer, heads=head)
            with restricted, torch.no_grad():
                want = float(model(tokens, return_type="loss"))
            assert float(got.ablated_loss[prompt, layer, head]) == pytest.approx(want, abs=1e-5)
    assert got.loss_change[:, [0, 1, 2], [0, 2, 3]].abs().min() > 1e-6
    wide = ablate_heads(model, ragged, "window", heads=heads, window=12, sinks=0, progress=False)
    assert wide.loss_change[:, 0, 0].abs().max() < 1e-6
    with pytest.raises(UnsupportedError, match="window"):
        ablate_heads(model, ragged, "window", window=0, progress=False)


HEADS = [(0, 1), (0, 2), (1, 0), (1, 3), (2, 1)]
IN_FORCE: dict[str, Callable[[Any], AbstractContextManager[Any]]] = {
    "SelfOnlyMask": lambda m: SelfOnlyMask(m, 18),
    "SelfOnlyMask in some layers": lambda m: SelfOnlyMask(m, 13, layers=[0, 2]),
    "ShiftSinkLogit": lambda m: ShiftSinkLogit(m, 2.0, 15),
    "PositionIdEdit": lambda m: PositionIdEdit(m, 3, 17),
    "ZeroValue": lambda m: ZeroValue(m, 15),
    "AblateHeads": lambda m: AblateHeads(m, [(0, 1), (2, 0)]),
    "SetActivation": lambda m: SetActivation(m, 2, range(8), 5, 1.0),
    "SetActivation far along": lambda m: SetActivation(m, 0, range(8), 17, 1.0),
    "ScaleActivation": lambda m: ScaleActivation(m, 0, 5, 3.0),
    "ScaleActivation of an input": lambda m: ScaleActivation(m, 1, 15, 0.3, at="resid_pre"),
    "ScaleActivation of what attention adds": lambda m: ScaleActivation(
        m, 2, 16, 3.0, at="attn_out"
    ),
    "the final norm": lambda m: m.hooks(fwd_hooks=[("ln_final.hook_out", _third)]),
}


def _third(x: torch.Tensor, hook: Any) -> torch.Tensor:
    return torch.cat([x[:, :3], 3 * x[:, 3:4], x[:, 4:-1], -x[:, -1:]], dim=1)


@pytest.mark.parametrize(("path", "logits"), [("auto", 8 * 97), ("eager", 2**23)])
@pytest.mark.parametrize("what", IN_FORCE)
def test_interventions_hold_as_in_whole_passes(model, monkeypatch, what, path, logits) -> None:
    """Heads against AblateHeads and the loss of a whole pass; with logits in pieces, too."""
    monkeypatch.setitem(_partway._LOGITS, "cpu", logits)
    monkeypatch.setattr(removal_module, "Partway", functools.partial(Partway, path=path))
    tokens = LLAMA.tokens(prompts=3, length=20)

    def loss() -> torch.Tensor:
        with torch.no_grad():
            told = model(tokens)[:, :-1].double().log_softmax(-1)
        return -told.gather(-1, tokens[:, 1:, None]).mean(dim=(1, 2)).float()

    plain = loss()
    with IN_FORCE[what](model):
        got = ablate_heads(model, ss.token_ids(tokens), heads=HEADS, progress=False)
        assert (got.loss - plain).abs().max() > 1e-3, "the intervention does nothing"
        torch.testing.assert_close(got.loss, loss(), atol=1e-5, rtol=0)
        for layer, head in HEADS:
            with AblateHeads(model, [(layer, head)]):
                want = loss()
            torch.testing.assert_close(got.ablated_loss[:, layer, head], want, atol=1e-5, rtol=0)
    torch.testing.assert_close(loss(), plain)


def test_the_model_comes_out_as_it_went_in(model, texts, monkeypatch) -> None:
    before = model(texts.tokens)

    def fail(*args: object) -> None:
        raise ValueError("mine")

    ablate_heads(model, texts, heads=[(1, 1)], progress=False)
    monkeypatch.setattr(Partway, "losses", fail)
    with pytest.raises(ValueError, match="mine"):
        ablate_heads(model, texts, heads=[(1, 1)], progress=False)
    assert torch.equal(model(texts.tokens), before)
    for block in model.blocks:
        assert "forward" not in vars(block.original_component)
    assert not any(point.fwd_hooks for point in model.hook_dict.values())


def test_an_interrupted_run_continues_and_comes_to_the_same(
    model, texts, tmp_path, monkeypatch
) -> None:
    file = tmp_path / "removal.nc"
    whole = ablate_heads(model, texts, batch=2, progress=False)
    real, calls = Partway.losses, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) == limit:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(Partway, "losses", counted)
    limit = 6  # in the middle of the second batch of prompts
    with pytest.raises(KeyboardInterrupt):
        ablate_heads(model, texts, batch=2, file=file, progress=False)
    begun, limit = len(calls), 0
    again = ablate_heads(model, texts, batch=2, file=file, progress=False)
    # Three batches of a pass each and three layers; the first batch is not run again.
    assert begun + len(calls[begun:]) < 12 + 6
    assert torch.equal(again.ablated_loss, whole.ablated_loss)
    done = len(calls)
    assert ablate_heads(model, texts, file=file, progress=False).ablated_loss.equal(
        whole.ablated_loss
    )
    assert len(calls) == done, "nothing is left to measure"


def test_what_is_refused_leaves_no_file_in_the_way(model, tmp_path) -> None:
    file, ragged = tmp_path / "removal.nc", ss.token_ids([[5, 6, 7], [5, 6]])
    with pytest.raises(TextError, match="equal length"):
        ablate_heads(model, ragged, "resample", file=file, progress=False)
    assert not file.exists()
    kept = ablate_heads(model, ragged, "zero", file=file, progress=False)
    again = ablate_heads(model, ragged, "zero", file=file, progress=False)
    assert file.exists() and torch.equal(again.ablated_loss, kept.ablated_loss)


@pytest.mark.parametrize("other", ["mode", "tokens", "seed"])
def test_a_file_of_other_settings_is_refused(model, texts, tmp_path, other) -> None:
    file = tmp_path / "removal.nc"
    ablate_heads(model, texts, heads=[(0, 0)], file=file, progress=False)
    changed = {
        "mode": (texts, dict(mode="mean")),
        "tokens": (ss.token_ids(texts.tokens.flip(0)), dict()),
        "seed": (texts, dict(seed=1)),
    }
    prompts, options = changed[other]
    with pytest.raises(ReportError, match=f"another {other}"):
        ablate_heads(model, prompts, heads=[(0, 0)], file=file, progress=False, **options)


def test_what_is_refused(model, texts) -> None:
    with pytest.raises(UnsupportedError, match="mode is .median.; expected one of"):
        ablate_heads(model, texts, "median")
    with pytest.raises(UnsupportedError, match="heads run from 0 to 3"):
        ablate_heads(model, texts, heads=[(0, 4)])
    with pytest.raises(UnsupportedError, match=r"pairs \(layer, head\).* not tensor"):
        ablate_heads(model, texts, heads=iter(torch.tensor([[0, 0, 1]])))
    with pytest.raises(UnsupportedError, match="No head"):
        ablate_heads(model, texts, heads=[])
    with pytest.raises(UnsupportedError, match="prompt layer head"):
        ablate_heads(model, texts, heads=torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.raises(TextError, match="two tokens or more"):
        ablate_heads(model, ss.token_ids([[5], [5, 6, 7]]), progress=False)
    with pytest.raises(TextError, match="at least two"):
        ablate_heads(model, ss.token_ids([[5, 6, 7]]), "resample")
    with pytest.raises(TextError, match="equal length"):
        ablate_heads(model, ss.token_ids([[5, 6, 7], [5, 6]]), "resample")


def test_a_model_that_hands_on_more_than_the_residual_stream_is_refused() -> None:
    """Block 2 adds what block 0's FFN put out: skipping block 0 would leave the last pass's."""
    plain = LLAMA.build()
    kept = []
    plain.model.layers[0].mlp.register_forward_hook(lambda m, args, out: kept.append(out))
    plain.model.layers[2].mlp.register_forward_hook(lambda m, args, out: out + kept[-1])
    with pytest.raises(UnsupportedError, match="starts at one of its blocks"):
        Partway(ss.load_model(plain))


def test_an_untrained_head_is_refused() -> None:
    from transformers import LlamaModel

    headless = LlamaModel(LLAMA.build().config)
    with pytest.raises(UnsupportedError, match="no output head"):
        Partway(ss.load_model(headless))


def test_pieces_shrink_when_memory_runs_out() -> None:
    sizes = []

    def work(at: slice) -> torch.Tensor:
        sizes.append(at.stop - at.start)
        if at.stop - at.start > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (simulated)")
        return torch.arange(at.start, at.stop)

    assert in_pieces(7, 6, work).tolist() == list(range(7))
    assert sizes == [6, 3, 1, 1, 1, 1, 1, 1, 1]

    def never(at: slice) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory (simulated)")

    with pytest.raises(ModelError, match="does not fit"):
        in_pieces(3, 2, never)


def test_words_and_findings(model, texts) -> None:
    found = ablate_heads(model, texts, progress=False)
    cost = found.loss_change.mean(0)
    most = found.statistics()["most_costly"][0]
    assert cost[most["layer"], most["head"]] == cost.max()
    assert f"{most['layer']}.{most['head']}" in found.summary()
    assert found.statistics()["heads"] == 12

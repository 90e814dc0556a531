"""Mixing: perturbations and collapse, from transformers' own hidden states."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import TextError, UnsupportedError
from sinkscope.experiments import mixing as module
from sinkscope.experiments.mixing import mixing
from sinkscope.interventions import ShiftSinkLogit
from tests.families.architectures import BY_NAME
from tests.families.reference import reference
from tests.prompts.tiny_tokenizers import words

LLAMA = BY_NAME["llama"]
CHANGED = 4
BOS = 1


@pytest.fixture
def texts():
    """Ids that the tiny tokenizer knows too."""
    return ss.token_ids(LLAMA.tokens(prompts=3, length=16) % 36 + 4)


@pytest.fixture
def model():
    return ss.load_model(LLAMA.build(), tokenizer=words(bos=True))


def states(tokens: torch.Tensor) -> np.ndarray:
    """[layer prompt position dim]: what each block of the plain model puts out."""
    plain = LLAMA.build()
    kept: list[torch.Tensor] = []
    for block in plain.model.layers:
        block.register_forward_hook(lambda module, args, out: kept.append(out))
    with torch.no_grad():
        plain(tokens)
    return torch.stack(kept).double().numpy()


def test_figures_without_and_with_bos(model, texts, monkeypatch) -> None:
    """Each figure by its definition, one vector after the other."""
    other = texts.tokens.clone()
    other[:, CHANGED] = torch.tensor([7, 9, 11])
    monkeypatch.setattr(module, "_with_another", lambda *args: other)
    found = mixing(model, texts, conditions=["no bos", "bos"], changed=CHANGED, progress=False)
    front = torch.full((3, 1), BOS)
    for index, before in enumerate((texts.tokens, torch.cat([front, texts.tokens], 1))):
        after = before.clone()
        after[:, CHANGED + index] = other[:, CHANGED]
        one, two = (states(x)[:, :, index:] for x in (before, after))
        for layer, prompt in np.ndindex(one.shape[:2]):
            x, y = one[layer, prompt], two[layer, prompt]
            moved = np.array([np.linalg.norm(a - b) for a, b in zip(x, y, strict=True)])
            size = np.array([np.linalg.norm(a) for a in x])
            at = index, prompt, layer
            np.testing.assert_allclose(found.perturbation[at], moved, atol=1e-4)
            np.testing.assert_allclose(found.relative_perturbation[at], moved / size, atol=1e-4)
            spread = (moved / size)[CHANGED + 1 :].mean()
            assert float(found.spread[at]) == pytest.approx(spread, rel=1e-3)
            rest = x[1:]
            collapse = np.sqrt(sum(np.linalg.norm(a - rest.mean(0)) ** 2 for a in rest))
            assert float(found.rank_collapse[at]) == pytest.approx(collapse, rel=1e-4)
            share = collapse / np.linalg.norm(rest)
            assert float(found.rank_share[at]) == pytest.approx(share, rel=1e-4)
            energy = np.linalg.svd(rest, compute_uv=False) ** 2
            p = energy / energy.sum()
            entropy = -sum(q * np.log(q) for q in p if q > 0) / np.log(min(rest.shape))
            assert float(found.matrix_entropy[at]) == pytest.approx(entropy, rel=1e-4)
    assert found.perturbation[:, :, :, :CHANGED].max() < 1e-5, "nothing goes back in time"
    assert found.spread.min() > 0


def test_one_other_token_is_drawn_for_each_prompt(model, texts) -> None:
    other = module._with_another(model, texts.tokens, CHANGED, seed=0)
    changed = other != texts.tokens
    assert changed[:, CHANGED].all() and changed.sum() == 3
    assert other.min() >= 4, "no special token"
    assert torch.equal(other, module._with_another(model, texts.tokens, CHANGED, seed=0))
    only_two = SimpleNamespace(tokenizer=None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "capabilities", lambda m: SimpleNamespace(d_vocab=2))
        flipped = module._with_another(only_two, torch.zeros(9, 4, dtype=torch.long), 1, seed=0)
    assert flipped[:, 1].tolist() == [1] * 9, "a draw of the same token is not a change"


def test_hiding_the_first_token_everywhere_is_dropping_it(texts) -> None:
    """Why "no sink" spares the first layers: with rotary positions the next token takes over."""
    model = ss.load_model(LLAMA.build())
    with torch.no_grad():
        alone = model(texts.tokens[:, 1:])
        with ShiftSinkLogit(model, module._HIDING_SHIFT, position=0):
            hidden = model(texts.tokens)[:, 1:]
    torch.testing.assert_close(hidden, alone, atol=1e-4, rtol=1e-4)


def test_no_sink_hides_the_front_token_in_later_layers(model, texts) -> None:
    """Its rows of later layers read it no more; the layers before are untouched."""
    found = mixing(model, texts, conditions=["bos", "no sink"], changed=CHANGED, progress=False)
    front = torch.cat([torch.full((3, 1), BOS), texts.tokens], 1)
    norms = np.linalg.norm(states(front)[:, :, 0], axis=-1).mean(1)
    after = next(i for i, norm in enumerate(norms) if norm >= norms.max() / 2)
    assert found.hidden_after == after < len(norms) - 1
    same = (found.perturbation[0] - found.perturbation[1]).abs().amax(dim=(0, 2))
    assert same[: after + 1].max() < 1e-5 < same[after + 1 :].min()
    first = reference(LLAMA.build(), front)["attentions"][..., 0].double().numpy()
    rate = (first.mean(-1) > 0.3).mean()
    assert float(found.front_rate[0]) == pytest.approx(rate)
    kept = (first[: after + 1].mean(-1) > 0.3).sum() / first[..., 0].size
    # Hidden rows keep the front token's own row alone: importance 1/17.
    assert float(found.front_rate[1]) == pytest.approx(kept, abs=1 / first[..., 0].size)


def test_words_table_figure_and_json(model, texts, tmp_path) -> None:
    found = mixing(model, texts, changed=CHANGED, progress=False)
    frame = found.to_frame()
    assert set(frame["condition"]) == {"no bos", "bos", "no sink"}
    row = frame.query(
        "metric == 'relative_perturbation' and condition == 'bos' and prompt == 2 and layer == 1 "
        "and position == 9"
    )
    assert row["value"].item() == pytest.approx(float(found.relative_perturbation[1, 2, 1, 9]))
    whole = frame.query("metric == 'rank_share' and position == -1")
    assert len(whole) == 3 * 3 * 3
    assert "no sink" in found.summary()
    less = found.statistics()["no sink minus no bos"]["spread"]["last"]
    want = (found.spread[2, :, -1] - found.spread[0, :, -1]).mean()
    assert less.mean == pytest.approx(float(want))
    json.dumps(found.to_dict(), allow_nan=False)
    assert len(found.figures()["perturbation"].layout.annotations) >= 3


def test_what_is_refused(model, texts) -> None:
    plain = ss.load_model(LLAMA.build())
    with pytest.raises(UnsupportedError, match="no BOS"):
        mixing(plain, texts, progress=False)
    with pytest.raises(TextError, match="before and after"):
        mixing(model, texts, changed=15, progress=False)
    with pytest.raises(TextError, match="equal length"):
        mixing(model, ss.token_ids([[4, 5, 6], [4, 5]]), progress=False)
    with pytest.raises(TextError, match="begin with BOS"):
        mixing(model, ss.token_ids([[1, 5, 6, 7, 8]]), changed=2, progress=False)
    with pytest.raises(UnsupportedError, match="mode is .no head.; expected one of"):
        mixing(model, texts, conditions=["no head"], progress=False)
    with pytest.raises(UnsupportedError, match="No conditions are named"):
        mixing(model, texts, conditions=[], progress=False)

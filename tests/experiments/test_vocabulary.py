"""Every token as the first of a prompt, against transformers' own forward, one token at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

import sinkscope as ss
from sinkscope.errors import ReportError, SinkscopeError, UnsupportedError
from sinkscope.experiments.vocabulary import Vocabulary, vocabulary
from sinkscope.prompts.token_classes import class_of
from sinkscope.report import netcdf
from tests.families.architectures import BY_NAME

FAMILIES = ("llama", "gpt2", "gemma3", "gpt_neox")
PROMPTS = torch.randint(1, 90, (3, 12), generator=torch.Generator().manual_seed(4))


def states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What every block puts out [layer position dim], from forward hooks on the blocks."""
    blocks = next(
        module
        for module in model.modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == model.config.num_hidden_layers
    )
    kept: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        kept.append(output[0] if isinstance(output, tuple) else output)

    handles = [block.register_forward_hook(keep) for block in blocks]
    with torch.no_grad():
        model(tokens[None])
    for handle in handles:
        handle.remove()
    return torch.stack([state.reshape(len(tokens), -1) for state in kept])


def made_a_sink(model: PreTrainedModel, tokens: range) -> PreTrainedModel:
    """A model in which some tokens have a large embedding, as sinks have a large state."""
    with torch.no_grad():
        model.get_input_embeddings().weight[list(tokens)] *= 300
    return model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_is_that_of_transformers(name: str) -> None:
    family = BY_NAME[name]
    plain = made_a_sink(family.build(), range(40, 60))
    model = ss.load_model(made_a_sink(family.build(), range(40, 60)))
    found = vocabulary(model, PROMPTS, threshold=3.0, pairs=0, progress=False)
    size = plain.get_input_embeddings().weight.shape[0]
    assert found.ids.tolist() == list(range(size))

    texts = torch.stack([states(plain, row) for row in PROMPTS])  # prompt layer position dim
    later = texts.norm(dim=-1)[:, :, 1:].numpy()
    later = np.median(later, axis=-1)  # [prompt layer]
    np.testing.assert_allclose(found.later_norm, later, rtol=1e-4)
    first = texts[:, :, 0].norm(dim=-1)
    assert found.peak_layer == (first.numpy() / later).mean(0).argmax()
    sink = texts[:, :, 0].mean(0)
    alone = torch.stack([states(plain, torch.tensor([token]))[:, 0] for token in range(size)])
    torch.testing.assert_close(found.norm[0], alone.norm(dim=-1), rtol=1e-4, atol=1e-4)
    cosine = torch.cosine_similarity(alone, sink[None], dim=-1)
    torch.testing.assert_close(found.cosine[0], cosine, rtol=1e-4, atol=1e-4)
    at = found.peak_layer
    makes = alone[:, at].norm(dim=-1) > 3 * later.mean(0)[at]
    assert found.makes_sink[0].tolist() == makes.tolist() and 0 < makes.sum() < size
    assert found.exceptions() == (~makes).nonzero()[:, 0].tolist()
    assert found.share().mean == pytest.approx(float(makes.float().mean()))
    chosen = alone[makes].double()
    share = chosen.mean(0).square().sum(-1) / chosen.square().sum(-1).mean(0)
    torch.testing.assert_close(found.constant_share(), share, rtol=1e-4, atol=1e-6)


def test_behind_bos_and_with_another_position() -> None:
    """GPT-2: token 1 stands at position 1 behind BOS; in the third condition it is at 0 as if it
    stood in the middle."""
    plain = BY_NAME["gpt2"].build()
    model = ss.load_model(BY_NAME["gpt2"].build())
    found = vocabulary(model, PROMPTS, bos=7, further=10**6, pairs=0, progress=False)
    middle = plain.config.n_positions // 2
    assert found.conditions == ["first", "after BOS", f"first, vector of position {middle}"]
    for token in (3, 50, 96):
        behind = states(plain, torch.tensor([7, token]))[:, 1]
        torch.testing.assert_close(found.norm[1, token], behind.norm(dim=-1), rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain.transformer.wpe.weight[0] = plain.transformer.wpe.weight[middle]
    for token in (3, 50, 96):
        moved = states(plain, torch.tensor([token]))[:, 0]
        torch.testing.assert_close(found.norm[2, token], moved.norm(dim=-1), rtol=1e-4, atol=1e-4)


def test_confirmation_puts_tokens_first_in_the_prompts(tmp_path: Path) -> None:
    plain = made_a_sink(BY_NAME["llama"].build(), range(40, 60))
    model = ss.load_model(made_a_sink(BY_NAME["llama"].build(), range(40, 60)))
    found = vocabulary(model, PROMPTS, threshold=3.0, pairs=2, progress=False)
    confirmed = found.confirmed
    assert confirmed is not None and confirmed.conditions == ["first"]
    assert set(confirmed.exceptions.tolist()) <= set(found.exceptions())
    assert not set(confirmed.controls.tolist()) & set(found.exceptions())
    first, last = confirmed.later
    for group, ids in enumerate((confirmed.exceptions, confirmed.controls)):
        for pair, token in enumerate(ids.tolist()):
            for prompt, row in enumerate(PROMPTS):
                tokens = torch.cat([torch.tensor([token]), row[1:]])[None]
                with torch.no_grad():
                    out = plain(tokens, output_attentions=True)
                pattern = torch.stack(out.attentions)[first : last + 1, 0]  # layer head q k
                at = 0, group, pair, prompt
                wanted = pattern[..., 1:, 0].mean()
                torch.testing.assert_close(confirmed.attention[at], wanted, rtol=1e-4, atol=1e-5)
                norm = states(plain, tokens[0])[found.peak_layer].norm(dim=-1)
                ratio = norm / found.later_norm[:, found.peak_layer].mean()
                torch.testing.assert_close(confirmed.ratio[at], ratio, rtol=1e-4, atol=1e-4)
                losses = torch.nn.functional.cross_entropy(
                    out.logits[0, :-1].float(), tokens[0, 1:], reduction="none"
                )
                torch.testing.assert_close(
                    confirmed.loss[at], losses[1:].mean(), rtol=1e-4, atol=1e-4
                )
    file = netcdf.save(found, tmp_path / "v.nc")
    assert netcdf.load(Vocabulary, file).equals(found)
    words = found.summary()
    assert "2 pairs" in words and "first: attention to 0" in words


def test_it_goes_on_from_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from sinkscope.capture import runner
    from sinkscope.experiments import vocabulary as module

    monkeypatch.setattr(module, "_CHUNK", 20)
    model = ss.load_model(BY_NAME["llama"].build())
    file = tmp_path / "v.nc"
    run, calls = runner.run, []

    def stop(*args: Any, **options: Any) -> Any:
        calls.append(args)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return run(*args, **options)

    with monkeypatch.context() as patched:
        patched.setattr(module.runner, "run", stop)
        with pytest.raises(KeyboardInterrupt):
            vocabulary(model, PROMPTS, pairs=0, further=0, file=file, progress=False)
    kept = netcdf.load(Vocabulary, file)
    assert 0 < int(kept.measured_tokens[0].sum()) < len(kept.ids)
    whole = vocabulary(model, PROMPTS, pairs=0, further=0, file=file, progress=False)
    assert whole.equals(vocabulary(model, PROMPTS, pairs=0, further=0, progress=False))
    with pytest.raises(ReportError):
        vocabulary(model, PROMPTS, pairs=0, further=0, threshold=4.0, file=file, progress=False)


def test_what_it_cannot_measure_is_refused() -> None:
    bert = ss.load_model(BY_NAME["bert"].build())
    with pytest.raises(UnsupportedError, match="bidirectional"):
        vocabulary(bert, PROMPTS, progress=False)
    llama = ss.load_model(BY_NAME["llama"].build())
    for wrong in (dict(threshold=-1.0), dict(sample=0), dict(bos="sometimes"), dict(pairs=-1)):
        with pytest.raises(SinkscopeError):
            vocabulary(llama, PROMPTS, progress=False, **wrong)


@pytest.mark.parametrize(
    ("text", "piece", "special", "kind"),
    [
        (" the", "Ġthe", False, "word start"),
        ("ing", "ing", False, "continuation"),
        ("  \n", "ĠĠĊ", False, "whitespace"),
        (" 12", "Ġ12", False, "digits"),
        ("),", "),", False, "punctuation"),
        (" $", "Ġ$", False, "punctuation"),
        ("<s>", "<s>", True, "special"),
        ("\ufffd", "Ã", False, "byte"),
        ("\n", "<0x0A>", False, "byte"),
        ("", None, False, "unused"),
        ("<unused7>", "<unused7>", True, "unused"),
    ],
)
def test_classes(text: str, piece: str | None, special: bool, kind: str) -> None:
    assert class_of(text, piece, special) == kind

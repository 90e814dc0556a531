"""A model's own attention applies an edited mask exactly, or the edit is refused.

transformers has no one rule for masks: MPT hides where a boolean mask is True, CodeGen adds a mask
before it divides the scores, XGLM takes none with an axis for heads.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import sinkscope as ss
from sinkscope.errors import UnsupportedError

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
GPT = dict(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4, **SPECIAL)
SETTINGS: dict[str, dict[str, Any]] = {
    "Mpt": dict(vocab_size=97, d_model=32, n_layers=2, n_heads=4, max_seq_len=64),
    "CodeGen": GPT,
    "XGLM": dict(
        vocab_size=97, d_model=32, num_layers=2, attention_heads=4, ffn_dim=48,
        max_position_embeddings=64,
    ),
    "GPTJ": GPT,
    "Bloom": dict(vocab_size=97, hidden_size=32, n_layer=2, n_head=4, **SPECIAL),
    "GPTNeo": dict(
        vocab_size=97, hidden_size=32, num_layers=2, num_heads=4, window_size=5,
        attention_types=[[["global", "local"], 1]], max_position_embeddings=64, **SPECIAL,
    ),
}  # fmt: skip
P, SHIFT = 4, -3.0


def bridge(name: str) -> Any:
    config = getattr(transformers, f"{name}Config")(**SETTINGS[name])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kind = getattr(transformers, f"{name}ForCausalLM")
        model = kind._from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.2)
    return ss.load_model(model, device="cpu")


def first_pattern(model: Any) -> torch.Tensor:
    tokens, kept = torch.arange(20, 30)[None], {}
    with torch.no_grad():
        model.run_with_hooks(
            tokens,
            fwd_hooks=[("blocks.0.attn.hook_pattern", lambda x, hook: kept.update(pattern=x))],
        )
    return kept["pattern"][0]


@pytest.mark.parametrize("name", ["CodeGen", "XGLM", "GPTJ", "Bloom", "GPTNeo"])
def test_the_row_reads_itself_alone(name: str) -> None:
    model = bridge(name)
    before = first_pattern(model)
    with ss.SelfOnlyMask(model, P):
        after = first_pattern(model)
    torch.testing.assert_close(after[:, P], torch.eye(10)[P].expand(4, 10))
    others = [row for row in range(10) if row != P]
    torch.testing.assert_close(after[:, others], before[:, others])


@pytest.mark.parametrize("heads", [None, [1]])
@pytest.mark.parametrize("name", ["GPTJ", "Bloom", "GPTNeo"])
def test_the_logit_moves_by_the_shift(name: str, heads: list[int] | None) -> None:
    model = bridge(name)
    before = first_pattern(model)
    with ss.ShiftSinkLogit(model, SHIFT, heads=heads):
        after = first_pattern(model)
    for head in range(4):
        rows = [(a[1:, 0] / a[1:, 1]).log() for a in (after[head], before[head])]
        moved = SHIFT if heads is None or head in heads else 0.0
        torch.testing.assert_close(rows[0] - rows[1], torch.full((9,), moved), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "edit"),
    [
        ("Mpt", lambda model: ss.SelfOnlyMask(model, P)),
        ("Mpt", lambda model: ss.ShiftSinkLogit(model, SHIFT)),
        ("CodeGen", lambda model: ss.ShiftSinkLogit(model, SHIFT)),
        ("XGLM", lambda model: ss.ShiftSinkLogit(model, SHIFT, heads=[1])),
    ],
)
def test_what_it_would_do_otherwise_is_refused(name: str, edit: Any) -> None:
    model = bridge(name)
    before = first_pattern(model)
    for _ in range(2):  # the second time too
        with pytest.raises(UnsupportedError, match="does not apply an edited mask as"), edit(model):
            pass
    assert torch.equal(first_pattern(model), before)


def test_hooks_of_others_do_not_disturb_the_proof() -> None:
    """Without anything to attend by, patterns are even: the proof must not see that."""
    model = bridge("GPTJ")
    with (
        model.hooks(fwd_hooks=[("blocks.0.attn.hook_in", lambda x, hook: torch.zeros_like(x))]),
        ss.SelfOnlyMask(model, 2),
        ss.ShiftSinkLogit(model, SHIFT),
    ):
        after = first_pattern(model)
    torch.testing.assert_close(after[:, 2], torch.eye(10)[2].expand(4, 10))
    even = torch.tensor([torch.tensor(SHIFT).exp(), 1.0, 1.0, 1.0])
    torch.testing.assert_close(after[:, 3, :4], (even / even.sum()).expand(4, 4))

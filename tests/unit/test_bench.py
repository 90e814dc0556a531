"""The bench: every way is measured, against a bare model of the same shape."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sinkscope import bench
from sinkscope.errors import SinkscopeError

TINY = dict(
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=48,
)


@pytest.fixture
def tiny_shape(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(bench.SHAPES, "tiny", TINY)
    return "tiny"


def test_rows_of_a_shape(tiny_shape: str) -> None:
    sizes = [(2, 16), (1, 24)]
    rows = list(bench.run_bench(tiny_shape, sizes, repeats=2, device="cpu", dtype=torch.float32))
    assert [(row.prompts, row.length, row.way) for row in rows[:2]] == [
        (2, 16, bench.BARE),
        (1, 24, bench.BARE),
    ]
    assert [row.way for row in rows[2:]] == 2 * list(bench.WAYS)
    bare = {(row.prompts, row.length): row.milliseconds for row in rows[:2]}
    for row in rows:
        size = row.prompts, row.length
        assert row.shape == "tiny" and row.note is None and row.memory is None
        assert row.milliseconds > 0 and row.first_milliseconds > 0
        assert row.ratio == pytest.approx(row.milliseconds / bare[size])
        assert row.tokens_per_second == pytest.approx(
            row.prompts * row.length / row.milliseconds * 1e3
        )
    assert json.loads(json.dumps([row.to_dict() for row in rows]))[0]["ratio"] == 1.0


def test_a_loaded_model_is_compared_with_its_bare_twin() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    rows = list(bench.run_bench(model, [(1, 12)], ways=["core"], repeats=1))
    assert [row.way for row in rows] == [bench.BARE, "core"]
    assert rows[0].shape == "LlamaForCausalLM"


def test_running_out_of_memory_is_a_row(tiny_shape: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(bench.runner, "forward", fail)
    ways = ["stock core", "core"]
    rows = bench.run_bench(
        tiny_shape, [(2, 8)], ways=ways, repeats=1, device="cpu", dtype=torch.float32
    )
    _, *found = rows
    assert [(row.way, row.milliseconds, row.note) for row in found] == [
        (way, None, "out of memory") for way in ways
    ]


def test_refuses_ways_and_devices_that_do_not_exist(tiny_shape: str) -> None:
    with pytest.raises(SinkscopeError, match="no way 'fast'"):
        next(bench.run_bench(tiny_shape, ways=["fast"]))
    if not torch.cuda.is_available():
        with pytest.raises(SinkscopeError, match="no GPU"):
            next(bench.run_bench(tiny_shape, device="cuda"))

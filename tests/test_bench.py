"""The bench: every way is measured, against a bare model of the same shape."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from sinkscope import bench
from sinkscope.errors import ModelError, SinkscopeError, TextError
from sinkscope.models.load import load_model

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


def test_what_each_metric_costs_on_its_own(tiny_shape: str) -> None:
    """Every metric has one row, whose cost is a difference of two ratios."""
    rows = list(
        bench.run_bench(
            tiny_shape, [(2, 16)], by_metric=True, repeats=1, device="cpu", dtype=torch.float32
        )
    )
    ways = {row.way: row for row in rows}
    core, every = ways["core"], ways["all"]
    assert core.own is None and every.own is None and ways[bench.BARE].own is None
    for name in ("sink_attention", "values", "head_outputs", "residual", "massive", "ffn"):
        without = ways[f"core − {name}"]
        assert without.own == pytest.approx(core.ratio - without.ratio)
    for name in ("received", "entropy", "value_share", "through_output", "cosine"):
        added = ways[f"core + {name}"]
        assert added.own == pytest.approx(added.ratio - core.ratio)
    assert "core + ffn_dims" not in ways and len(ways) == len(rows)


def test_a_loaded_model_is_compared_with_its_bare_twin() -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    rows = list(bench.run_bench(model, [(1, 12)], ways=["core"], repeats=1))
    assert [row.way for row in rows] == [bench.BARE, "core"]
    assert rows[0].shape == "LlamaForCausalLM"


CPU_IS_FULL = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you "
    "tried to allocate 400000000000000 bytes. Error code 12 (Cannot allocate memory)"
)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), CPU_IS_FULL])
def test_running_out_of_memory_is_a_row(
    error: Exception, tiny_shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    ways = ["eager core", "core"]
    rows = bench.run_bench(
        tiny_shape, [(2, 8)], ways=ways, repeats=1, device="cpu", dtype=torch.float32
    )
    with monkeypatch.context() as full:
        full.setattr(LlamaModel, "forward", fail)
        bare = next(rows)
    monkeypatch.setattr(bench.runner, "forward", fail)
    assert [(row.way, row.milliseconds, row.note) for row in (bare, *rows)] == [
        (way, None, "out of memory") for way in (bench.BARE, *ways)
    ]


def test_other_errors_are_not_taken_for_memory(
    tiny_shape: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise ModelError("The residual stream holds nan.")

    monkeypatch.setattr(bench.runner, "forward", fail)
    rows = bench.run_bench(
        tiny_shape, [(2, 8)], ways=["core"], repeats=1, device="cpu", dtype="float32"
    )
    next(rows)
    with pytest.raises(ModelError, match="holds nan"):
        next(rows)


def test_refuses_ways_and_devices_that_do_not_exist(tiny_shape: str) -> None:
    with pytest.raises(SinkscopeError, match="no configuration 'fast'"):
        next(bench.run_bench(tiny_shape, ways=["fast"]))
    if not torch.cuda.is_available():
        with pytest.raises(SinkscopeError, match="There is no device 'cuda'"):
            next(bench.run_bench(tiny_shape, device="cuda"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(device="foo"), "There is no device 'foo'"),
        (dict(device="meta"), "There is no device 'meta'"),
        (dict(dtype=torch.int8), "dtype is int8; choose from float32"),
        (dict(dtype="float"), "dtype is float; choose from float32"),
        (dict(sizes=[(1, 8), (0, 16)]), "batch of 0 prompts of 16 tokens"),
        (dict(sizes=[(1, 8), (2, 0)]), "batch of 2 prompts of 0 tokens"),
        (dict(sizes=[(1, 8), (2, 33)]), "33 tokens are more than the 32 positions"),
        (dict(repeats=0), "repeats is 0; expected 1 or more"),
        (dict(shape="bb-3l"), "bb-3l is not a transformers model"),
    ],
)
def test_bad_arguments_end_in_a_sentence_before_anything_is_measured(
    tiny_shape: str, monkeypatch: pytest.MonkeyPatch, arguments: dict[str, Any], message: str
) -> None:
    monkeypatch.setitem(bench.SHAPES, "tiny", dict(TINY, max_position_embeddings=32))
    usual: dict[str, Any] = dict(
        shape=tiny_shape, sizes=[(1, 8)], repeats=1, device="cpu", dtype="float32"
    )
    with pytest.raises(SinkscopeError, match=message):
        next(bench.run_bench(**(usual | arguments)))


def test_a_model_in_several_places_has_no_bare_twin() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY)).eval()
    bridge = load_model(model)
    bridge.original_model.lm_head.to("meta")
    with pytest.raises(ModelError, match="is spread over cpu, meta, .* load it without device_map"):
        next(bench.run_bench(bridge, [(1, 8)], repeats=1))


def test_a_loaded_model_is_held_to_its_context() -> None:
    model = LlamaForCausalLM(LlamaConfig(**TINY, max_position_embeddings=32)).eval()
    with pytest.raises(TextError, match="33 tokens are more than the 32 positions"):
        next(bench.run_bench(model, [(1, 8), (1, 33)], repeats=1))

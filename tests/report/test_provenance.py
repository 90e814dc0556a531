"""Reports say what they were measured on; those of different models or hooks do not merge."""

from __future__ import annotations

import functools
import json
import types
from pathlib import Path

import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ReportError
from tests.families.architectures import BY_NAME

DATA = Path(__file__).parents[1] / "data"


def scanned(model, seed: int = 0):
    torch.manual_seed(seed)
    tokens = torch.randint(1, 90, (2, 8))
    return ss.scan(model, ss.token_ids(tokens), metrics="residual", progress=False)


def test_reports_of_two_models_in_memory_do_not_merge() -> None:
    family = BY_NAME["llama"]
    one, same = ss.load_model(family.build()), ss.load_model(family.build())
    other = family.build()
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight[3, 5] += 1e-3  # a single number
    merged = scanned(one).merge(scanned(same, seed=1))
    assert len(merged.tokens) == 4 and merged.settings.weights
    with pytest.raises(ReportError, match="had different weights or module settings in each"):
        scanned(one).merge(scanned(ss.load_model(other)))


def record(seen: list, x, hook) -> None:
    seen.append(hook.name)


@pytest.mark.parametrize("kind", ["hook point", "partial", "permanent", "module"])
def test_hooks_of_ones_own_are_recorded_and_such_reports_do_not_merge(kind: str) -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    plain = scanned(model)
    assert plain.settings.hooks == ()
    name = "blocks.1.hook_resid_post"
    if kind == "module":
        layer = model.original_model.model.layers[1]
        layer.register_forward_hook(lambda module, args, out: None)
    else:
        hook = functools.partial(record, []) if kind == "partial" else lambda x, hook: None
        model.add_hook(name, hook, is_permanent=kind == "permanent")
    hooked = scanned(model, seed=1)
    (where,) = hooked.settings.hooks
    assert where.startswith("model.layers.1" if kind == "module" else "blocks.1.hook_out")
    for one, other in ((plain, hooked), (hooked, plain), (hooked, hooked)):
        with pytest.raises(ReportError, match="user hooks were at"):
            one.merge(other)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("how", ["function", "method"])
def test_a_replaced_forward_is_another_model(family: str, how: str) -> None:
    """Before, such reports merged with those of the model as it was."""
    places = {
        "llama": "model.layers.1.self_attn.o_proj",
        "gpt2": "transformer.h.0.attn.c_attn",
        "gpt_neox": "gpt_neox.layers.0.mlp",
    }

    def edited(by: float):
        model = BY_NAME[family].build()
        module = model.get_submodule(places[family])
        whole = module.forward
        function = lambda *args: whole(args[-1]) * by  # noqa: E731
        module.forward = function if how == "function" else types.MethodType(function, module)
        return ss.load_model(model)

    plain, one, same, other = (
        scanned(ss.load_model(BY_NAME[family].build())),
        scanned(edited(0.5)),
        scanned(edited(0.5), seed=1),
        scanned(edited(0.7)),
    )
    assert plain.settings.output == "" and one.settings.weights == plain.settings.weights
    assert len(one.merge(same).tokens) == 4
    for first, second in ((plain, one), (one, plain), (one, other)):
        with pytest.raises(ReportError, match="a replaced forward"):
            first.merge(second)


def test_what_differs_because_of_hooks_or_interventions_is_not_blamed() -> None:
    """Both take metrics away; the hook, the intervention is what to say."""
    model = ss.load_model(BY_NAME["llama"].build())
    ids = ss.token_ids(torch.tensor([[3, 4, 5, 9, 7]]))
    plain = ss.scan(model, ids, progress=False)
    with ss.ReplaceSoftmax(model, "relu"):
        without = ss.scan(model, ids, progress=False)
    assert without.settings.metrics != plain.settings.metrics
    with pytest.raises(ReportError, match="their interventions differ"):
        plain.merge(without)
    hooked = ss.load_model(BY_NAME["llama"].build())
    hooked.original_model.model.layers[0].mlp.register_forward_hook(lambda module, args, out: None)
    other = ss.scan(hooked, ids, metrics="residual", progress=False)
    assert other.settings.hooks == ("model.layers.0.mlp (torch)",)
    with pytest.raises(ReportError, match=r"user hooks were at model\.layers\.0\.mlp"):
        plain.merge(other)


def test_interventions_are_no_hooks_of_ones_own() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    with ss.ZeroValue(model, layers=1):
        report = scanned(model)
    assert report.settings.hooks == () and report.settings.interventions


@pytest.mark.parametrize(("name", "attention"), [("", "streaming"), ("_stock", "eager")])
def test_files_of_the_version_before_open(name: str, attention: str, tmp_path: Path) -> None:
    """Written at 3edb196, where the setting was called "path", and "eager" was "stock"."""
    report = ss.load_report(DATA / f"report_format_1{name}.nc")
    assert report.settings.attention == attention and report.settings.weights == ""
    assert report.massive is not None
    if not name:  # what that version printed with --json
        was = json.loads((DATA / "report_format_1.json").read_text())
        for field in ("sink_attention", "tokens", "sink_rate", "value_norm", "learned_sink_mass"):
            now = report.to_dict()[field]
            assert now == was[field], field
    again = ss.load_report(report.save(tmp_path / "again.nc"))
    assert again.equals(report)
    assert len(report.merge(again).tokens) == 2 * len(report.tokens)


def test_the_former_name_of_attention_still_works() -> None:
    model = ss.load_model(BY_NAME["llama"].build())
    ask = dict(metrics="residual", progress=False)
    with pytest.warns(DeprecationWarning, match=r"scan\(attention=...\)"):
        report = ss.scan(model, ss.token_ids(torch.tensor([[3, 4, 5]])), path="stock", **ask)
    assert report.settings.attention == "eager"

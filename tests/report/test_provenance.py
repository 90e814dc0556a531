"""Reports say what they were measured on; those of different models or hooks do not merge."""

from __future__ import annotations

import functools
import json
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
    with pytest.raises(ReportError, match="had other weights in each"):
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
        with pytest.raises(ReportError, match="hooks of one's own were at"):
            one.merge(other)


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

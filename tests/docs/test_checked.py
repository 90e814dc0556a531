"""What sinkscope was checked against: the script runs, and the page is the script's."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import ModuleType

import pytest
import torch

import sinkscope as ss
from sinkscope.models.packaged import packaged_folder
from tests.docs.pages import ROOT
from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("checked", ROOT / "docs/checked.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, spec.name, module)  # dataclasses looks there
        spec.loader.exec_module(module)
    return module


def test_every_definition_holds_on_a_small_model(script: ModuleType) -> None:
    """The same formulas as on the page, on random weights that give massive activations too."""
    model = BY_NAME["llama"].build()
    with torch.no_grad():
        model.model.embed_tokens.weight[7, 3] = 4000
    bridge = ss.load_model(model)
    ids = torch.tensor([[7, *range(20, 35)], [30, 7, *range(40, 54)]])
    found = script.scanned(model, bridge, ids)
    assert next(row for row in found if "massive.count" in row.quantity).largest > 0
    found += [
        script.ablated(model, bridge, ids, heads=((0, 1), (2, 3))),
        *script.operators(),
        *script.quantisers(),
        script.learned_sinks(),
    ]
    for row in found:
        assert row.difference <= 2e-5 * max(row.largest, 1), row
    assert [row[:3] for row in rows()[0]][: len(found)] == [
        [row.peer, row.quantity, row.formula]
        if "AblateHeads" not in row.quantity
        else [row.peer, row.quantity, row.formula.replace("2 heads", "3 heads")]
        for row in found
    ]


@pytest.mark.real
def test_position_vectors_of_minilm(script: ModuleType) -> None:
    try:
        packaged_folder("minilm-l6")
    except ss.SinkscopeError as error:
        pytest.skip(str(error))
    assert script.position_vectors().difference < 1e-6


def rows() -> list[list[list[str]]]:
    """The cells of the page's tables."""
    text = (ROOT / "docs/checked.md").read_text("utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, re.M)
    return [
        [
            [cell.strip().strip("`") for cell in row.split("|")[1:-1]]
            for row in table.splitlines()[2:]
        ]
        for table in tables
    ]


def test_the_page_shows_what_the_script_records(script: ModuleType) -> None:
    computed, reported, sources = rows()
    for row in computed:
        assert float(row[4]) <= 5e-5 * max(float(row[3]), 1), row
    assert [row[1] for row in reported] == [one.quantity for one in script.RECORDED]
    for row, one in zip(reported, script.RECORDED, strict=True):
        assert [float(x) for x in row[2].split(",")] == list(one.theirs)
        assert [float(x) for x in row[3].split(",")] == list(one.ours)
    assert [row[0] for row in sources] == list(script.PEERS)
    assert {row[0] for row in computed + reported} <= set(script.PEERS)


def test_the_recorded_numbers_of_the_laboratory_are_those_of_its_readme(script: ModuleType) -> None:
    readme = (ROOT / "sinkscope/bb/README.md").read_text("utf-8")
    cells = {cell.strip() for line in readme.splitlines() for cell in line.split("|")}
    numbers = {float(cell) for cell in cells if re.fullmatch(r"[\d.]+(e-\d+)?", cell)}
    for one in script.RECORDED:
        if one.peer == script.GUO:
            assert {*one.theirs, *one.ours} <= numbers, one.quantity

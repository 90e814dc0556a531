"""The functions that people call say what they take and what they give back."""

from __future__ import annotations

import griffe
import pytest

from tests.docs.pages import ROOT
from tests.docs.test_site import hooks


@pytest.fixture(scope="module")
def package() -> griffe.Module:
    """The package as its sources describe it; nothing is imported."""
    found = griffe.load(
        "sinkscope", search_paths=[ROOT], resolve_aliases=True, docstring_parser="google"
    )
    assert isinstance(found, griffe.Module)
    return found


PUBLIC = [*hooks.public_names("sinkscope"), *hooks.public_names("sinkscope.plot")]
OLD = "Deprecated: "


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_of_the_public_surface(package: griffe.Module, name: str) -> None:
    item = package[name.removeprefix("sinkscope.")]
    if item.is_alias:
        item = item.final_target
    assert item.docstring, f"{name} has no docstring"
    if not item.is_function or item.docstring.value.startswith(OLD):
        return
    sections = {section.kind.value for section in item.docstring.parse("google")}
    assert "parameters" in sections, f"the docstring of {name} has no section `Args:`"
    gives = sections & {"returns", "yields"} or str(item.returns) == "None"
    assert gives, f"the docstring of {name} has no section `Returns:`"

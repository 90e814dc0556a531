import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import sinkscope.html as html
import sinkscope.plot as plot
from sinkscope.errors import SinkscopeError
from sinkscope.plot import export
from sinkscope.report.report import SinkReport
from tests.plot import frames
from tests.report.factory import synthetic_report


def test_importing_sinkscope_imports_no_plotly():
    code = "import sys, sinkscope; import sinkscope.plot; print('plotly' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("name", plot.__all__)
def test_every_public_name_is_a_function_with_a_docstring(name):
    value = getattr(plot, name)
    assert callable(value) and len(value.__doc__) > 40
    assert name in dir(plot)


def test_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="attribute.*nothing"):
        plot.nothing  # noqa: B018


def test_figures_need_no_model_library():
    code = (
        "import sys; from sinkscope.plot import heads; from sinkscope.html import report_page;"
        "print('transformer_lens' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_page_files_travel_with_the_package():
    root = Path(html.__file__).parent / "assets"
    assert {"skeleton.html", "report.html", "look.css", "main.js"} <= {
        path.name for path in root.iterdir()
    }
    settings = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    assert settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["sinkscope"]


def test_save_html_needs_nothing(tmp_path):
    path = plot.save(plot.head_map(synthetic_report()), tmp_path / "x.html")
    text = path.read_text(encoding="utf-8")
    assert "cdn.plot.ly" not in text.split("<body>")[0]
    assert len(text) > 4_000_000


def test_save_refuses_an_unknown_suffix_and_a_missing_folder(tmp_path):
    figure = plot.head_map(synthetic_report())
    with pytest.raises(SinkscopeError, match=r"end it in \.html, \.png"):
        plot.save(figure, tmp_path / "x.gif")
    with pytest.raises(SinkscopeError, match="cannot be written: No such file"):
        plot.save(figure, tmp_path / "nowhere" / "x.html")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (ValueError("Image export requires the kaleido package"), r"sinkscope\[image\]"),
        (RuntimeError("Kaleido requires Google Chrome to be installed"), "apt install chromium"),
    ],
)
def test_save_says_what_to_install(tmp_path, monkeypatch, error, said):
    figure = plot.head_map(synthetic_report())

    def fail(*_args, **_kwargs):
        raise error

    monkeypatch.setattr(type(figure), "to_image", fail)
    with pytest.raises(SinkscopeError, match=said):
        plot.save(figure, tmp_path / "x.png")
    assert not (tmp_path / "x.png").exists()


def test_other_errors_of_an_export_are_not_hidden(tmp_path, monkeypatch):
    figure = plot.head_map(synthetic_report())

    def fail(*_args, **_kwargs):
        raise ValueError("a bug")

    monkeypatch.setattr(type(figure), "to_image", fail)
    with pytest.raises(ValueError, match="a bug"):
        plot.save(figure, tmp_path / "x.svg")
    assert ".svg" in export.IMAGES


def test_readme_lists_exactly_the_figures_there_are():
    readme = Path("README.md").read_text(encoding="utf-8")
    rows = readme.partition("\n## Figures\n")[2].partition("\n## ")[0].splitlines()
    first = " ".join(row.split("|")[1] for row in rows if row.startswith("| `"))
    listed = [name for name in first.split("`")[1::2] if name != "ss.plot."]
    for name in frames.FIGURES - set(listed):
        raise AssertionError(f"{name} lacks a row in the table of figures in README.md")
    assert sorted(listed) == sorted(frames.FIGURES), (
        "README.md lists a figure that is none, or twice"
    )


def test_readme_lists_every_metric():
    readme = Path("README.md").read_text(encoding="utf-8")
    rows = readme.partition("\n## What it measures\n")[2].partition("\n## ")[0].splitlines()
    listed = " ".join(row.split("|")[1] for row in rows if row.startswith("| `")).split("`")[1::2]
    named = {name for name in SinkReport.metrics().values() if name}
    for name in named - set(listed):
        raise AssertionError(f"{name} lacks a row under `What it measures` in README.md")
    assert sorted(listed) == sorted(named), "README.md names one twice, or what is none"

"""Reports of prompts that hold nothing but sinks: there is nothing to set a sink beside."""

import json
import re
import warnings

import pytest

import sinkscope.plot as plot
from sinkscope.capture.scan import scan
from sinkscope.cli import app
from sinkscope.errors import ReportError
from sinkscope.explorer.explorer import explore
from sinkscope.models.load import load_model
from sinkscope.prompts.tokens import token_ids
from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module", params=["one token", "nothing but sinks"])
def report(request):
    ids, sinks = ([[5]], [0]) if request.param == "one token" else ([[5, 6, 7]] * 2, [0, 1, 2])
    model = load_model(BY_NAME["gpt2"].build())
    return scan(model, token_ids(ids), sinks=sinks, progress=False)


def page_data(html: str) -> dict:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.S)
    return json.loads(found[1])


def test_the_page_leaves_out_what_no_prompt_defines(report):
    html = report.to_html()
    page = page_data(html)
    shown = page["views"]
    # Nothing is beside the sinks, so nothing pays them attention, is drained or peaks beside them.
    assert not {"dims", "drains", "layers", "queries"} & set(shown)
    assert {"map", "received", "values", "residual", "rate", "positions"} <= set(shown)
    names = {metric["name"] for metric in page["metrics"]}
    assert "sink_importance" in names and not {"sink_attention", "value_drain"} & names
    assert not re.search(r"\bnan\b", html.split("<main>")[1].split("<section data-needs")[0])


def test_the_summary_says_nothing_that_no_prompt_defines(report):
    text = repr(report)
    assert "nan" not in text and "Value drain" not in text and "Strongest" not in text
    assert "Sink rate" in text and "no query comes after it" in " ".join(text.split())


@pytest.mark.parametrize("name", ["nonmixture_dims", "value_drains", "residual_norms"])
def test_a_figure_of_the_sink_beside_others_is_refused_in_a_sentence(report, name):
    with pytest.raises(ReportError, match="is nan in every prompt, so there is nothing to draw"):
        getattr(plot, name)(report)


def test_no_other_figure_fails(report):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.head_map(report)
        plot.head_change(report, report)
        plot.attention_by_query(report)
        plot.nonmixture_dims(report, 1)
        drawn = explore(report, widgets=False).figures
    assert "residual_peak" not in drawn and "received_attention" in drawn


def test_a_scan_of_one_token_writes_all_its_files(tmp_path):
    from typer.testing import CliRunner

    tokens = tmp_path / "one.json"
    tokens.write_text("[[5]]")
    command = ["scan", "bb-3l", "--tokens", str(tokens), "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    written = {path.name for path in (tmp_path / "out").iterdir()} - {".lock"}
    assert written == {"report.nc", "heads.csv", "report.html"}

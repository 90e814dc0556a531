"""The command line: one JSON object, one sentence for what is refused, nothing half-written."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest

from sinkscope import cli
from tests.families.architectures import BY_NAME


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama as a local folder of weights, no tokenizer."""
    where = tmp_path_factory.mktemp("model")
    BY_NAME["llama"].build().save_pretrained(where)
    return where


@pytest.fixture
def ids(tmp_path: Path) -> Path:
    file = tmp_path / "tokens.json"
    file.write_text(json.dumps(BY_NAME["llama"].tokens(prompts=3, length=16).tolist()))
    return file


def run(*arguments: object, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    """Run the command in this process: exit code, stdout, stderr."""
    old = sys.argv
    sys.argv = ["sinkscope", *map(str, arguments)]
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        sys.argv = old
    out, err = capsys.readouterr()
    return code, out, err


def test_json_is_one_object_with_the_promised_shapes(folder, ids, capsys) -> None:
    code, out, _ = run("scan", folder, "--tokens", ids, "--json", capsys=capsys)
    assert code == 0
    found = json.loads(out)
    shape = {
        "sink_attention": (3, 3, 4),
        "received_attention": (3, 4, 16),
        "attention_entropy": (3, 4),
        "sink_logit_gap": (3, 4),
        "head_output_norm": (3, 4),
        "honor": (3, 4),
        "value_norm": (3, 2, 16),
        "residual_norm": (3, 16),
        "sink_rate": (16,),
    }
    for name, sizes in shape.items():
        value = found[name]
        for size in sizes:
            assert len(value) == size, name
            value = value[0]
    assert found["settings"]["bos"] == "as given"
    assert isinstance(found["massive_activations"], list)
    assert isinstance(found["nonmixture_dims"], list)


def test_out_writes_three_files_that_agree(folder, ids, tmp_path, capsys) -> None:
    import pandas as pd

    import sinkscope as ss

    code, out, _ = run("scan", folder, "--tokens", ids, "--out", tmp_path / "o", capsys=capsys)
    assert code == 0 and "Strongest sink heads" in out
    assert {file.name for file in (tmp_path / "o").iterdir() if file.name != ".lock"} == {
        "report.nc",
        "heads.csv",
        "report.html",
    }
    report = ss.load_report(tmp_path / "o" / "report.nc")
    heads = pd.read_csv(tmp_path / "o" / "heads.csv")
    assert len(heads) == 3 * 3 * 4
    row = heads.query("prompt == 1 and layer == 2 and head == 3").iloc[0]
    want = float(report.sink_attention[1, 2, 3])
    assert row["sink_attention [probability]"] == pytest.approx(want, rel=1e-6)


def test_a_file_of_ids_may_be_named_as_texts(folder, ids, capsys) -> None:
    """The defaults of --prompts and --length, which nobody asked for, are no reason to refuse."""
    found = []
    for option in ("--tokens", "--texts"):
        asked = (option, ids, "--metrics", "sink_attention, values", "--json")
        code, out, _ = run("scan", folder, *asked, capsys=capsys)
        assert code == 0
        found.append(json.loads(out))
    assert found[0] == found[1] and found[0]["settings"]["source"] == "tokens.json"


def test_without_a_figure_per_head_there_is_no_table_of_heads(
    folder, ids, tmp_path, capsys
) -> None:
    where = tmp_path / "o"
    asked = ("--tokens", ids, "--metrics", "massive", "--out", where)
    code, out, _ = run("scan", folder, *asked, capsys=capsys)
    assert code == 0 and "no heads.csv" in out
    assert {file.name for file in where.iterdir() if file.name != ".lock"} == {
        "report.nc",
        "report.html",
    }


REFUSED = {
    "unknown model": (["scan", "no-such-model"], "no-such-model"),
    "empty text": (["scan", "{folder}", "--tokens", "{empty}"], "empty|no "),
    "ids out of range": (["scan", "{folder}", "--tokens", "{range}"], "out of range"),
    "beyond the context": (["scan", "{folder}", "--tokens", "{long}"], "context"),
    "not json": (["scan", "{folder}", "--tokens", "{folder}/config.jsonx"], "cannot be read"),
    "truncated gguf": (["scan", "{gguf}"], "gguf|GGUF"),
    "unwritable out": (["scan", "{folder}", "--tokens", "{ids}", "--out", "/proc/x"], "--out"),
    "bad sinks": (["scan", "{folder}", "--tokens", "{ids}", "--sinks", "first"], "--sinks first"),
    "prompts of ids": (
        ["scan", "{folder}", "--tokens", "{ids}", "--bos", "auto", "--seed", "0"],
        "tokens.json holds exact token ids, .* leave out --bos, --seed.$",
    ),
    "texts beside ids": (
        ["scan", "{folder}", "--tokens", "{ids}", "--texts", "code"],
        "out --texts",
    ),
    "length of ids": (["scan", "{folder}", "--texts", "{ids}", "--length", "9"], "out --length.$"),
    "no such ids": (["scan", "{folder}", "--texts", "none.json", "--length", "9"], "No such file"),
    "no metrics": (
        ["scan", "{folder}", "--tokens", "{ids}", "--metrics", ","],
        "--metrics ',' names",
    ),
    "sizes and lengths": (["bench", "--sizes", "1x8", "--lengths", "8"], "--sizes or --lengths"),
    "text without tokenizer": (["scan", "{folder}", "--texts", "prose"], "tokenizer"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_ends_in_a_sentence_and_exit_code_2(
    case, folder, ids, tmp_path, capsys
) -> None:
    files = {"empty": [], "range": [[1, 2, 9999]], "long": [[5] * 65]}
    for name, rows in files.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00" + b"\x00" * 20)
    known = {name: tmp_path / f"{name}.json" for name in files}
    known |= {"folder": folder, "ids": ids, "gguf": tmp_path / "cut.gguf"}
    arguments, sentence = REFUSED[case]
    before = sorted(tmp_path.rglob("*"))
    code, out, err = run(*(a.format(**known) for a in arguments), capsys=capsys)
    assert code == 2
    assert out == ""
    message = err.strip().splitlines()[-1]
    assert message.startswith("sinkscope: ") and "Traceback" not in err
    import re

    assert re.search(sentence, message), message
    assert sorted(tmp_path.rglob("*")) == before, "nothing may be written"


def test_nan_weights_are_refused(tmp_path, ids, capsys) -> None:
    model = BY_NAME["llama"].build()
    model.model.layers[1].mlp.down_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    code, out, err = run("scan", tmp_path / "nan", "--tokens", ids, capsys=capsys)
    assert (code, out) == (2, "")
    assert "nan" in err.lower() and "Traceback" not in err


def test_help_and_import_stay_light() -> None:
    """Neither the package nor `--help` may import torch, plotly or pandas."""
    script = (
        "import sys, sinkscope, sinkscope.cli\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'plotly', 'pandas', 'xarray'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_python_runs_the_package_as_the_command() -> None:
    script = [sys.executable, "-m", "sinkscope", "--version"]
    out = subprocess.run(script, capture_output=True, text=True, check=True).stdout
    assert out.strip() == version("sinkscope")


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_of_the_laboratory_names_every_operator(command, capsys, monkeypatch) -> None:
    from sinkscope import bb

    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("bb", command, "--help", capsys=capsys)
    missing = [name for name in (*bb.ATTENTIONS, *bb.OPTIMIZERS) if name not in out]
    assert not missing
    assert "cuts of the texts" not in out


@pytest.mark.parametrize("command", ["scan", "dormant", "stream", "trace-peak", "waiver"])
def test_paragraphs_of_help_fill_an_80_column_terminal(command, capsys, monkeypatch) -> None:
    """Where a line ends, the next word would not have fitted."""
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run(command, "--help", capsys=capsys)
    words = out.partition("{model}")[2].partition("╭")[0]
    lines = [line.strip() for line in words.splitlines()]
    paragraphs = [list(group) for there, group in itertools.groupby(lines, bool) if there]
    assert any(len(paragraph) > 1 for paragraph in paragraphs)
    for paragraph in paragraphs:
        for line, following in itertools.pairwise(paragraph):
            assert len(line) + 1 + len(following.split()[0]) > 78, line


def test_functions_are_not_hidden_by_modules_of_their_name() -> None:
    """Importing the modules in which they live must not hide the package's own functions."""
    script = (
        "import sinkscope, sinkscope.prompts.texts, sinkscope.capture.scan\n"
        "import sinkscope.models.capabilities\n"
        "print([callable(getattr(sinkscope, n)) for n in sinkscope.__all__ if n in "
        "('texts', 'scan', 'compare', 'capabilities')])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[True, True, True, True]"


def test_libraries_warn_their_authors_elsewhere(capsys, monkeypatch) -> None:
    """Their FutureWarnings stay off the terminal; our own are seen."""

    def warning_of(module: str) -> None:
        warnings.warn_explicit("renamed", FutureWarning, "file.py", 1, module=module)

    monkeypatch.setattr(cli, "app", lambda: warning_of("torch.nn.modules.module"))
    assert run("scan", capsys=capsys) == (0, "", "")
    monkeypatch.setattr(cli, "app", lambda: warning_of("sinkscope.scan"))
    with pytest.raises(FutureWarning, match="renamed"):
        run("scan", capsys=capsys)

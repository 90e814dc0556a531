"""`sinkscope waiver`, `trace-peak` and `stream`: JSON, files, a text of one's own, refusals."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from sinkscope.cli import app
from sinkscope.cli.waiver import QUESTIONS
from sinkscope.errors import ReportError, SinkscopeError
from tests.families.architectures import BY_NAME
from tests.prompts.tiny_tokenizers import words


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with a tokenizer, and a text file of 300 words, longer than its context."""
    where = tmp_path_factory.mktemp("waiver")
    BY_NAME["llama"].build().save_pretrained(where / "model")
    words(bos=True).save_pretrained(where / "model")
    (where / "text.txt").write_text(" ".join(f"w{4 + i * i % 31}" for i in range(300)))
    return where


def run(*arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_waiver_answers_what_it_can_and_says_what_it_cannot(folder, tmp_path) -> None:
    asked = ("waiver", folder / "model", "--texts", folder / "text.txt")
    asked += ("--prompts", 2, "--length", 16)
    done = run(*asked, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert set(found) == {"nonmixture", "mask", "positions", "parts", "refused"}
    assert "no learned position vectors" in found["refused"]["norms"]
    assert found["mask"]["position"] == 10, "two thirds along"
    for name in set(found) - {"refused"}:
        asked_there = html.escape(QUESTIONS[name].partition(" (")[0])
        assert f"<h1>{asked_there}</h1>" in (tmp_path / f"{name}.html").read_text()
    for name in ("nonmixture", "mask", "positions", "parts"):
        assert json.loads((tmp_path / f"{name}.json").read_text())["about"].endswith("text.txt")
        assert (tmp_path / f"{name}.csv").exists() and (tmp_path / f"{name}.html").exists()
    told = run(*asked, "--ask", "mask, nonmixture", "--position", 7)
    assert "Does a token become the sink when it attends only to itself?" in told.stdout
    assert re.search(r"^ *special,(\n| .*\n) *designated|special, designated", told.stdout, re.M)
    assert "after 7" in told.stdout
    assert max(map(len, told.stdout.splitlines())) <= 100
    assert isinstance(run(*asked, "--ask", "norms").exception, SinkscopeError)
    assert "not a question" in str(run(*asked, "--ask", "why").exception)


def test_a_folder_holds_the_answers_to_one_request(folder, tmp_path) -> None:
    """Before, mask.json of one text stood beside nonmixture.json of another."""
    asked = ("waiver", folder / "model", "--texts", folder / "text.txt", "--prompts", 2)
    asked += ("--length", 16, "--out", tmp_path)
    assert run(*asked, "--ask", "nonmixture").exit_code == 0
    first = (tmp_path / "nonmixture.json").read_text()
    assert run(*asked, "--ask", "mask").exit_code == 0, "another question, asked of the same"
    assert run(*asked, "--ask", "nonmixture").exit_code == 0, "the same again"
    for other, what in (
        (("--seed", 1), "another tokens|another seed"),
        (("--position", 4), r"another position \(none; now 4\)"),
        (("--dtype", "bfloat16"), "another dtype"),
    ):
        done = run(*asked, "--ask", "mask", *other)
        assert isinstance(done.exception, ReportError)
        assert re.search(what, str(done.exception)) and "name another folder" in str(done.exception)
    edited = BY_NAME["llama"].build()
    edited.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1
    edited.save_pretrained(folder / "edited")
    words(bos=True).save_pretrained(folder / "edited")
    done = run("waiver", folder / "edited", *asked[2:], "--ask", "parts")
    assert "nonmixture.json was measured" in str(done.exception)
    assert (tmp_path / "nonmixture.json").read_text() == first
    assert not (tmp_path / "parts.json").exists()
    (tmp_path / "waiver.request.json").unlink()
    done = run(*asked, "--ask", "mask")
    assert "waiver.request.json is missing" in str(done.exception)


def test_trace_peak_writes_what_it_prints(folder, tmp_path) -> None:
    asked = (
        "trace-peak",
        folder / "model",
        "--texts",
        folder / "text.txt",
        "--modes",
        "zero, mean",
    )
    done = run(*asked, "--prompts", 2, "--length", 12, "--out", tmp_path, "--json")
    assert done.exit_code == 0, done.output
    assert set(json.loads(done.stdout)) >= {"peak", "written_in", "zero", "mean", "summary"}
    table = pd.read_csv(tmp_path / "trace-peak.csv")
    assert set(table["part"]) == {"none", "attention", "ffn"}
    assert set(table["removed"]) == {-1, 0, 1, 2}


def test_exact_ids_are_taken_from_a_file_and_nothing_beside_them(folder, tmp_path) -> None:
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(BY_NAME["llama"].tokens(prompts=2, length=12).tolist()))
    for command in (("waiver", "--ask", "mask"), ("trace-peak", "--modes", "zero")):
        asked = (command[0], folder / "model", *command[1:], "--texts", ids)
        done = run(*asked, "--json")
        assert done.exit_code == 0, done.output
        assert "T = 12" in done.stdout and "ids.json" in done.stdout
        refused = str(run(*asked, "--prompts", 2).exception)
        assert refused.endswith(
            "ids.json holds exact token ids, which are used as they are; leave out --prompts."
        )
    assert (
        run("waiver", folder / "model", "--ask", "mask", "--texts", ids, "--seed", 1).exit_code == 0
    )
    done = run("stream", folder / "model", "--texts", ids, "--tokens", 10, "--bos", "never")
    assert "leave out --bos." in str(done.exception)


def test_stream_reads_a_file_longer_than_the_context(folder, tmp_path) -> None:
    asked = ("stream", folder / "model", "--texts", folder / "text.txt", "--tokens", 200)
    asked += ("--windows", "16,32", "--sinks", "0,2", "--designated", 40, "--out", tmp_path)
    done = run(*asked, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    kept = [(row["kept"], row["window"]) for row in found["settings"]]
    each = ["0 sinks", "2 sinks", "40 as it is", "designated 40"]
    assert kept == [(name, window) for window in (16, 32) for name in each], "64 fit, 200 do not"
    assert {row["positions"] for row in found["settings"]} == {"cache"}
    assert found["after"] == 41
    for suffix in ("nc", "csv", "html", "json"):
        assert (tmp_path / f"stream.{suffix}").exists()
    again = run(*asked)
    assert again.exit_code == 0 and "200 tokens, whose keys and values" in again.stdout
    assert "another settings" in str(run(*asked, "--windows", 8).exception)
    assert "has 301 tokens, fewer than the 400" in str(run(*asked, "--tokens", 400).exception)
    assert "whole numbers" in str(run(*asked, "--sinks", "few").exception)


def test_stream_designates_what_a_short_text_has(folder) -> None:
    """A position that nobody asked for is no reason to refuse; a negative number of sinks is."""
    asked = ("stream", folder / "model", "--texts", folder / "text.txt", "--tokens", 60)
    asked += ("--windows", 16)
    done = run(*asked, "--sinks", 0)
    assert done.exit_code == 0, done.output
    assert "designated 40" in done.stdout and "so a position two thirds along" in done.stdout
    found = json.loads(run(*asked, "--sinks", 0, "--json").stdout)
    kept = [row["kept"] for row in found["settings"]]
    assert kept == ["everything", "0 sinks", "40 as it is", "designated 40"]
    refused = run(*asked, "--sinks=-1").exception
    assert isinstance(refused, SinkscopeError) and "-1 first tokens cannot be kept" in str(refused)
    asked_for = run(*asked, "--designated", 255).exception
    assert "Position 255 is to be kept, and the text has 60 tokens" in str(asked_for)


def test_an_interruption_says_how_to_go_on(folder, tmp_path, monkeypatch) -> None:
    """Only where something is kept: after the first of two settings, and not before."""
    from sinkscope.experiments import streaming_context as experiment

    whole, left = experiment.stream, [1]

    def stop(*args, **options):
        left[-1] -= 1
        if left[-1] < 0:
            raise KeyboardInterrupt
        return whole(*args, **options)

    monkeypatch.setattr(experiment, "stream", stop)
    asked = ("--texts", folder / "text.txt", "--tokens", 60, "--designated", "none")
    asked += ("--windows", "8, 16", "--sinks", "0", "--no-full", "--out", tmp_path)
    done = run("stream", folder / "model", *asked)
    assert done.exit_code == 130
    assert f"the same command continues from {tmp_path}/stream.nc." in done.stderr
    (tmp_path / "stream.nc").unlink()
    done = run("stream", folder / "model", *asked)
    assert done.exit_code == 130 and "continues from" not in done.stderr

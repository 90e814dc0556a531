"""`sinkscope dormant`: one JSON object, files that agree with it, refusals in a sentence."""

from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest
import typer
from typer.testing import CliRunner

from sinkscope.cli.dormant import dormant
from sinkscope.errors import SinkscopeError
from tests.families.architectures import BY_NAME

LLAMA = BY_NAME["llama"]


@pytest.fixture(scope="module")
def app() -> typer.Typer:
    alone = typer.Typer()
    alone.command()(dormant)
    return alone


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama, and two files of exact token ids."""
    where = tmp_path_factory.mktemp("dormant")
    LLAMA.build().save_pretrained(where / "model")
    for seed, name in enumerate(("one", "two")):
        ids = LLAMA.tokens(prompts=4, length=12, seed=seed).tolist()
        (where / f"{name}.json").write_text(json.dumps(ids))
    return where


def run(app: typer.Typer, *arguments: object):
    return CliRunner().invoke(app, [str(a) for a in arguments])


def test_exact_ids_keep_their_own_length(app, folder) -> None:
    kinds = f"{folder / 'one.json'},{folder / 'two.json'}"
    done = run(app, folder / "model", "--domains", kinds, "--json")
    assert done.exit_code == 0, done.output
    assert "T = 12" in json.loads(done.stdout)["dormant"]["about"]


def test_options_that_exact_ids_make_void_are_refused(app, folder) -> None:
    kinds = f"{folder / 'one.json'}, {folder / 'two.json'}"
    done = run(app, folder / "model", "--domains", kinds, "--length", 128, "--bos", "never")
    assert isinstance(done.exception, SinkscopeError)
    assert str(done.exception).endswith("used as they are; leave out --length, --bos.")


def test_an_interruption_says_what_is_kept(app, folder, tmp_path, monkeypatch) -> None:
    from sinkscope.experiments import dormant as experiment

    def stop(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(experiment, "ablate_heads", stop)
    kinds = f"{folder / 'one.json'},{folder / 'two.json'}"
    out = tmp_path / "out"
    done = run(app, folder / "model", "--domains", kinds, "--remove", "zero", "--out", out)
    assert done.exit_code == 130
    assert f"the same command continues from {out}" in done.stderr
    assert len(list(out.glob("*.nc"))) == 2


def test_files_and_json_agree(app, tmp_path, monkeypatch) -> None:
    """A model with a tokenizer, on two text files."""
    from tests.prompts.tiny_tokenizers import words

    LLAMA.build().save_pretrained(tmp_path / "model")
    words(bos=True).save_pretrained(tmp_path / "model")
    for name, first in (("one", 4), ("two", 20)):
        text = " ".join(f"w{first + i % 16}" for i in range(400))
        (tmp_path / f"{name}.txt").write_text(text)
    kinds = f"{tmp_path / 'one.txt'},{tmp_path / 'two.txt'}"
    out = tmp_path / "out"
    sizes = ("--prompts", 3, "--length", 12, "--remove-prompts", 2)
    asked = (*sizes, "--remove", "zero", "--inactive")
    done = run(app, tmp_path / "model", "--domains", kinds, *asked, "--out", out, "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert len(found) == 3 and "dormant" in found
    assert found["dormant"]["heads"] == 12
    assert set(found["dormant"]["prediction"]) == {"zero"}
    table = pd.read_csv(out / "dormant.csv")
    assert len(table) == 2 * 12
    inactive = [name for name in found if name.startswith("inactive-")]
    for name in inactive:
        assert (out / f"{name}.csv").exists() and (out / f"{name}.html").exists()
        shares = found[name]["largest_share"]
        assert len(shares) == 15 and "random" in shares
    again = run(app, tmp_path / "model", "--domains", kinds, *asked, "--out", out)
    assert again.exit_code == 0
    assert "Sink heads" in again.stdout and f"wrote {out / 'dormant.json'}" in again.stdout


def test_one_kind_is_refused(app, folder) -> None:
    done = run(app, folder / "model", "--domains", "prose")
    assert isinstance(done.exception, SinkscopeError)

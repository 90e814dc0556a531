"""What several processes, damaged files, changed models and full memory do to kept results."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import sinkscope as ss
from sinkscope.cli import app
from sinkscope.errors import ReportError, UnsupportedError
from sinkscope.experiments.ablation import Ablation, ablate_heads
from sinkscope.experiments.dormant import dormancy
from sinkscope.experiments.inactive_heads import ablate_inactive
from sinkscope.experiments.partial_forward import Partway
from sinkscope.experiments.resume import file_stem
from sinkscope.metrics.heads import is_dormant
from sinkscope.output import locked
from tests.families.architectures import BY_NAME

LLAMA = BY_NAME["llama"]
TOKENS = LLAMA.tokens(prompts=3, length=12)
HEADS = [(1, 1)]


@pytest.fixture
def model():
    return ss.load_model(LLAMA.build())


def keep(model, file: Path) -> Ablation:
    return ablate_heads(model, ss.token_ids(TOKENS), heads=HEADS, file=file, progress=False)


HOLD = """
import sys
from sinkscope.metrics.heads import is_dormant
from sinkscope.output import locked
with locked(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_another_process_is_kept_out_while_one_writes(model, tmp_path) -> None:
    file = tmp_path / "a.nc"
    for place, measure in (
        (file, lambda: keep(model, file)),
        (
            tmp_path,
            lambda: dormancy(
                model,
                {"one": ss.token_ids(TOKENS), "two": ss.token_ids(TOKENS.flip(0))},
                out=tmp_path,
                progress=False,
            ),
        ),
    ):
        command = [sys.executable, "-c", HOLD, str(place)]
        with subprocess.Popen(command, stdin=-1, stdout=-1, text=True) as holder:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
            with pytest.raises(ReportError, match="Another process is writing to"):
                measure()
            assert not list(tmp_path.glob("*.nc"))
            holder.kill()
        assert measure() is not None, "a process that was killed holds nothing"
        for kept in tmp_path.glob("*.nc"):
            kept.unlink()


def test_a_process_may_lock_what_it_holds(tmp_path) -> None:
    with locked(tmp_path), locked(tmp_path), locked(tmp_path / "x.nc"):
        pass


@pytest.mark.parametrize(
    "content", [None, b"", b'{"request": {', b"\xff\xfe\x00", b"null", b"[]", b'{"request": 1}']
)
def test_a_damaged_request_is_one_sentence(model, tmp_path, content: bytes | None) -> None:
    file = tmp_path / "a.nc"
    keep(model, file)
    record = tmp_path / "a.request.json"
    record.unlink() if content is None else record.write_bytes(content)
    with pytest.raises(ReportError, match="a.request.json is (damaged|missing); .*delete both"):
        keep(model, file)


def test_a_deep_request_is_one_sentence(model, tmp_path) -> None:
    keep(model, tmp_path / "a.nc")
    (tmp_path / "a.request.json").write_text("[" * 100_000)
    with pytest.raises(ReportError, match="is damaged"):
        keep(model, tmp_path / "a.nc")


def test_a_changed_model_is_not_taken_for_the_one_before(tmp_path) -> None:
    """One weight deep inside a row, a torch hook, a permanent hook, a changed setting."""
    plain = LLAMA.build()
    model = ss.load_model(plain)
    keep(model, tmp_path / "a.nc")
    with torch.no_grad():
        weight = next(p for n, p in model.original_model.named_parameters() if "down_proj" in n)
        before = weight[3, -1].clone()
        weight[3, -1] += 0.5
    with pytest.raises(ReportError, match="another model"):
        keep(model, tmp_path / "a.nc")
    with torch.no_grad():
        weight[3, -1] = before
    block = model.blocks[1].original_component
    handle = block.mlp.register_forward_hook(lambda module, args, out: 1.5 * out)
    with pytest.raises(ReportError, match="another model"):
        keep(model, tmp_path / "a.nc")
    handle.remove()
    norm = next(m for m in model.original_model.modules() if hasattr(m, "variance_epsilon"))
    norm.variance_epsilon, old = 0.5, norm.variance_epsilon
    with pytest.raises(ReportError, match="another model"):
        keep(model, tmp_path / "a.nc")
    norm.variance_epsilon = old
    keep(model, tmp_path / "a.nc")


def test_out_of_memory_on_a_cpu_runs_fewer_heads_at_once(model, monkeypatch) -> None:
    """The message of torch's allocator on Linux; the losses are those of one head at a time."""
    texts = ss.token_ids(TOKENS)
    whole = ablate_heads(model, texts, progress=False)
    real, rows = Partway.final, []

    def small(self, tokens, *args, **options):
        rows.append(len(tokens))
        if len(tokens) > 6:
            raise RuntimeError(
                "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't "
                "allocate memory: you tried to allocate 68719476736 bytes."
            )
        return real(self, tokens, *args, **options)

    monkeypatch.setattr(Partway, "final", small)
    got = ablate_heads(model, texts, progress=False)
    assert max(rows) > 6
    torch.testing.assert_close(got.ablated_loss, whole.ablated_loss, atol=1e-5, rtol=0)


def test_names_that_look_alike_have_files_of_their_own(model, tmp_path) -> None:
    assert file_stem("prose") == "prose"
    names = ["a-b.txt", "a_b.txt", "A_b.txt", "a/b.txt", "x" * 300, "x" * 301]
    assert len({file_stem(name).lower() for name in names}) == len(names)
    assert all(len(file_stem(name)) < 80 for name in names)
    for name, seed in (("a-b.json", 1), ("a_b.json", 2)):
        ids = LLAMA.tokens(prompts=2, length=10, seed=seed).tolist()
        (tmp_path / name).write_text(json.dumps(ids))
    LLAMA.build().save_pretrained(tmp_path / "model")
    domains = f"{tmp_path / 'a-b.json'},{tmp_path / 'a_b.json'}"
    asked = [str(tmp_path / "model"), "--domains", domains, "--out", str(tmp_path / "out")]
    done = CliRunner().invoke(app, ["dormant", *asked, "--inactive", "--json"])
    assert done.exit_code == 0, done.output
    pages = [file.name for file in (tmp_path / "out").glob("inactive-*.html")]
    assert len(pages) == 2 and len(json.loads(done.stdout)) == 3


def test_a_folder_of_the_version_before_goes_on_under_its_names(tmp_path, monkeypatch) -> None:
    for name, seed in (("one.json", 1), ("two.json", 2)):
        ids = LLAMA.tokens(prompts=2, length=10, seed=seed).tolist()
        (tmp_path / name).write_text(json.dumps(ids))
    LLAMA.build().save_pretrained(tmp_path / "model")
    domains = f"{tmp_path / 'one.json'},{tmp_path / 'two.json'}"
    out = tmp_path / "out"
    asked = ["dormant", str(tmp_path / "model"), "--domains", domains, "--out", str(out), "--json"]
    with pytest.warns(DeprecationWarning, match="--sleep is now --inactive"):
        done = CliRunner().invoke(app, [*asked, "--sleep"], catch_exceptions=False)
    first = json.loads(done.stdout)
    kept = sorted(out.glob("inactive-*"))
    assert kept
    for file in kept:
        file.rename(out / file.name.replace("inactive-", "sleep-", 1))
    again = CliRunner().invoke(app, [*asked, "--inactive"], catch_exceptions=False)
    second = json.loads(again.stdout)
    assert not list(out.glob("inactive-*"))
    for name, values in first.items():
        assert second[name.replace("inactive-", "sleep-", 1)] == values


def test_what_a_model_cannot_answer_is_refused_before_the_work(tmp_path, monkeypatch) -> None:
    from sinkscope.experiments import dormant as dormant_module
    from sinkscope.experiments import waiver as waiver_module

    def worked(*args: object, **options: object) -> None:
        raise AssertionError("the work has begun")

    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps(TOKENS.tolist()))
    (tmp_path / "other.json").write_text(json.dumps(TOKENS.flip(0).tolist()))
    BY_NAME["bert"].build().save_pretrained(tmp_path / "bert")
    LLAMA.build().save_pretrained(tmp_path / "llama")
    monkeypatch.setattr(dormant_module, "scan", worked)
    monkeypatch.setattr(waiver_module, "structured_mask", worked)
    domains = f"{ids},{tmp_path / 'other.json'}"
    done = CliRunner().invoke(
        app, ["dormant", str(tmp_path / "bert"), "--domains", domains, "--inactive"]
    )
    assert isinstance(done.exception, UnsupportedError) and "no loss" in str(done.exception)
    done = CliRunner().invoke(
        app, ["waiver", str(tmp_path / "llama"), "--ask", "mask,norms", "--texts", str(ids)]
    )
    assert isinstance(done.exception, UnsupportedError)
    assert "no learned position vectors" in str(done.exception)


def test_old_names_work_and_warn(model, tmp_path) -> None:
    texts = ss.token_ids(TOKENS)

    def warned(new: str):
        return pytest.warns(DeprecationWarning, match=f"is now .*{new}")

    for module, old, new in (
        ("removal", "removal", ablate_heads),
        ("removal", "Removal", Ablation),
        ("sleep", "sleep", ablate_inactive),
    ):
        with warned(new.__name__):
            found = getattr(importlib.import_module(f"sinkscope.experiments.{module}"), old)
        assert found is new
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        importlib.import_module("sinkscope.experiments.sleep").nothing  # noqa: B018
    found = ablate_heads(model, texts, heads=HEADS, progress=False)
    with warned("to_frame"):
        assert found.frame().equals(found.to_frame())
    with warned("statistics"):
        assert found.findings().keys() == found.statistics().keys()
    with warned("ablated_loss"):
        assert found.loss_without is found.ablated_loss
    with warned("save"):
        files = found.save(tmp_path, "old")
    assert files == found.save(tmp_path / "old")
    with pytest.raises(ReportError, match=r"adds the suffixes .json, .csv and .html itself"):
        found.save(tmp_path / "old.html")
    kinds = {"one": texts, "two": ss.token_ids(TOKENS.flip(0))}
    with warned("sink_threshold"):
        old = dormancy(model, kinds, parked=0.1, progress=False)
    assert old.sink_threshold == 0.1
    with warned("sink_threshold"):
        assert old.parked == 0.1
    with warned("sink_threshold"):
        assert is_dormant(torch.tensor([0.2, 0.4]), parked=0.3).tolist() == [False, True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert "Sink heads" in old._repr_html_()

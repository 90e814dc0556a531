"""A metric of one's own, defined outside the package, is measured and kept like any other."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sinkscope as ss
from sinkscope.capture.observers import base
from sinkscope.errors import ReportError, UnsupportedError
from tests.families.architectures import BY_NAME

LENGTHS = (12, 9, 5)
FIELD = ss.measured("prompt layer kv_head", unit="1", about="kurtosis of the values")


@pytest.fixture(autouse=True)
def registry():
    """What a test defines is forgotten after it."""
    before = {metric: list(kinds) for metric, kinds in base._registered.items()}
    yield
    base._registered.clear()
    base._registered.update(before)


def define_kurtosis() -> type[ss.Observer]:
    class ValueKurtosis(ss.Observer, metric="value_kurtosis", reads="value"):
        fields = {"value_kurtosis": FIELD}

        def observe(self, x, batch):
            real = batch.mask[:, :, None, None]
            count = batch.mask.sum(dim=1)[:, None] * x.shape[-1]
            mean = (x * real).sum(dim=(1, 3)) / count
            apart = (x - mean[:, None, :, None]) * real
            variance = apart.square().sum(dim=(1, 3)) / count
            return {"value_kurtosis": (apart**4).sum(dim=(1, 3)) / count / variance**2}

    return ValueKurtosis


def prompts():
    tokens = BY_NAME["llama"].tokens(prompts=len(LENGTHS), length=max(LENGTHS))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    return tokens * mask, mask.long()


def values_of_transformers() -> torch.Tensor:
    """Kurtosis of what transformers' eager model projects as values, in plain Python."""
    hf = BY_NAME["llama"].build()
    seen: list[torch.Tensor] = []
    for layer in hf.model.layers:
        layer.self_attn.v_proj.register_forward_hook(lambda module, args, out: seen.append(out))
    tokens, _ = prompts()
    found = []
    for row, length in zip(tokens, LENGTHS, strict=True):
        seen.clear()
        with torch.no_grad():
            hf(row[None, :length])
        for value in seen:
            for head in value[0].split(value.shape[-1] // hf.config.num_key_value_heads, dim=-1):
                numbers = head.flatten().tolist()
                mean = sum(numbers) / len(numbers)
                second = sum((n - mean) ** 2 for n in numbers) / len(numbers)
                fourth = sum((n - mean) ** 4 for n in numbers) / len(numbers)
                found.append(fourth / second**2)
    return torch.tensor(found).reshape(len(LENGTHS), len(seen), -1)


@pytest.mark.parametrize("attention", ["eager", "streaming"])
def test_a_metric_of_ones_own_is_a_full_citizen(attention: str, tmp_path: Path) -> None:
    define_kurtosis()
    model = ss.load_model(BY_NAME["llama"].build())
    tokens, mask = prompts()
    ask = dict(metrics=["core", "value_kurtosis"], attention=attention, batch=2, progress=False)
    report = ss.scan(model, ss.token_ids(tokens, mask), **ask)
    torch.testing.assert_close(
        report["value_kurtosis"], values_of_transformers(), atol=1e-4, rtol=1e-4
    )
    assert "value_kurtosis" in ss.capabilities(model).available
    assert report.settings.metrics[-1] == "value_kurtosis"
    assert list(report.to_frame("value_kurtosis")) == [
        "prompt", "layer", "kv_head", "value_kurtosis [1]",
    ]  # fmt: skip
    array = report.to_xarray()["value_kurtosis"]
    assert array.dims == ("prompt", "layer", "kv_head") and array.attrs["units"] == "1"
    loaded = ss.load_report(report.save(tmp_path / "r.nc"))
    assert loaded.equals(report) and pickle.loads(pickle.dumps(report)).equals(report)
    both = report.merge(loaded)
    assert torch.equal(both["value_kurtosis"], report["value_kurtosis"].repeat(2, 1, 1))
    assert "value_kurtosis" in ss.compare(report, loaded).names
    assert ss.plot.head_map(report, "value_kurtosis").data
    assert ss.plot.by_layer(report, "value_kurtosis").data
    assert "value kurtosis" in report.to_html()


def test_a_file_opens_without_the_class(tmp_path: Path) -> None:
    define_kurtosis()
    model = ss.load_model(BY_NAME["llama"].build())
    tokens, mask = prompts()
    report = ss.scan(model, ss.token_ids(tokens, mask), metrics="value_kurtosis", progress=False)
    report.save(tmp_path / "r.nc")
    script = (
        "import sinkscope as ss, sys; r = ss.load_report(sys.argv[1]);"
        "v = r.variables()['value_kurtosis']; print(v.about, *v.dims, v.unit);"
        "print(r.mean('value_kurtosis').sum().item(), len(ss.plot.head_map(r, v.name).data))"
    )
    told = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "r.nc")],
        capture_output=True, text=True, check=True,
    ).stdout.splitlines()  # fmt: skip
    assert told[0] == "kurtosis of the values prompt layer kv_head 1"
    assert float(told[1].split()[0]) == pytest.approx(float(report.mean("value_kurtosis").sum()))


def test_only_one_report_has_it() -> None:
    define_kurtosis()
    model = ss.load_model(BY_NAME["llama"].build())
    texts = ss.token_ids(*prompts())
    core = ss.scan(model, texts, metrics="residual", progress=False)
    more = ss.scan(model, texts, metrics=["residual", "value_kurtosis"], progress=False)
    for one, other in ((core, more), (more, core)):
        with pytest.raises(ReportError, match="metrics differs"):
            one.merge(other)
    with pytest.raises(ReportError, match="There is no 'value_kurtosis' in a SinkReport"):
        core["value_kurtosis"]


def test_means_over_prompts_and_single_tokens() -> None:
    """The other two kinds of fields, against the hook points themselves."""

    class Norms(ss.Observer, metric="norms_of_mine", reads="mlp_out"):
        fields = {
            "ffn_norm": ss.measured("layer position", unit="activation", about="‖FFN output‖"),
            "ffn_largest": ss.measured("prompt position", unit="activation", about="largest"),
        }

        def observe(self, x, batch):
            return {"norm": x.norm(dim=-1)}

        def finish(self, layers, batch):
            return {"ffn_norm": layers["norm"], "ffn_largest": layers["norm"].amax(dim=0)}

    model = ss.load_model(BY_NAME["llama"].build())
    tokens, mask = prompts()
    report = ss.scan(
        model, ss.token_ids(tokens, mask), metrics="norms_of_mine", batch=1, progress=False
    )
    _, cache = model.run_with_cache(tokens, names_filter=lambda n: n.endswith("hook_mlp_out"))
    norms = torch.stack([x.norm(dim=-1) for x in cache.values()]).where(mask.bool(), torch.nan)
    torch.testing.assert_close(report["ffn_norm"], norms.nanmean(dim=1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        report["ffn_largest"], norms.amax(dim=0), atol=1e-5, rtol=1e-5, equal_nan=True
    )
    merged = report.merge(report)
    torch.testing.assert_close(merged["ffn_norm"], report["ffn_norm"])


@pytest.mark.parametrize("attention", ["eager", "streaming"])
def test_patterns_can_be_read_whole(attention: str) -> None:
    """Beside a metric that asks a reader, on both ways of reading attention."""

    class Diagonal(ss.Observer, metric="diagonal", reads="pattern"):
        fields = {"self_attention": ss.measured("prompt layer head", unit="probability")}

        def observe(self, x, batch):
            on_itself = x.diagonal(dim1=-2, dim2=-1) * batch.mask[:, None]
            return {"self_attention": on_itself.sum(-1) / batch.mask.sum(-1)[:, None]}

    hf = BY_NAME["llama"].build()
    tokens = BY_NAME["llama"].tokens(prompts=2, length=12)
    with torch.no_grad():
        patterns = hf(tokens, output_attentions=True).attentions
    want = torch.stack([p.diagonal(dim1=-2, dim2=-1).mean(-1) for p in patterns], dim=1)
    model = ss.load_model(hf)
    ask = dict(metrics=["diagonal", "sink_attention"], attention=attention, progress=False)
    report = ss.scan(model, ss.token_ids(tokens), **ask)
    torch.testing.assert_close(report["self_attention"], want, atol=1e-5, rtol=1e-5)
    first = torch.stack([p[:, :, 1:, 0].mean(-1) for p in patterns], dim=1)
    torch.testing.assert_close(report.sink_attention, first, atol=1e-5, rtol=1e-5)


def test_a_cell_may_be_run_again() -> None:
    first, second = define_kurtosis(), define_kurtosis()
    assert base.metrics()["value_kurtosis"] == (second,) and first is not second

    class RenamedKurtosis(ss.Observer, metric="value_kurtosis", reads="key"):
        fields = {"value_kurtosis": FIELD}

    assert base.metrics()["value_kurtosis"] == (RenamedKurtosis,)


@pytest.mark.parametrize(
    ("metric", "reads", "field", "dims", "error", "message"),
    [
        ("mine", "values", "mine", "prompt layer", UnsupportedError, "'values', which is not a"),
        ("mine", "", "mine", "prompt layer", UnsupportedError, "'mine' but no signal; add reads="),
        ("residual", "value", "mine", "prompt layer", UnsupportedError, "a metric 'residual' alre"),
        ("core", "value", "mine", "prompt layer", UnsupportedError, "a metric 'core' already"),
        ("honor", "value", "mine", "prompt layer", UnsupportedError, "field of the metric 'head_o"),
        ("mine", "value", "honor", "prompt layer", ReportError, "'honor' is already used in"),
        ("mine", "value", "save", "prompt layer", ReportError, "'save' is already used in reports"),
        ("mine", "value", "no name", "prompt layer", ReportError, "names must be Python"),
        ("mine", "value", "mine", "layer head", ReportError, "expected measured"),
        ("mine", "value", "mine", "head prompt", ReportError, "expected measured"),
        ("mine", "value", "mine", "prompt layer layer", ReportError, "expected measured"),
        ("mine", "value", "mine", "prompt position head", ReportError, "expected measured"),
        ("mine", "value", "mine", None, ReportError, "expected measured"),
    ],
)  # fmt: skip
def test_what_cannot_be_declared(metric, reads, field, dims, error, message) -> None:
    before = dict(base._registered)
    with pytest.raises(error, match=message) as caught:
        type(ss.Observer)(
            "Mine",
            (ss.Observer,),
            {"fields": {field: ss.measured(dims)}},
            metric=metric,
            reads=reads,
        )
    assert "\n" not in str(caught.value) and dict(base._registered) == before


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda x: {"mine": x.norm(dim=-1)}, r"gave the shape \(3, 3, 12, 2\) for mine"),
        (lambda x: {"mine": x.sum(dim=(1, 3))[:, :1]}, r"gave the shape \(3, 3, 1\) for mine"),
        (lambda x: {"other": x.sum(dim=(1, 3))}, "'other', which is not a field"),
        (lambda x: {"value_drain": x.sum(dim=(1, 3))}, "'value_drain', a field of the metric 'val"),
        (lambda x: x.sum(dim=(1, 3)), "of Mine returned a Tensor; expected a dict"),
        (lambda x: {"mine": [1.0]}, "of Mine returned a list for mine; expected a dict"),
        (lambda x: None, "did not measure it"),
    ],
)
def test_what_observe_must_not_return(made, message) -> None:
    class Mine(ss.Observer, metric="mine", reads="value"):
        fields = {"mine": ss.measured("prompt layer kv_head")}

        def observe(self, x, batch):
            return made(x)

    model = ss.load_model(BY_NAME["llama"].build())
    texts = ss.token_ids(BY_NAME["llama"].tokens(prompts=3, length=12))
    with pytest.raises(ReportError, match=message):
        ss.scan(model, texts, metrics="mine", progress=False)

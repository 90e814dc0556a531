"""Dynamics: one report a checkpoint, curves that are those of each checkpoint alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.errors import ModelError, ReportError, TextError
from sinkscope.experiments import dynamics as module
from sinkscope.experiments.dynamics import dynamics
from tests.experiments.test_ablation_families import losses
from tests.families.architectures import BY_NAME, N_HEADS, N_LAYERS
from tests.families.reference import reference

LLAMA = BY_NAME["llama"]
TOKENS = LLAMA.tokens(prompts=3, length=16)
STEPS = (0, 50, 400)
SEEDS = dict(zip(STEPS, (3, 1, 2), strict=True))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Step folders of a "run", out of order."""
    where = tmp_path_factory.mktemp("run")
    for step, seed in SEEDS.items():
        LLAMA.build(seed=seed).save_pretrained(where / f"checkpoint-{step}")
    return [where / f"checkpoint-{step}" for step in (400, 0, 50)]


def test_curves_are_those_of_each_checkpoint(folders) -> None:
    found = dynamics(None, folders, ss.token_ids(TOKENS), sink_threshold=0.1, progress=False)
    assert found.steps == STEPS
    curves = found.overview()
    for index, seed in enumerate(SEEDS.values()):
        ref = {k: v.double().numpy() for k, v in reference(LLAMA.build(seed), TOKENS).items()}
        first = ref["attentions"][..., 0]  # [layer prompt head query]
        attention = first[..., 1:].mean(-1).mean(1)  # [layer head]
        assert float(curves["sink_attention"][index]) == pytest.approx(attention.mean(), abs=1e-5)
        assert float(curves["dormant_share"][index]) == pytest.approx((attention > 0.1).mean())
        # Every query sees the first token, itself included.
        rate = (first.mean(-1) > 0.3).mean()
        assert float(curves["sink_rate"][index]) == pytest.approx(rate)
        norm = np.linalg.norm(ref["resid_post"], axis=-1)  # [layer prompt position]
        peak = (norm[..., 0] / np.median(norm[..., 1:], axis=-1)).mean(1).max()
        assert float(curves["residual_peak"][index]) == pytest.approx(peak, rel=1e-4)
        value = np.linalg.norm(ref["values"], axis=-1)  # [layer prompt position kv_head]
        drain = (value[:, :, 0] / value[:, :, 1:].mean(2)).mean(1)
        assert float(curves["value_drain"][index]) == pytest.approx(np.median(drain), rel=1e-4)
        loss = losses(LLAMA.build(seed), TOKENS).mean()
        assert float(curves["loss"][index]) == pytest.approx(loss, abs=1e-4)


def test_the_frame_has_a_row_a_step_and_head(folders) -> None:
    found = dynamics(None, folders, ss.token_ids(TOKENS), progress=False)
    frame = found.to_frame()
    heads = frame.query("metric == 'sink_attention' and head >= 0")
    assert len(heads) == 3 * N_LAYERS * N_HEADS
    row = heads.query("step == 50 and layer == 2 and head == 3")["value"].item()
    want = found.reports[50].mean("sink_attention")[2, 3]
    assert row == pytest.approx(float(want))
    layers = frame.query("metric == 'residual_peak' and layer >= 0 and head == -1")
    assert len(layers) == 3 * N_LAYERS
    panels = found.figures()["dynamics"].layout.annotations
    assert len(panels) == len(found.overview()) + 4, "and the population of sink heads"
    assert "3 checkpoints, steps 0 to 400" in found.summary()


def test_checkpoints_of_every_kind(folders) -> None:
    """Folders, functions, models and bridges; a mapping says the step."""
    texts = ss.token_ids(TOKENS)
    paths = {int(folder.name.split("-")[1]): folder for folder in folders}
    plain = dynamics(None, paths, texts, progress=False)
    mixed = dynamics(
        None,
        {
            400: lambda: LLAMA.build(SEEDS[400]),
            0: str(paths[0]),
            50: ss.load_model(LLAMA.build(SEEDS[50])),
        },
        texts,
        progress=False,
    )
    assert mixed.steps == plain.steps
    for name, curve in plain.overview().items():
        torch.testing.assert_close(mixed.overview()[name], curve, msg=name)


def test_steps_and_revisions_are_asked_of_the_hub_model(folders, monkeypatch) -> None:
    asked = []

    def load(spec: object, **options: object):
        asked.append((spec, options))
        return ss.load_model(LLAMA.build(len(asked)))

    monkeypatch.setattr(module, "load_model", load)
    texts = ss.token_ids(TOKENS)
    dynamics("some/pythia", [512, 1000], texts, dtype="float32", progress=False)
    dynamics("some/olmo", ["step1000-tokens4B", "step20"][1:], texts, progress=False)
    assert asked == [
        ("some/pythia", {"checkpoint": 512, "dtype": "float32"}),
        ("some/pythia", {"checkpoint": 1000, "dtype": "float32"}),
        ("some/olmo", {"revision": "step20"}),
    ]


def test_an_interrupted_run_continues_and_grows(folders, tmp_path, monkeypatch) -> None:
    texts = ss.token_ids(TOKENS)
    whole = dynamics(None, folders, texts, progress=False)
    real, loaded = module.load_model, []

    def load(spec: object, **options: object):
        loaded.append(Path(spec).name)
        if len(loaded) == 2:
            raise KeyboardInterrupt
        return real(spec, **options)

    monkeypatch.setattr(module, "load_model", load)
    with pytest.raises(KeyboardInterrupt):
        dynamics(None, folders, texts, out=tmp_path, progress=False)
    again = dynamics(None, folders, texts, out=tmp_path, progress=False)
    assert loaded == ["checkpoint-0", "checkpoint-50", "checkpoint-50", "checkpoint-400"]
    for name, curve in whole.overview().items():
        torch.testing.assert_close(again.overview()[name], curve, msg=name)
    dynamics(None, folders, texts, out=tmp_path, progress=False)
    assert len(loaded) == 4, "nothing is left to load"


def test_a_folder_of_another_request_is_refused(folders, tmp_path) -> None:
    """By what differs, before anything is loaded; the same request finds its reports."""
    texts, out = ss.token_ids(TOKENS), tmp_path / "out"

    def follow(checkpoints, texts=texts, **options):
        return dynamics(None, checkpoints, texts, out=out, progress=False, **options)

    step = folders[0]
    first = follow([step])
    with pytest.raises(ReportError, match="another texts"):
        follow(folders, ss.token_ids(TOKENS.flip(0)))
    assert len(list(out.glob("*.nc"))) == 1, "nothing was measured before the refusal"
    with pytest.raises(ReportError, match=r"another sinks \(0; now 1\)"):
        follow([step], sinks=(1,))
    with pytest.raises(ReportError, match=r"another dtype \(float32; now bfloat16\)"):
        follow([step], dtype="bfloat16")
    moved = tmp_path / "other" / step.name
    LLAMA.build(seed=9).save_pretrained(moved)
    with pytest.raises(
        ReportError, match="step-400.nc .* another checkpoint .*/other/checkpoint-400"
    ):
        follow([moved])
    again = follow([step], sinks=iter([0]))
    assert again.reports[400].equals(first.reports[400])
    LLAMA.build(seed=9).save_pretrained(step)
    try:
        with pytest.raises(ReportError, match="another checkpoint"):
            follow([step])
    finally:
        LLAMA.build(seed=SEEDS[400]).save_pretrained(step)


def test_models_in_memory_and_lists_of_strings_are_told_apart(tmp_path) -> None:
    from tests.prompts.tiny_tokenizers import words

    def follow(seed: int, strings: list[str], **options):
        model = ss.load_model(LLAMA.build(seed), tokenizer=words(bos=True))
        return dynamics(
            None, {7: model}, ss.texts(strings), out=tmp_path, progress=False, **options
        )

    strings = ["w5 w6 w7 w8", "w9 w8 w7 w6"]
    first = follow(1, strings)
    assert follow(1, strings).reports[7].equals(first.reports[7])
    with pytest.raises(ReportError, match="another model"):
        follow(2, strings)
    with pytest.raises(ReportError, match="another texts"):
        follow(1, strings[::-1])


def test_snapshots_of_the_laboratory(tmp_path) -> None:
    """Each step's figures are those that a scan of that snapshot's bridge gives."""
    from sinkscope import bb

    config = bb.TrainConfig.classroom(
        model=bb.ModelConfig(width=16, context=32),
        batch=4,
        length=32,
        steps=6,
        snapshots=(2, 6),
    )
    bb.train(config, folder=tmp_path, progress=False)
    files = sorted(tmp_path.glob("step-*.safetensors"))
    assert len(files) == 2
    texts = bb.task_texts(prompts=3, length=20, task=bb.load_model(files[0])[1])
    found = dynamics(None, files, texts, progress=False)
    assert found.steps == (2, 6)
    for step, file in zip(found.steps, files, strict=True):
        alone = ss.scan(bb.to_bridge(bb.load_model(file)[0]), texts, progress=False)
        torch.testing.assert_close(found.reports[step].sink_attention, alone.sink_attention)
    assert "loss" in found.overview()
    assert found.about.startswith("step-000002 to step-000006 · T = 20 ")
    own = dynamics(None, files[:1], progress=False)  # on its own task, as long as its context
    want = bb.task_texts(length=32, task=bb.load_model(files[0])[1])
    assert torch.equal(own.reports[2].tokens, want.tokens)


def test_snapshots_without_a_softmax_have_no_entropy(tmp_path) -> None:
    from sinkscope import bb

    model = bb.ModelConfig(width=16, context=16, attention="relu")
    config = bb.TrainConfig.classroom(
        model=model, batch=4, length=16, steps=2, snapshots=(1, 2), learning_rate=1e-3
    )
    bb.train(config, folder=tmp_path, progress=False)
    found = dynamics(None, sorted(tmp_path.glob("step-*.safetensors")), progress=False)
    metrics = set(found.to_frame()["metric"])
    assert {"sink_attention", "value_drain", "honor", "residual_peak"} <= metrics
    assert "attention_entropy" not in metrics


def test_what_is_refused(folders, tmp_path) -> None:
    texts = ss.token_ids(TOKENS)
    with pytest.raises(ModelError, match="cannot be told"):
        dynamics(None, [LLAMA.build()], texts, progress=False)
    with pytest.raises(ModelError, match="no step twice"):
        dynamics(None, ["a/step-3", "b/step-3"], texts, progress=False)
    with pytest.raises(TextError, match="two tokens or more"):
        dynamics(None, folders, ss.token_ids([[5], [5, 6, 7]]), progress=False)
    with pytest.raises(ModelError, match="name the model"):
        dynamics(None, [1000], texts, progress=False)
    with pytest.raises(ModelError, match="no step twice"):
        dynamics(None, [], texts, progress=False)


def test_checkpoints_are_of_one_model(folders, tmp_path) -> None:
    """The number in a packaged model's name is a size, and two shapes make no curve."""
    for names in (["smollm2-135m", "minilm-l6"], ["bb-3l"]):
        with pytest.raises(ModelError, match="cannot be told from its name"):
            dynamics(None, names, progress=False)
    wide = {0: folders[1], 50: _of_layers(2)}
    with pytest.raises(ModelError, match=f"50 has 2 layers of .* 0 has {N_LAYERS} of {N_HEADS}"):
        dynamics(None, wide, ss.token_ids(TOKENS), out=tmp_path, progress=False)
    assert (tmp_path / "step-0.nc").exists(), "what is done stays"


def _of_layers(layers: int):
    family = replace(LLAMA, settings=dict(LLAMA.settings, num_hidden_layers=layers))
    return family.build()

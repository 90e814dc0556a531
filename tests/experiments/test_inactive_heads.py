"""Heads asleep per input: flags by plain loops, losses by transformers' own model."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import sinkscope as ss
from sinkscope.errors import ReportError, SinkscopeError, TextError, UnsupportedError
from sinkscope.experiments.inactive_heads import RANDOM, _Chooser, ablate_inactive, last_within
from sinkscope.experiments.partial_forward import PromptLosses
from tests.experiments.test_ablation_families import edited, losses
from tests.families.architectures import BY_NAME, N_HEADS, N_LAYERS, Family
from tests.families.reference import reference

LLAMA = BY_NAME["llama"]
TOKENS = LLAMA.tokens(prompts=4, length=20)
SHARES = (0.1, 0.3)


@pytest.fixture
def model():
    return ss.load_model(LLAMA.build())


def scores_by_hand(family: Family = LLAMA) -> dict[str, np.ndarray]:
    """AWFT, AEQD, AHON-LN and LTHON-HN [prompt layer head] of each prompt, written out."""
    ref = reference(family.build(), TOKENS, parts=family.parts)
    pattern = ref["attentions"].double().numpy()  # [layer prompt head query key]
    z = np.linalg.norm(ref["z"].double().numpy(), axis=-1)  # [layer prompt position head]
    found = {
        name: np.zeros((4, N_LAYERS, N_HEADS)) for name in ("AWFT", "AEQD", "AHON-LN", "LTHON-HN")
    }
    for prompt in range(4):
        for layer in range(N_LAYERS):
            for head in range(N_HEADS):
                rows = pattern[layer, prompt, head]
                at = prompt, layer, head
                found["AWFT"][at] = np.mean([row[0] for row in rows])
                found["AEQD"][at] = np.mean([-sum(p * np.log(p) for p in r if p > 0) for r in rows])
                own = z[layer, prompt, :, head]
                found["AHON-LN"][at] = own.mean() / z[layer, prompt].mean()
                found["LTHON-HN"][at] = own[-1] / own.mean()
    return found


def flags_by_hand(name: str, score: np.ndarray, share: float) -> np.ndarray:
    """Beyond the quantile of all heads of all prompts, on the side that the paper gives."""
    ordered = np.sort(score.ravel())
    if name == "AWFT":
        return score > np.quantile(ordered, 1 - share)
    return score < np.quantile(ordered, share)


def asleep_by_hand(flags: np.ndarray, family: Family = LLAMA) -> np.ndarray:
    """The loss of each prompt when its flagged heads put out nothing."""
    plain, found = family.build(), []
    for prompt in range(len(TOKENS)):

        def silence(layer: int, z: torch.Tensor, prompt: int = prompt) -> None:
            for head in range(N_HEADS):
                if flags[prompt, layer, head]:
                    z[:, :, head] = 0

        with edited(plain, family, silence):
            found.append(losses(plain, TOKENS[prompt : prompt + 1])[0])
    return np.array(found)


def test_flagged_heads_are_zero_per_input(model) -> None:
    by_hand = scores_by_hand()
    found = ablate_inactive(
        model, ss.token_ids(TOKENS), scores=list(by_hand), shares=SHARES, batch=3, progress=False
    )
    np.testing.assert_allclose(found.loss.numpy(), losses(LLAMA.build(), TOKENS), atol=1e-5)
    for index, (name, score) in enumerate(by_hand.items()):
        for column, share in enumerate(SHARES):
            flags = flags_by_hand(name, score, share)
            assert len(set(flags.sum((1, 2)).tolist())) > 1, "prompts should lose unlike numbers"
            np.testing.assert_allclose(
                found.share_ablated[index, column].numpy(), flags.mean((1, 2)), atol=1e-6
            )
            np.testing.assert_allclose(
                found.ablated_loss[index, column].numpy(), asleep_by_hand(flags), atol=1e-5
            )
    assert (found.ablated_loss - found.loss).abs().max() > 0.01


def one_pass_by_hand(name: str, share: float, family: Family) -> tuple[np.ndarray, np.ndarray]:
    """Losses and shares of flagged heads, a layer at a time in transformers' own model.

    The scores of a layer are those of a run in which the heads flagged in earlier layers are zero;
    the threshold is the quantile of the scores of the unchanged model.
    """
    unchanged = np.sort(scores_by_hand(family)[name].ravel())
    threshold = np.quantile(unchanged, 1 - share if name == "AWFT" else share)
    flags = np.zeros((4, N_LAYERS, N_HEADS), dtype=bool)
    for layer in range(N_LAYERS):
        plain = family.build()
        kept: dict[str, np.ndarray] = {}

        def silence(index: int, z: torch.Tensor, layer: int = layer, kept: dict = kept) -> None:
            if index == layer:
                kept["z"] = z.detach().double().numpy().copy()
            for prompt, head in np.argwhere(flags[:, index]):
                z[prompt, :, head] = 0

        with edited(plain, family, silence), torch.no_grad():
            attentions = plain(TOKENS, output_attentions=True).attentions
        norms = np.linalg.norm(kept["z"], axis=-1)  # [prompt position head]
        first = attentions[layer][..., 0].double().numpy()  # [prompt head query]
        for prompt in range(4):
            for head in range(N_HEADS):
                if name == "AWFT":
                    flags[prompt, layer, head] = first[prompt, head].mean() > threshold
                else:
                    mean = norms[prompt].mean()
                    flags[prompt, layer, head] = norms[prompt, :, head].mean() / mean < threshold
    return asleep_by_hand(flags, family), flags.mean((1, 2))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["AWFT", "AHON-LN"])
def test_one_pass_scores_and_zeroes_layer_after_layer(name: str, family: str) -> None:
    model = ss.load_model(BY_NAME[family].build())
    options = dict(scores=[name], shares=[0.4], draws=1, batch=3, progress=False)
    found = ablate_inactive(model, ss.token_ids(TOKENS), procedure="one pass", **options)
    losses_want, shares_want = one_pass_by_hand(name, 0.4, BY_NAME[family])
    np.testing.assert_allclose(found.share_ablated[0, 0].numpy(), shares_want, atol=1e-6)
    np.testing.assert_allclose(found.ablated_loss[0, 0].numpy(), losses_want, atol=1e-5)
    two = ablate_inactive(model, ss.token_ids(TOKENS), **options)
    assert (two.ablated_loss[0] - found.ablated_loss[0]).abs().max() > 1e-4, "they differ"
    assert torch.equal(two.ablated_loss[1], found.ablated_loss[1]), "random heads are the same"
    with pytest.raises(UnsupportedError, match="mode is .three passes.; expected one of"):
        ablate_inactive(model, ss.token_ids(TOKENS), procedure="three passes", progress=False)


def test_random_heads_are_as_many_as_asked_for(model) -> None:
    report = ss.scan(model, ss.token_ids(TOKENS), progress=False)
    choose = _Chooser(report, ("AWFT",), None, {}, draws=3, seed=1)
    draws = choose(RANDOM, 0.25)
    assert len(draws) == 3
    for flags in draws:
        assert flags.sum(dim=(1, 2)).tolist() == [3] * 4  # a quarter of twelve heads
    assert not torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0][0], draws[0][1]), "each prompt has heads of its own"
    found = ablate_inactive(
        model, ss.token_ids(TOKENS), scores=["AWFT"], shares=[0.25], seed=1, progress=False
    )
    by_hand = np.mean([asleep_by_hand(flags.numpy()) for flags in draws], axis=0)
    np.testing.assert_allclose(found.ablated_loss[-1, 0].numpy(), by_hand, atol=1e-5)


def test_thresholds_of_another_text_and_scores_of_ones_own(model) -> None:
    other = ss.scan(model, ss.token_ids(LLAMA.tokens(prompts=3, seed=5)), progress=False)
    own = torch.arange(4 * 12.0).reshape(4, 3, 4)
    found = ablate_inactive(
        model,
        ss.token_ids(TOKENS),
        scores=["AHON-LN"],
        shares=[0.3],
        thresholds=other,
        also={"mine": own},
        progress=False,
    )
    assert found.scores == ["AHON-LN", "mine", RANDOM]
    threshold = np.quantile(other.inactivity_scores()["AHON-LN"].double().numpy(), 0.3)
    flags = scores_by_hand()["AHON-LN"] < threshold
    np.testing.assert_allclose(found.share_ablated[0, 0].numpy(), flags.mean((1, 2)), atol=1e-6)
    mine = own.numpy() < np.quantile(own.numpy(), 0.3)
    np.testing.assert_allclose(found.ablated_loss[1, 0].numpy(), asleep_by_hand(mine), atol=1e-5)


@pytest.mark.parametrize(
    ("losses_at", "want"),
    [
        ([2.0, 2.0, 2.0], 0.3),  # never beyond: the largest share tried
        ([2.0, 2.1, 2.3], 0.15),  # half-way from 2.0 to 2.1
        ([2.1, 2.0, 2.0], 0.05),  # the first time it leaves counts
        ([1.9, 2.05, 3.0], 0.2),  # exactly at the limit is within
    ],
)
def test_last_within(losses_at: list[float], want: float) -> None:
    got = last_within(np.array([0.1, 0.2, 0.3]), np.array(losses_at), 2.0, 2.05)
    assert got == pytest.approx(want)


def test_largest_share_and_its_interval(model) -> None:
    found = ablate_inactive(model, ss.token_ids(TOKENS), scores=["AWFT", "AHON"], progress=False)
    shares = found.largest_share(tolerance=0.01)
    for index, score in enumerate(found.scores):
        x = found.share_ablated[index].double().mean(-1).numpy()
        y = found.ablated_loss[index].double().mean(-1).numpy()
        limit = 1.01 * float(found.loss.double().mean())
        # A fine walk along the same straight lines.
        grid = np.linspace(0, x[-1], 100_001)
        curve = np.interp(grid, [0, *x], [float(found.loss.double().mean()), *y])
        beyond = np.flatnonzero(curve > limit)
        want = grid[beyond[0]] if beyond.size else x[-1]
        assert shares[score]["share"].mean == pytest.approx(want, abs=1e-4)
        assert shares[score]["censored"] == (beyond.size == 0)
        assert shares[score]["share"].low <= shares[score]["share"].high
    assert shares[RANDOM]["over_random"].mean == 0


def test_an_interrupted_run_continues(model, tmp_path, monkeypatch) -> None:
    file, texts = tmp_path / "sleep.nc", ss.token_ids(TOKENS)
    options = dict(scores=["AWFT", "AEQD"], shares=SHARES, draws=2, progress=False)
    whole = ablate_inactive(model, texts, **options)
    real, calls = PromptLosses.__call__, []

    def counted(self, *args):
        calls.append(args)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    monkeypatch.setattr(PromptLosses, "__call__", counted)
    with pytest.raises(KeyboardInterrupt):
        ablate_inactive(model, texts, file=file, **options)
    again = ablate_inactive(model, texts, file=file, **options)
    # Untouched, two flagged, one lost; then the two flagged that are left and four random.
    assert len(calls) == 4 + 2 + 4
    assert torch.equal(again.ablated_loss, whole.ablated_loss)
    assert torch.equal(again.share_ablated, whole.share_ablated)
    with pytest.raises(ReportError, match="another draws"):
        ablate_inactive(model, texts, file=file, **(options | dict(draws=3)))


def test_names_of_the_release_before_are_read(model, tmp_path) -> None:
    file = tmp_path / "before.nc"
    found = ablate_inactive(
        model, ss.token_ids(TOKENS), scores=["AWFT"], shares=[0.3], file=file, progress=False
    )
    with xr.open_dataset(file, engine="h5netcdf", decode_cf=False) as kept:
        before = kept.load().rename(share_ablated="share_removed")
    before.attrs["dtypes"] = before.attrs["dtypes"].replace("share_ablated", "share_removed")
    before.to_netcdf(file, engine="h5netcdf")
    again = ablate_inactive(
        model, ss.token_ids(TOKENS), scores=["AWFT"], shares=[0.3], file=file, progress=False
    )
    assert torch.equal(again.share_ablated, found.share_ablated)
    with pytest.warns(DeprecationWarning, match="is now .*share_ablated"):
        assert again.share_removed is again.share_ablated


def test_a_file_knows_its_thresholds_and_scores(model, tmp_path) -> None:
    """By their numbers: by name and source alone, other ones would come back as these."""
    texts, options = ss.token_ids(TOKENS), dict(scores=["AHON-LN"], shares=[0.3], progress=False)
    own = [torch.arange(48.0).reshape(4, 3, 4), torch.arange(48.0).flip(0).reshape(4, 3, 4)]
    reports = [
        ss.scan(model, ss.token_ids(LLAMA.tokens(prompts=1, seed=s)), progress=False)
        for s in (5, 7)
    ]
    assert reports[0].settings.source == reports[1].settings.source
    by_hand = scores_by_hand()["AHON-LN"]
    for index, (report, mine) in enumerate(zip(reports, own, strict=True)):
        file = tmp_path / f"{index}.nc"
        asked = options | dict(thresholds=report, also={"mine": mine}, file=file)
        for found in (
            ablate_inactive(model, texts, **asked),
            ablate_inactive(model, texts, **asked),
        ):
            source = report.inactivity_scores()["AHON-LN"].double().numpy()
            flags = by_hand < np.quantile(source, 0.3)
            np.testing.assert_allclose(
                found.ablated_loss[0, 0].numpy(), asleep_by_hand(flags), atol=1e-5
            )
            flags = mine.numpy() < np.quantile(mine.numpy(), 0.3)
            np.testing.assert_allclose(
                found.ablated_loss[1, 0].numpy(), asleep_by_hand(flags), atol=1e-5
            )
        with pytest.raises(ReportError, match="another also"):
            ablate_inactive(model, texts, **(asked | dict(also={"mine": own[1 - index]})))
        with pytest.raises(ReportError, match="another thresholds"):
            ablate_inactive(model, texts, **(asked | dict(thresholds=reports[1 - index])))


def test_the_frame_is_what_the_figure_takes(model) -> None:
    found = ablate_inactive(
        model, ss.token_ids(TOKENS), scores=["AWFT"], shares=SHARES, progress=False
    )
    frame = found.to_frame()
    assert len(frame) == 2 * 3 * 4
    row = frame.query("score == 'AWFT' and quantile > 0.2 and prompt == 2").iloc[0]
    assert row["loss"] == pytest.approx(float(found.ablated_loss[0, 1, 2]))
    assert row["share_of_prompt"] == pytest.approx(float(found.share_ablated[0, 1, 2]))
    assert row["share_ablated"] == pytest.approx(float(found.share_ablated[0, 1].mean()))
    baseline = frame.query("share_ablated == 0 and score == 'AWFT'")
    np.testing.assert_allclose(baseline["loss"], found.loss)
    lines = {trace.name for trace in found.figures()["inactive-heads"].data if trace.name}
    assert lines == {"AWFT", RANDOM}


def test_what_is_refused(model) -> None:
    texts = ss.token_ids(TOKENS)
    with pytest.raises(TextError, match="token ids has 1 token, .* two tokens or more"):
        ablate_inactive(model, ss.token_ids([[5], [5, 6, 7]]), progress=False)
    with pytest.raises(UnsupportedError, match="no score 'HONOR'"):
        ablate_inactive(model, texts, scores=["HONOR"], progress=False)
    with pytest.raises(SinkscopeError, match="between 0 and 1"):
        ablate_inactive(model, texts, shares=[0.0, 0.5], progress=False)
    with pytest.raises(ReportError, match="'mine'"):
        ablate_inactive(model, texts, also={"mine": torch.zeros(3, 3, 4)}, progress=False)

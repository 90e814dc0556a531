"""What a streamed context says, against losses whose figures are known beforehand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sinkscope.experiments.streaming_context import StreamedContext, _over_blocks

TOKENS, AFTER = 1024, 256
KEPT = ["everything", "0 sinks", "4 sinks", "9 as it is", "designated 9", "0 sinks"]
WINDOWS = [-1, 128, 128, 128, 128, 64]
OVER = [0.0, 0.7, 0.1, 0.65, 0.05, 0.9]
"""What each setting's loss is over that of the first, from `AFTER` on."""


@pytest.fixture
def found() -> StreamedContext:
    """The same noisy text in every setting: differences are far surer than perplexities."""
    noise = torch.randn(TOKENS, generator=torch.Generator().manual_seed(0)).double()
    loss = 2.5 + noise + torch.tensor(OVER)[:, None] * (torch.arange(TOKENS) >= AFTER)
    loss[:, -1] = torch.nan
    held = torch.tensor([1024.0, 127, 131, 128, 128, 63]).double()
    return StreamedContext(
        about="synthetic",
        kept=KEPT,
        windows=WINDOWS,
        counted=["absolute", *["cache"] * 5],
        schemes=[""] * 6,
        moved_on=AFTER,
        loss=loss.float(),
        seconds=torch.full((6,), 2.0).double(),
        cache_bytes=held * 1000,
        full_bytes=torch.full((6,), 1024.0 * 1000).double(),
    )


def test_perplexities_are_those_after_the_window_moved_on(found: StreamedContext) -> None:
    frame = found.to_frame()
    for setting, row in enumerate(frame.to_dict("records")):
        own = found.loss[setting].double().numpy()[:-1]
        assert row["perplexity"] == pytest.approx(np.exp(own.mean()), rel=1e-6)
        assert row["perplexity_after"] == pytest.approx(np.exp(own[AFTER:].mean()), rel=1e-6)
        assert row["perplexity_before"] == pytest.approx(np.exp(own[:AFTER].mean()), rel=1e-6)
        assert row["perplexity_after_low"] < row["perplexity_after"] < row["perplexity_after_high"]
    assert frame["tokens_per_second"].tolist() == [512.0] * 6
    assert frame["kv_share"].tolist() == pytest.approx(
        [1, 127 / 1024, 131 / 1024, 1 / 8, 1 / 8, 63 / 1024]
    )


def test_differences_are_taken_token_by_token(found: StreamedContext) -> None:
    rows = found.statistics()["settings"]
    assert rows[0]["loss_over_everything"] is None and rows[0]["loss_over_no_sinks"] is None
    for row, over in zip(rows[1:], OVER[1:], strict=True):
        estimate = row["loss_over_everything"]
        assert estimate.mean == pytest.approx(over, abs=1e-5)
        assert estimate.high - estimate.low < 1e-5, "the text's own noise cancels"
    against = [row["loss_over_no_sinks"] for row in rows]
    assert against[1] is None and against[5] is None
    assert [a.mean for a in against[2:5]] == pytest.approx([-0.6, -0.05, -0.65], abs=1e-5)


@pytest.mark.parametrize("rest", [1, 64, 126, 127])
def test_an_interval_is_that_of_its_own_mean_where_the_text_ends_within_a_block(rest: int) -> None:
    losses = np.r_[np.ones(256), np.zeros(rest)]
    found = _over_blocks(torch.from_numpy(losses))
    assert found.mean == pytest.approx(losses.mean())
    half = (len(losses) + 1) // 2  # of two blocks, one or the other is drawn twice now and then
    ends = losses[half:].mean(), losses[:half].mean()
    assert (found.low, found.high) == pytest.approx(ends)
    assert found.low <= found.mean <= found.high


def test_there_is_no_interval_of_fewer_tokens_than_two_blocks() -> None:
    found = _over_blocks(torch.arange(255.0))
    assert found.mean == 127 and np.isnan([found.low, found.high]).all()


def test_words_name_what_is_spared_in_the_same_window(found: StreamedContext) -> None:
    text = found.summary()
    assert "would fill 1.0 MB" in text and "from token 256 on, where every window" in text
    assert "Window 128, positions counted in the cache" in text
    assert "4 sinks 0.600 [0.600, 0.600]; 9 as it is 0.050" in text
    assert "Window 64" not in text, "there is nothing to compare it with"


def test_a_text_that_ends_too_soon_is_not_said_to_have_moved_on(found: StreamedContext) -> None:
    import dataclasses

    short = dataclasses.replace(found, moved_on=TOKENS - 10)
    assert short.after == TOKENS // 2
    assert "where not every window has left the start of the text" in short.summary()


def test_figures_show_blocks_along_the_text_and_each_window(found: StreamedContext) -> None:
    drawn = found.figures()
    assert set(drawn) == {"perplexity-cache", "along-cache-64", "along-cache-128"}
    titles = {name: figure.layout.title.text for name, figure in drawn.items()}
    assert titles["along-cache-128"] == "Perplexity along a long text, window 128"
    assert len(set(titles.values())) == len(titles)
    everything, none, four, *_ = drawn["along-cache-128"].data
    assert [line.name for line in (everything, none, four)] == KEPT[:3]
    blocks = np.split(found.loss[1].double().numpy()[: 7 * 128], 7)
    assert list(none.y)[:7] == pytest.approx([np.exp(block.mean()) for block in blocks])
    assert list(none.x)[:2] == [64, 192]
    by_window = {line.name: line for line in drawn["perplexity-cache"].data}
    assert list(by_window["0 sinks"].x) == [64, 128]
    after = found.to_frame().set_index(["kept", "window"])["perplexity_after"]
    assert list(by_window["0 sinks"].y) == pytest.approx(
        [after["0 sinks", 64], after["0 sinks", 128]]
    )

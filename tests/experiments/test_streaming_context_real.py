"""SmolLM2 through a window: without its first tokens it breaks down, with four it does not."""

from __future__ import annotations

import pytest

from sinkscope.experiments.streaming_context import StreamedContext, streaming_context

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def streamed(smollm2) -> StreamedContext:
    return streaming_context(
        smollm2,
        "prose",
        tokens=512,
        windows=[128],
        sinks=[0, 4],
        designated=64,
        counted=["cache"],
        progress=False,
    )


def after(found: StreamedContext, kept: str) -> float:
    """Perplexity where the window has left the start behind."""
    return found.perplexity(found.kept.index(kept), start=found.moved_on)


def test_sinks_keep_the_model_alive(streamed: StreamedContext) -> None:
    assert after(streamed, "0 sinks") > 1.5 * after(streamed, "4 sinks")
    before = streamed.perplexity(streamed.kept.index("0 sinks"), 0, 120)
    assert before == pytest.approx(streamed.perplexity(0, 0, 120), rel=1e-3)


def test_a_designated_element_stands_in_for_the_start(streamed: StreamedContext) -> None:
    assert after(streamed, "designated 64") == pytest.approx(after(streamed, "4 sinks"), rel=0.05)
    assert after(streamed, "64 as it is") == pytest.approx(after(streamed, "0 sinks"), rel=0.05)
    rows = {row["kept"]: row for row in streamed.statistics()["settings"]}
    assert rows["designated 64"]["loss_over_no_sinks"].high < -0.4
    assert abs(rows["64 as it is"]["loss_over_no_sinks"].mean) < 0.05


def test_the_cache_holds_the_window_and_the_sinks(streamed: StreamedContext) -> None:
    frame = streamed.to_frame().set_index("kept")
    per_position = 30 * 2 * 3 * 64 * 4 / 1e6
    assert frame.loc["4 sinks", "kv_megabytes"] == pytest.approx(per_position * (127 + 4))
    assert frame.loc["everything", "kv_share"] == pytest.approx(1)

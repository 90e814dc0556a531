"""Where SmolLM2's residual peak is made."""

from __future__ import annotations

import pytest

import sinkscope as ss
from sinkscope.experiments.trace_peak import PeakTrace, trace_peak

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def traced(smollm2) -> PeakTrace:
    """The blocks that write, some that do not."""
    texts = ss.texts("prose", prompts=2, length=24)
    return trace_peak(smollm2, texts, blocks=[2, 9, 11, 15], progress=False)


def test_the_ffn_of_block_11_writes_it(traced: PeakTrace) -> None:
    assert traced.peak_layer == traced.written_in == 11
    assert traced.peak_ratio.mean(0)[11] > 100
    for mode in ("zero", "typical"):
        needed = [writer[:2] for writer in traced.needed(mode)]
        assert needed[0] == (11, "ffn")
        assert (9, "ffn") in needed
        assert all(part == "ffn" for _, part in needed), "no attention is needed"
        assert traced.left(mode)[traced.blocks.index(11), traced.parts.index("ffn")] < 0.02
    assert "FFN of block 11" in traced.summary()


def test_without_it_the_sink_is_mostly_gone(traced: PeakTrace) -> None:
    later = slice(12, 30)
    before = traced.attention[:, later].mean()
    assert before > 0.4
    for mode in ("zero", "typical"):
        at = traced.blocks.index(11), traced.parts.index("ffn"), traced.modes.index(mode)
        assert traced.attention_without[at][:, later].mean() < 0.4 * before
        # What comes before the writer is as it was.
        same = traced.attention_without[at][:, :12] - traced.attention[:, :12]
        assert same.abs().max() < 1e-5
        assert all(reader["layer"] > 11 for reader in traced.readers(mode))


def test_its_mean_at_the_sink_changes_nothing(traced: PeakTrace) -> None:
    """What the block writes does not depend on the text (Sun et al.: set-mean is harmless)."""
    assert traced.needed("mean") == []
    assert (traced.left("mean") > 0.9).all()

"""One head's attention, query by key."""

import numpy as np
import pytest
import torch

import sinkscope.plot as plot
from sinkscope.errors import ReportError


def pattern(size: int) -> torch.Tensor:
    """Causal attention, nine tenths of it to key 0."""
    mask = torch.ones(size, size).tril()
    uniform = 0.1 * mask / mask.sum(1, keepdim=True)
    uniform[:, 0] += 0.9
    return uniform


def test_attention_pattern_leaves_out_what_no_query_sees():
    figure = plot.attention_pattern(pattern(8), list("abcdefgh"), about="x", title="L1 <H2>")
    (cells,) = figure.data
    z = np.asarray(cells.z)
    assert np.isnan(z[np.triu_indices(8, 1)]).all()
    np.testing.assert_allclose(z[np.tril_indices(8)], pattern(8).numpy()[np.tril_indices(8)])
    for axis, places in ((figure.layout.xaxis, cells.x), (figure.layout.yaxis, cells.y)):
        assert places[2] == "2 \u2068c\u2069"
        assert (axis.type, axis.dtick) == ("category", 1), "every token has its tick"
    assert figure.layout.title.text == "L1 &lt;H2&gt;"


@pytest.mark.parametrize("size", [513, 1500, 4096])
def test_large_pattern_is_cut_into_bins_of_maxima(size):
    attention = pattern(size)
    attention[size // 2, 7] = 0.95
    figure = plot.attention_pattern(attention, about="x")
    (cells,) = figure.data
    ends = [[int(end) for end in name.split(" to ")] for name in cells.x]
    assert [k for name in ends for k in range(name[0], name[-1] + 1)] == list(range(size))
    assert list(cells.x) == list(cells.y) and len(ends) == 200
    for row, column in ((0, 0), (199, 0), (99, 0), (100, 1), (100, 4), (180, 90), (9, 180)):
        (top, bottom), (left, right) = [(ends[i][0], ends[i][-1] + 1) for i in (row, column)]
        largest = max(float(x) for line in attention[top:bottom] for x in line[left:right])
        assert cells.z[row][column] == pytest.approx(largest) or left >= bottom
    assert f"maxima of bins; {size:,} × {size:,} cells" in figure.layout.title.text


def test_pattern_of_another_shape_is_refused():
    with pytest.raises(ReportError, match="expected one head's"):
        plot.attention_pattern(torch.zeros(2, 3, 3), about="x")
    with pytest.raises(ReportError, match="2 tokens for a pattern"):
        plot.attention_pattern(torch.zeros(3, 3), ["a", "b"], about="x")

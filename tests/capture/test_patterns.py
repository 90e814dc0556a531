"""Patterns for a report's page, against the model's own eager attentions."""

from __future__ import annotations

import base64
import json

import numpy as np
import pytest
import torch

import sinkscope as ss
from sinkscope.capture.patterns import head_patterns
from tests.plot.test_explorer import tiny_llama


@pytest.fixture(scope="module")
def scanned():
    model = ss.load_model(tiny_llama(), name="tiny")
    rows = torch.randint(3, 60, (3, 60), generator=torch.Generator().manual_seed(2)).tolist()
    report = ss.scan(model, ss.token_ids([rows[0], rows[1][:21], rows[2]]), progress=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sinkscope.capture.patterns._MOST", 20)
        return report, head_patterns(model, report), rows


def test_cells_hold_the_largest_attention_and_received_its_mean(scanned):
    _, kept, rows = scanned
    assert kept.prompts == (0, 1) and len(kept.first) == 20
    edges = [*kept.first.tolist(), 60]
    for prompt, length in ((0, 60), (1, 21)):
        with torch.no_grad():
            out = tiny_llama()(torch.tensor([rows[prompt][:length]]), output_attentions=True)
        for layer, pattern in enumerate(a[0].numpy() for a in out.attentions):
            for head in range(4):
                received = [pattern[head, k:, k].mean() for k in range(length)]
                np.testing.assert_allclose(
                    kept.received[prompt, layer, head, :length], received, atol=1e-5
                )
                for query in range(20):
                    for key in range(query + 1):
                        rows_, columns = (slice(*edges[i : i + 2]) for i in (query, key))
                        block = pattern[head, rows_, columns]
                        expected = 255 * block.max() if block.size else 0
                        assert (
                            abs(float(kept.cells[prompt, layer, head, query, key]) - expected) < 1
                        )
    assert kept.received[1, :, :, 21:].isnan().all()


def test_the_page_carries_them(scanned):
    report, kept, _ = scanned
    html = report.to_html(kept)
    page = json.loads(html.partition('id="data">')[2].partition("</script>")[0])
    assert page["patterns"] == {"prompts": [0, 1], "first": kept.first.tolist(), "length": 60}
    stored = page["arrays"]["patterns.cells"]
    assert stored["dtype"] == "uint8" and stored["shape"] == [2, 3, 4, 20, 20]
    values = np.frombuffer(base64.b64decode(stored["data"]), "uint8")
    np.testing.assert_array_equal(values, kept.cells.numpy().ravel())
    assert "patterns" not in json.loads(
        report.to_html().partition('id="data">')[2].partition("</script>")[0]
    )

"""Multi-head latent attention: the families that `FAMILIES` does not have, and what is its own."""

from __future__ import annotations

import copy
import re

import numpy as np
import pytest
import torch
from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

import sinkscope as ss
from sinkscope.errors import UnsupportedError

from .architectures import BY_NAME, LATENTS, Family
from .oracle import expected
from .reference import reference
from .test_scan_families import PATHS, compare, compare_every_field

LENGTHS = np.array([24, 11, 24, 17, 9])


@pytest.fixture(params=[family.name for family in LATENTS])
def family(request: pytest.FixtureRequest) -> Family:
    """The families with latents in turn."""
    return BY_NAME[request.param]


@pytest.mark.parametrize("path", PATHS)
def test_every_field_agrees(family: Family, path: str) -> None:
    if path == "streaming" and not family.streams:
        with pytest.raises(UnsupportedError, match="sparse attention"):
            ss.scan(family.build(), ss.token_ids(family.tokens()), attention=path, progress=False)
        return
    compare_every_field(family, reference(family.build(), family.tokens(), parts=EXPERTS), path)


EXPERTS = LATENTS[0].parts


def test_ragged_prompts_and_another_sink(family: Family) -> None:
    tokens = family.tokens(prompts=5)
    mask = np.arange(tokens.shape[1]) < LENGTHS[:, None]
    real = torch.tensor(mask)
    ref = reference(family.build(), tokens * real, real, parts=EXPERTS)
    oracle = expected(ref, mask, causal=True, sink=3)
    rows = [row[:n].tolist() for row, n in zip(tokens, LENGTHS, strict=True)]
    bridge = ss.load_model(family.build())
    split = [
        ss.scan(bridge, ss.token_ids(rows), sinks=[3], batch=batch, progress=False)
        for batch in (1, 2)
    ]
    for report in split:
        compared = compare(report, oracle)
        assert {"latent_norm", "latent_drain", "normed_latent_drain", "value_drain"} <= compared
        assert {"received_attention", "sink_logit_gap", "sink_cosine"} <= compared


def test_prompts_in_which_queries_choose_their_keys_are_refused() -> None:
    family = BY_NAME["glm_moe_dsa"]
    bridge = ss.load_model(family.build())
    assert ss.capabilities(bridge).dense_up_to == 24
    with pytest.raises(UnsupportedError, match="to 24 keys at most.*a prompt has 25 tokens"):
        ss.scan(bridge, ss.token_ids(family.tokens(length=25)), progress=False)


def test_a_bridge_made_elsewhere_shows_positions_before_heads() -> None:
    """TransformerLens shows keys with the head first, and z in pieces as wide as rotated keys."""
    model = BY_NAME["youtu"].build()
    bridge = build_bridge_from_module(
        model, type(model).__name__, hf_config=copy.deepcopy(model.config)
    )
    report = ss.scan(bridge, ss.token_ids(BY_NAME["youtu"].tokens()), progress=False)
    assert report.latent_drain is not None
    shapes = {}
    hooks = [
        (f"blocks.0.attn.{name}", lambda x, hook: shapes.update({hook.name[14:]: tuple(x.shape)}))
        for name in ("hook_q", "hook_k", "hook_v", "hook_z")
    ]
    with torch.no_grad():
        bridge.run_with_hooks(BY_NAME["youtu"].tokens(), fwd_hooks=hooks)
    assert shapes == {
        "hook_q": (3, 24, 4, 14),
        "hook_k": (3, 24, 4, 14),
        "hook_v": (3, 24, 4, 6),
        "o.hook_in": (3, 24, 4, 6),
    }


def test_the_description_tells_both_widths() -> None:
    text = str(ss.capabilities(ss.load_model(BY_NAME["youtu"].build())))
    assert "6 (14 of queries and keys)" in text and "keys and values from a latent" in text
    text = str(ss.capabilities(ss.load_model(BY_NAME["glm_moe_dsa"].build())))
    assert re.search(r"chunked or sparse beyond 24[\s│]+positions", text)


def test_other_models_have_no_latent() -> None:
    bridge = ss.load_model(BY_NAME["llama"].build())
    with pytest.raises(UnsupportedError, match="from the residual stream, not from a latent"):
        ss.scan(bridge, ss.token_ids(BY_NAME["llama"].tokens()), metrics="latent", progress=False)

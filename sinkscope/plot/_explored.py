"""What the explorer measures: models, prompts of one's own, the same tokens again, one pattern."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope.report import Settings, SinkReport


def scanned(model: Any, texts: Any) -> tuple[Any, SinkReport]:
    """The loaded model, and its report; without texts, of four prompts of prose."""
    import sinkscope as ss

    model = ss.load_model(model)
    texts = ss.texts("prose", prompts=4, length=128) if texts is None else texts
    return model, ss.scan(model, texts, progress=False)


def scanned_text(model: Any, text: str, settings: Settings) -> SinkReport:
    """A prompt of one's own, measured as a report with these settings was."""
    import sinkscope as ss
    from sinkscope._special import POLICIES

    policy = settings.bos.split(" ")[0]
    bos = policy if policy in POLICIES else "auto"
    return _scanned_like(model, ss.texts([text], bos=bos), settings)


def scanned_again(model: Any, before: SinkReport) -> SinkReport:
    """The same tokens measured in the same way."""
    import sinkscope as ss

    rows = zip(before.tokens, before.mask, strict=True)
    tokens = ss.token_ids([tokens[real].tolist() for tokens, real in rows])
    after = _scanned_like(model, tokens, before.settings)
    return dataclasses.replace(after, token_text=before.token_text)


def _scanned_like(model: Any, texts: Any, settings: Settings) -> SinkReport:
    import sinkscope as ss

    sinks = settings.sinks
    return ss.scan(
        model,
        texts,
        metrics=settings.metrics,
        sinks=sinks if sinks == "auto" else [int(sink) for sink in sinks.split(",")],
        epsilon=settings.epsilon,
        progress=False,
    )


def head_pattern(model: Any, tokens: Any, layer: int, head: int) -> Any:
    """One head's pattern [query key] on some tokens, from the stock bridge's hook."""
    import torch

    from sinkscope.capabilities import capabilities

    kept: dict[str, Any] = {}

    def keep(pattern: Any, hook: Any) -> None:
        kept["pattern"] = pattern[0, head].detach().float().cpu()

    name = capabilities(model).hook("pattern", layer)
    device = next(model.original_model.parameters()).device
    with torch.inference_mode():
        model.run_with_hooks(tokens[None].to(device), return_type=None, fwd_hooks=[(name, keep)])
    return kept["pattern"]

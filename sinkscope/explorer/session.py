"""Measurements of the explorer: models, typed prompts, interventions, one head's pattern."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple

from sinkscope.errors import SinkscopeError
from sinkscope.models.probe import input_device

if TYPE_CHECKING:
    from sinkscope.report.report import SinkReport
    from sinkscope.report.settings import Settings


class Where(NamedTuple):
    """The choices in the explorer when an intervention is requested."""

    position: int
    layer: int
    head: int


Make = Callable[[Any, Where], AbstractContextManager[Any]]


def _self_only(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import SelfOnlyMask

    return SelfOnlyMask(model, at.position)


def _zero_value(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import ZeroValue

    return ZeroValue(model, at.position)


def _weaker_sink(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import ShiftSinkLogit

    return ShiftSinkLogit(model, -5.0, at.position)


def _first_embedding(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import PositionEmbeddingEdit

    return PositionEmbeddingEdit(model, 0, at.position)


def _without_head(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import AblateHeads

    return AblateHeads(model, [(at.layer, at.head)])


def _without_ffn(model: Any, at: Where) -> AbstractContextManager[Any]:
    from sinkscope.interventions import RemoveOutput

    return RemoveOutput(model, at.layer, "mlp", at.position)


INTERVENTIONS: dict[str, Make] = {
    "Self-only mask at the position": _self_only,
    "Zero the value at the position": _zero_value,
    "Sink logit at the position, less 5": _weaker_sink,
    "First position's embedding at the position": _first_embedding,
    "Remove the chosen head": _without_head,
    "Remove the chosen layer's FFN output at the position": _without_ffn,
}
"""Interventions by their name in the explorer; each raises an error where it is not possible."""

_SHAPE = ("architecture", "n_layers", "n_heads", "n_kv_heads")


def scanned(model: Any, texts: Any) -> tuple[Any, SinkReport]:
    """Load a model and scan it; by default on four prompts of prose."""
    import sinkscope as ss

    model = ss.load_model(model)
    texts = ss.texts("prose", prompts=4, length=128) if texts is None else texts
    return model, ss.scan(model, texts, progress=False)


def model_of(report: SinkReport, model: Any) -> Any:
    """Load a model, and refuse it if the report is of another one.

    Raises:
        SinkscopeError: If it is another.
    """
    import sinkscope as ss
    from sinkscope.models.capabilities import capabilities
    from sinkscope.models.provenance import model_source

    model = ss.load_model(model)
    caps, source, settings = capabilities(model), model_source(model), report.settings
    same_shape = all(getattr(caps, name) == getattr(settings, name) for name in _SHAPE)
    revisions = {source.revision, settings.revision} - {""}  # models in memory have none
    if same_shape and len(revisions) < 2:
        return model
    theirs, own = (
        f"{name} ({it.architecture}, {it.n_layers} layers × {it.n_heads} heads, {it.n_kv_heads} KV "
        f"heads{', revision ' + revision.removeprefix('sha256:')[:12] if revision else ''})"
        for name, it, revision in (
            (settings.model, settings, settings.revision), (source.name, caps, source.revision),
        )
    )  # fmt: skip
    raise SinkscopeError(
        f"This report is of {theirs}, and the model is {own}; pass the model that was scanned."
    )


def scanned_text(model: Any, text: str, settings: Settings) -> SinkReport:
    """Measure a typed prompt with the settings of a report."""
    import sinkscope as ss
    from sinkscope.prompts.special_tokens import POLICIES

    policy = settings.bos.split(" ")[0]
    bos = policy if policy in POLICIES else "auto"
    return _scanned_like(model, ss.texts([text], bos=bos), settings)


def scanned_again(model: Any, before: SinkReport) -> SinkReport:
    """Measure the same tokens with the same settings."""
    import sinkscope as ss

    rows = zip(before.tokens, before.mask, strict=True)
    tokens = ss.token_ids([tokens[real].tolist() for tokens, real in rows])
    after = _scanned_like(model, tokens, before.settings)
    text = {name: getattr(before.settings, name) for name in ("source", "bos", "seed")}
    settings = dataclasses.replace(after.settings, **text)
    return dataclasses.replace(after, settings=settings, token_text=before.token_text)


def _scanned_like(model: Any, texts: Any, settings: Settings) -> SinkReport:
    import sinkscope as ss

    sinks = settings.sinks
    return ss.scan(
        model,
        texts,
        metrics=settings.metrics,
        sinks=sinks if sinks == "auto" else [int(sink) for sink in sinks.split(",")],
        epsilon=settings.epsilon,
        attention="eager" if settings.attention == "eager" else "auto",
        progress=False,
    )


def head_pattern(model: Any, tokens: Any, layer: int, head: int) -> Any:
    """Return one head's pattern [query key] on some tokens, from TransformerLens' hook."""
    import torch

    from sinkscope.models.capabilities import capabilities

    kept: dict[str, Any] = {}

    def keep(pattern: Any, hook: Any) -> None:
        kept["pattern"] = pattern[0, head].detach().float().cpu()

    name = capabilities(model).hook("pattern", layer)
    device = input_device(model)
    with torch.inference_mode():
        model.run_with_hooks(tokens[None].to(device), return_type=None, fwd_hooks=[(name, keep)])
    return kept["pattern"]

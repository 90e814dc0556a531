"""Figures of reports: report → `plotly.graph_objects.Figure`, nothing is shown by itself.

Names are imported when they are first used; `import sinkscope` imports no Plotly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope.plot.along import perplexity_along as perplexity_along
    from sinkscope.plot.compare import head_change as head_change
    from sinkscope.plot.compare import head_scatter as head_scatter
    from sinkscope.plot.conditions import before_after as before_after
    from sinkscope.plot.contexts import perplexity_by_window as perplexity_by_window
    from sinkscope.plot.dims import massive_activations as massive_activations
    from sinkscope.plot.dims import nonmixture_dims as nonmixture_dims
    from sinkscope.plot.dormancy import domain_scatter as domain_scatter
    from sinkscope.plot.dormancy import removal_cost as removal_cost
    from sinkscope.plot.dormancy import sleeping_heads as sleeping_heads
    from sinkscope.plot.export import save as save
    from sinkscope.plot.heads import head_map as head_map
    from sinkscope.plot.laboratory import cures as cures
    from sinkscope.plot.laboratory import knockout_risks as knockout_risks
    from sinkscope.plot.layers import attention_by_query as attention_by_query
    from sinkscope.plot.layers import by_layer as by_layer
    from sinkscope.plot.layers import residual_norms as residual_norms
    from sinkscope.plot.layers import value_drains as value_drains
    from sinkscope.plot.page import to_html as to_html
    from sinkscope.plot.pattern import attention_pattern as attention_pattern
    from sinkscope.plot.positions import by_position as by_position
    from sinkscope.plot.positions import position_embedding_norms as position_embedding_norms
    from sinkscope.plot.positions import position_map as position_map
    from sinkscope.plot.rates import sink_rate as sink_rate
    from sinkscope.plot.rates import sink_rate_by_length as sink_rate_by_length
    from sinkscope.plot.strip import token_strip as token_strip
    from sinkscope.plot.theme import set_theme as set_theme
    from sinkscope.plot.theme import template as template
    from sinkscope.plot.timing import bench_ratios as bench_ratios
    from sinkscope.plot.trace import peak_trace as peak_trace
    from sinkscope.plot.training import training_curves as training_curves

_WHERE = {
    "attention_by_query": "layers",
    "attention_pattern": "pattern",
    "before_after": "conditions",
    "bench_ratios": "timing",
    "cures": "laboratory",
    "by_layer": "layers",
    "by_position": "positions",
    "domain_scatter": "dormancy",
    "head_change": "compare",
    "head_map": "heads",
    "head_scatter": "compare",
    "knockout_risks": "laboratory",
    "massive_activations": "dims",
    "nonmixture_dims": "dims",
    "peak_trace": "trace",
    "perplexity_along": "along",
    "perplexity_by_window": "contexts",
    "position_embedding_norms": "positions",
    "position_map": "positions",
    "removal_cost": "dormancy",
    "residual_norms": "layers",
    "save": "export",
    "set_theme": "theme",
    "sink_rate": "rates",
    "sink_rate_by_length": "rates",
    "sleeping_heads": "dormancy",
    "template": "theme",
    "to_html": "page",
    "token_strip": "strip",
    "training_curves": "training",
    "value_drains": "layers",
}

__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(importlib.import_module(f"sinkscope.plot.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'sinkscope.plot' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

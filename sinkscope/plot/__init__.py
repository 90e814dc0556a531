"""Figures of reports: report → `plotly.graph_objects.Figure`, nothing is shown by itself.

Names are imported when they are first used; `import sinkscope` imports no Plotly.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sinkscope.plot.before_after import before_after as before_after
    from sinkscope.plot.contexts import perplexity_by_window as perplexity_by_window
    from sinkscope.plot.dormancy import domain_scatter as domain_scatter
    from sinkscope.plot.dormancy import removal_cost as removal_cost
    from sinkscope.plot.dormancy import sleeping_heads as sleeping_heads
    from sinkscope.plot.heads import head_map as head_map
    from sinkscope.plot.page import to_html as to_html
    from sinkscope.plot.theme import set_theme as set_theme
    from sinkscope.plot.theme import template as template
    from sinkscope.plot.timing import bench_ratios as bench_ratios
    from sinkscope.plot.trace import peak_trace as peak_trace
    from sinkscope.plot.training import training_curves as training_curves

_WHERE = {
    "before_after": "before_after",
    "bench_ratios": "timing",
    "domain_scatter": "dormancy",
    "head_map": "heads",
    "peak_trace": "trace",
    "perplexity_by_window": "contexts",
    "removal_cost": "dormancy",
    "set_theme": "theme",
    "sleeping_heads": "dormancy",
    "template": "theme",
    "to_html": "page",
    "training_curves": "training",
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

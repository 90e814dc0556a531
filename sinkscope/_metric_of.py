"""Which metric of a scan measures a figure: a metric is asked for, figures come of it."""

from __future__ import annotations

_OF_FIELDS = {
    "massive_activations": "massive",
    "nonmixture_dims": "ffn",
    "sink_logit_parts": "sink_logit",
}
"""Figures that are no field of the report: methods of it, and the name of several fields."""


def metric_of(figure: str) -> str | None:
    """The metric to ask a scan for, so that its report holds a figure.

    Args:
        figure: A field of the report, or a name from `Capabilities.available`.

    Returns:
        A name from `sinkscope.capture.observers.OBSERVERS`; None where no metric measures it.
    """
    from sinkscope.capture.observers import OBSERVERS

    metrics = {
        field: metric
        for metric, observers in OBSERVERS.items()
        for observer in observers
        for field in observer.fields
    }
    return (metrics | _OF_FIELDS).get(figure)

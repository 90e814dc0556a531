"""The old name of `sinkscope.experiments.inactive_heads`, for one release."""

from sinkscope.renamed import names

_NEW = "sinkscope.experiments.inactive_heads"

__getattr__ = names(
    __name__, {"sleep": (_NEW, "ablate_inactive"), "Sleeping": (_NEW, "InactiveAblation")}
)

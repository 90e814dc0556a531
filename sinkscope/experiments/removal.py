"""The old name of `sinkscope.experiments.ablation`, for one release."""

from sinkscope.renamed import names

_NEW = "sinkscope.experiments.ablation"

__getattr__ = names(__name__, {"removal": (_NEW, "ablate_heads"), "Removal": (_NEW, "Ablation")})

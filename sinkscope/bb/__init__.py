"""The Bigram-Backcopy task: toy models in which an attention sink forms (Guo et al. 2024).

`train` a small transformer on the task, follow sink, value drain and residual peak over training
(`dynamics`), clamp one of them (`reinforcement`), compare mitigations (`compare`), and measure any
of these models with the rest of sinkscope (`to_bridge`). README.md in this folder has the results
and describes the files.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

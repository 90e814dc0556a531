"""The Bigram-Backcopy laboratory: grow an attention sink from nothing (Guo et al. 2024).

`train` a small transformer on the exact task, watch sink, drain and peak appear (`dynamics`), hold
one of them still (`reinforcement`), try the cures (`compare`), and measure any of these models with
the rest of sinkscope (`to_bridge`). See README.md beside this file for what was found.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

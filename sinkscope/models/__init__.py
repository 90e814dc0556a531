"""Loading models, and determining what can be measured on them.

`load` makes a TransformerLens bridge from a name, a folder, a file or a model in memory; `probe`
runs it once on a few tokens; `capabilities` derives from that what can be measured; `provenance`
records where the weights came from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

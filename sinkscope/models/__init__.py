"""Models: loaded from anywhere, and asked what can be measured on them.

`load` makes a TransformerLens bridge of a name, a folder, a file or a model in memory; `probe`
runs it once on a few tokens; `capabilities` says what that showed; `provenance` knows where it came
from.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Prompts: texts as token ids, with an explicit BOS policy.

`texts` makes a recipe from a name, a file or strings; `tokens` defines exact ids; `replace` changes
first or last tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Prompts: texts cut into token ids, with the BOS policy written down.

`texts` makes a recipe of a name, a file or strings; `tokens` holds exact ids; `replace` changes the
first or last tokens.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

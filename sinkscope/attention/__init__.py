"""One layer's attention, read without a T × T pattern: the streaming path and its arithmetic."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

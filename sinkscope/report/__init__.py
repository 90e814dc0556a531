"""What a scan returns: named, labelled tensors with their settings, and what one asks of them.

`fields` declares every field with its dimensions, unit and metric; `quantities` derives heads,
dimensions and tokens from them; `summary` puts a report into words; `report` is the class.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

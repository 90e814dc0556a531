"""Reports, the results of scans: labelled tensors with settings, and quantities derived from them.

`fields` declares every field with its dimensions, unit and metric; `quantities` derives heads,
dimensions and tokens from them; `summary` describes a report in text; `report` defines the class.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

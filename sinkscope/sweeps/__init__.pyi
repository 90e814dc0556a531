from .monitor import Monitor as Monitor
from .monitor import SinkCallback as SinkCallback
from .run import sweep as sweep
from .view import Cells as Cells
from .view import open_sweep as open_sweep

__all__ = ["sweep", "open_sweep", "Cells", "Monitor", "SinkCallback"]

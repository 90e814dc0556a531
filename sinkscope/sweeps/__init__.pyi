from .run import sweep as sweep
from .view import open_sweep as open_sweep
from .view import Cells as Cells
from .monitor import Monitor as Monitor
from .monitor import SinkCallback as SinkCallback

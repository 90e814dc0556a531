from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .fields import MassiveActivations as MassiveActivations
from .report import SinkReport as SinkReport
from .report import load_report as load_report
from .settings import Settings as Settings
from .settings import library_versions as library_versions

__all__ = [
    "SinkReport",
    "load_report",
    "Comparison",
    "compare",
    "MassiveActivations",
    "Settings",
    "library_versions",
]

from .report import SinkReport as SinkReport
from .report import load_report as load_report
from .comparison import Comparison as Comparison
from .comparison import compare as compare
from .fields import MassiveActivations as MassiveActivations
from .settings import Settings as Settings
from .settings import library_versions as library_versions

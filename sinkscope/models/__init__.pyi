from .capabilities import Capabilities as Capabilities
from .capabilities import capabilities as capabilities
from .load import load_model as load_model
from .provenance import ModelSource as ModelSource
from .provenance import model_source as model_source

__all__ = ["load_model", "model_source", "ModelSource", "Capabilities", "capabilities"]

from .capabilities import Capabilities as Capabilities
from .load import load_model as load_model
from .packaged import install_packaged as install_packaged
from .packaged import packaged_models as packaged_models
from .provenance import ModelSource as ModelSource
from .provenance import model_identity as model_identity
from .provenance import model_source as model_source

__all__ = [
    "load_model",
    "model_source",
    "model_identity",
    "ModelSource",
    "Capabilities",
    "install_packaged",
    "packaged_models",
]

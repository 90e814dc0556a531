from .load import load_model as load_model
from .provenance import model_source as model_source
from .provenance import model_identity as model_identity
from .provenance import ModelSource as ModelSource
from .capabilities import Capabilities as Capabilities
from .packaged import install_packaged as install_packaged
from .packaged import packaged_models as packaged_models

from .bridge import to_bridge as to_bridge
from .comparison import compare as compare
from .comparison import summarise as summarise
from .config import ATTENTIONS as ATTENTIONS
from .config import OPTIMIZERS as OPTIMIZERS
from .config import ModelConfig as ModelConfig
from .config import TrainConfig as TrainConfig
from .curves import dynamics as dynamics
from .curves import reinforcement as reinforcement
from .growth import fit_growth as fit_growth
from .growth import growth_laws as growth_laws
from .knockout import knockouts as knockouts
from .measurement import Phenomena as Phenomena
from .measurement import measure as measure
from .model import BackcopyTransformer as BackcopyTransformer
from .packaged import load_packaged as load_packaged
from .packaged import packaged_recipe as packaged_recipe
from .packaged import packaged_task as packaged_task
from .packaged import task_texts as task_texts
from .source import BigramSource as BigramSource
from .task import Batches as Batches
from .task import BigramBackcopy as BigramBackcopy
from .training import Run as Run
from .training import load_model as load_model
from .training import train as train

__all__ = [
    "BigramSource",
    "BigramBackcopy",
    "Batches",
    "ModelConfig",
    "ATTENTIONS",
    "OPTIMIZERS",
    "TrainConfig",
    "BackcopyTransformer",
    "Run",
    "train",
    "load_model",
    "Phenomena",
    "measure",
    "knockouts",
    "dynamics",
    "reinforcement",
    "fit_growth",
    "growth_laws",
    "compare",
    "summarise",
    "to_bridge",
    "load_packaged",
    "packaged_task",
    "packaged_recipe",
    "task_texts",
]

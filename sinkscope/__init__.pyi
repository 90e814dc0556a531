from . import bb as bb
from . import experiments as experiments
from . import interventions as interventions
from . import metrics as metrics
from . import plot as plot
from .attention.streaming import streaming as streaming
from .capture.observers.base import Observer as Observer
from .capture.scan import scan as scan
from .errors import SinkscopeError as SinkscopeError
from .explorer.explorer import explore as explore
from .interventions.activations import RemoveOutput as RemoveOutput
from .interventions.activations import ScaleActivation as ScaleActivation
from .interventions.activations import SetActivation as SetActivation
from .interventions.experts import AblateExperts as AblateExperts
from .interventions.heads import AblateHeads as AblateHeads
from .interventions.positions import PositionEmbeddingEdit as PositionEmbeddingEdit
from .interventions.positions import PositionIdEdit as PositionIdEdit
from .interventions.quantise import Quantise as Quantise
from .interventions.self_only import SelfOnlyMask as SelfOnlyMask
from .interventions.sink_logit import ShiftSinkLogit as ShiftSinkLogit
from .interventions.softmax import ReplaceSoftmax as ReplaceSoftmax
from .interventions.transplant import SinkTransplant as SinkTransplant
from .interventions.values import ScaleValue as ScaleValue
from .interventions.values import ZeroValue as ZeroValue
from .interventions.window import WindowedAttention as WindowedAttention
from .models.capabilities import capabilities as capabilities
from .models.load import load_model as load_model
from .prompts.replace import ReplaceEnd as ReplaceEnd
from .prompts.replace import ReplaceStart as ReplaceStart
from .prompts.texts import random_tokens as random_tokens
from .prompts.texts import repeated_tokens as repeated_tokens
from .prompts.texts import texts as texts
from .prompts.tokens import read_token_ids as read_token_ids
from .prompts.tokens import token_ids as token_ids
from .report.comparison import compare as compare
from .report.labelled import measured as measured
from .report.report import SinkReport as SinkReport
from .report.report import load_report as load_report
from .sweeps.monitor import Monitor as Monitor
from .sweeps.monitor import SinkCallback as SinkCallback
from .sweeps.run import sweep as sweep
from .sweeps.view import open_sweep as open_sweep

__all__ = [
    "load_model",
    "capabilities",
    "texts",
    "random_tokens",
    "repeated_tokens",
    "token_ids",
    "read_token_ids",
    "scan",
    "Observer",
    "measured",
    "streaming",
    "SinkReport",
    "load_report",
    "compare",
    "explore",
    "sweep",
    "open_sweep",
    "Monitor",
    "SinkCallback",
    "RemoveOutput",
    "ScaleActivation",
    "SetActivation",
    "AblateHeads",
    "AblateExperts",
    "ScaleValue",
    "ZeroValue",
    "SelfOnlyMask",
    "ShiftSinkLogit",
    "WindowedAttention",
    "SinkTransplant",
    "PositionEmbeddingEdit",
    "PositionIdEdit",
    "ReplaceSoftmax",
    "Quantise",
    "ReplaceEnd",
    "ReplaceStart",
    "SinkscopeError",
    "bb",
    "experiments",
    "interventions",
    "metrics",
    "plot",
]

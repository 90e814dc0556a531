from . import ablation as ablation
from . import dormant as dormant
from . import dynamics as dynamics
from . import experts as experts
from . import inactive_heads as inactive_heads
from . import life as life
from . import mixing as mixing
from . import precision as precision
from . import rotary_precision as rotary_precision
from . import seeds as seeds
from . import spikes as spikes
from . import streaming_context as streaming_context
from . import trace_peak as trace_peak
from . import transplant as transplant
from . import vocabulary as vocabulary
from . import waiver as waiver

__all__ = [
    "ablation",
    "dormant",
    "dynamics",
    "experts",
    "inactive_heads",
    "life",
    "mixing",
    "spikes",
    "precision",
    "seeds",
    "rotary_precision",
    "streaming_context",
    "trace_peak",
    "transplant",
    "vocabulary",
    "waiver",
]

from .conditions import before_after as before_after
from .contexts import perplexity_along as perplexity_along
from .contexts import perplexity_by_scheme as perplexity_by_scheme
from .contexts import perplexity_by_window as perplexity_by_window
from .dims import massive_activations as massive_activations
from .dims import nonmixture_dims as nonmixture_dims
from .dormancy import ablation_effect as ablation_effect
from .dormancy import domain_scatter as domain_scatter
from .dormancy import loss_by_share_ablated as loss_by_share_ablated
from .experts import expert_map as expert_map
from .export import paper as paper
from .export import save as save
from .guesses import guess_and_result as guess_and_result
from .heads import head_change as head_change
from .heads import head_map as head_map
from .heads import head_scatter as head_scatter
from .heads import recency_plane as recency_plane
from .layers import attention_by_query as attention_by_query
from .layers import by_layer as by_layer
from .layers import chance_levels as chance_levels
from .layers import residual_norms as residual_norms
from .layers import value_drains as value_drains
from .life import sink_life as sink_life
from .pattern import attention_pattern as attention_pattern
from .positions import by_position as by_position
from .positions import position_embedding_norms as position_embedding_norms
from .positions import position_map as position_map
from .precision import damage_map as damage_map
from .precision import kept_tokens as kept_tokens
from .rates import sink_rate as sink_rate
from .rates import sink_rate_by_length as sink_rate_by_length
from .renamed import cures as cures
from .renamed import removal_cost as removal_cost
from .renamed import sleeping_heads as sleeping_heads
from .shifts import shift_errors as shift_errors
from .shifts import shift_errors_by_key as shift_errors_by_key
from .spikes import pre_attention_spikes as pre_attention_spikes
from .strip import token_strip as token_strip
from .sweeps import head_maps as head_maps
from .sweeps import sweep_curves as sweep_curves
from .theme import set_theme as set_theme
from .theme import template as template
from .timing import bench_ratios as bench_ratios
from .trace import peak_trace as peak_trace
from .training import knockout_risks as knockout_risks
from .training import mitigations as mitigations
from .training import training_curves as training_curves
from .transplant import transplant_effects as transplant_effects
from .vocabulary import vocabulary_map as vocabulary_map
from .vocabulary import vocabulary_norms as vocabulary_norms
from .vocabulary import vocabulary_shares as vocabulary_shares

__all__ = [
    "chance_levels",
    "before_after",
    "perplexity_along",
    "perplexity_by_scheme",
    "perplexity_by_window",
    "massive_activations",
    "nonmixture_dims",
    "domain_scatter",
    "ablation_effect",
    "loss_by_share_ablated",
    "paper",
    "save",
    "guess_and_result",
    "head_change",
    "head_maps",
    "head_map",
    "head_scatter",
    "recency_plane",
    "attention_by_query",
    "by_layer",
    "residual_norms",
    "sweep_curves",
    "sink_rate",
    "sink_rate_by_length",
    "value_drains",
    "attention_pattern",
    "by_position",
    "position_embedding_norms",
    "position_map",
    "token_strip",
    "set_theme",
    "template",
    "bench_ratios",
    "peak_trace",
    "sink_life",
    "expert_map",
    "pre_attention_spikes",
    "damage_map",
    "kept_tokens",
    "shift_errors",
    "shift_errors_by_key",
    "cures",
    "removal_cost",
    "sleeping_heads",
    "mitigations",
    "knockout_risks",
    "training_curves",
    "transplant_effects",
    "vocabulary_map",
    "vocabulary_norms",
    "vocabulary_shares",
]

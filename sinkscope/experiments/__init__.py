"""Experiments for any model, one module per research question.

=================== ==========================================================================
`waiver`            what makes a token the sink, and making another one the sink
`trace_peak`        which blocks write the residual peak, and which heads read it
`vocabulary`        which tokens become a sink as the first of a prompt
`life`              which parts write, carry and erase the sink's residual state
`experts`           which experts of a routed model write the massive activations
`spikes`            whether a hybrid model's activations spike before its attention layers
`transplant`        whether a sink matters for the attention it absorbs or what it adds
`dormant`           which heads are dormant on one kind of text and active on another
`ablation`          the loss without each head
`inactive_heads`    the loss without the heads that a score flags as inactive
`mixing`            how far a changed token spreads, with and without a sink
`dynamics`          sinks, drains and peaks over training
`precision`         what low precision costs, and what must stay in full precision
`seeds`             whether runs from different seeds have the same sink heads
`rotary_precision`  what a shift of all rotary positions changes in low precision
`streaming_context` perplexity of a long text through a window with a few kept positions
=================== ==========================================================================

The functions are imported from their modules, ``from sinkscope.experiments.precision import
precision``. Each takes a model and texts and returns a `result.Result`, with ``summary()`` (words),
``statistics()`` (numbers), ``to_frame()`` (a tidy table), ``figures()`` (Plotly), ``to_dict()`` and
``save(path)``. `resume` keeps results in files, `readout` and `partial_forward` run the model.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)

"""Measuring a running model: observers on hook points that reduce activations inside the hook.

`scan` is the entry point; `observers` turn signals into the fields of a report; `accumulators`
combine them over batches; `runner` runs the batches; `readers` and `paths` implement how attention
is read.
"""

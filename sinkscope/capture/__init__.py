"""From a running model to small tensors: observers on hook points, reduced inside the hook.

`attention` says what a layer's attention looked like, `streaming` makes that cheap, `observers`
turn it into the quantities of a report, `folds` merge them over layers and batches, and `runner`
feeds the batches.
"""

"""From a running model to small tensors: observers on hook points, reduced inside the hook.

`scan` is the entrance; `observers` turn signals into the fields of a report; `aggregate` merges
them over layers and batches; `runner` feeds the batches; `readers` and `paths` say how attention is
read.
"""

"""Definitions of the metrics: pure functions on tensors, independent of models, hooks and files.

Faster implementations elsewhere must agree with these. Conventions shared by all:

* ``mask`` is True at real positions, ``sinks`` at sink positions; both are ``[prompt position]``.
* ``window`` is the number that Hugging Face passes to its attention function: query i sees key j
  only at distance ``|i - j| < window``; None means no window.
* Reductions run in at least fp32, whatever the input's dtype; a float64 input stays float64.
* A mean over no entries is nan, not 0, to distinguish undefined values from zeros.
"""

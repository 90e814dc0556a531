"""The definitions: pure functions on tensors, which know no model, no hook and no file.

Whatever sinkscope measures faster elsewhere must agree with these. Conventions shared by all:

* ``mask`` is True at real positions, ``sinks`` at sink positions; both are ``[prompt position]``.
* ``window`` is the number Hugging Face hands to its attention function: query i sees key j only
  at distance ``|i - j| < window``; None means no window.
* Reductions run in fp32 at least, whatever the input's dtype; a float64 input stays float64.
* A mean over nothing is nan, never 0: "not defined here" must not look like "none".
"""

"""Which block writes SmolLM2's residual peak, and what happens to the sink without it?

    python examples/trace_peak.py

printed, with Python 3.11 (the text of its manual differs a little between versions):

smollm2-135m · T = 32 · BOS: auto (none) · 2 × prose
The residual state of position 0 is largest after layer 11: 23,020 [22,768, 23,271], 168 [166, 171]
times the median of the others. Mean attention to it in layers 12 to 29: 0.653 [0.651, 0.655].
One part of one block at a time is replaced, at position 0 alone. Parts without which less than half
of the peak is left:
  replaced            by       peak left     attention after it   heads above 0.3
 ─────────────────────────────────────────────────────────────────────────────────
  nothing                          100 %   0.653 [0.651, 0.655]        155 of 162
  FFN of block 11   zero      0 % [0, 0]   0.130 [0.118, 0.142]         15 of 162
  FFN of block 9    zero   10 % [10, 11]   0.599 [0.594, 0.605]        144 of 162
  FFN of block 8    zero   17 % [16, 18]   0.614 [0.611, 0.617]        146 of 162
The FFN of block 11 writes the peak: set to zero, it leaves 0 % [0, 0] of it, and attention to
position 0 falls by 80 %. Also necessary: the FFNs of blocks 8 and 9. No block's attention is
necessary. Heads that lose most: 23.2 (0.98 → 0.03), 18.6 (0.98 → 0.04), 20.6 (0.99 → 0.06), 20.3
(0.94 → 0.02) and 18.7 (1.00 → 0.08).

One FFN writes the peak, at position 0 alone; earlier ones contribute, and no attention is necessary.
With a tenth of the peak (without block 9) the sink remains; without the peak most of it is gone.
"""

import sinkscope as ss
from sinkscope.experiments.trace_peak import trace_peak

model = ss.load_model("smollm2-135m")
texts = ss.texts("prose", prompts=2, length=32)
print(trace_peak(model, texts, modes=["zero"], progress=False))

"""Names of the hook points that may carry a signal, and what was found out about them."""

from __future__ import annotations

from dataclasses import dataclass, field

B = "blocks.{layer}."
PATTERN = B + "attn.hook_pattern"
SCORES = B + "attn.hook_attn_scores"
QUERY_KEY = (
    (B + "attn.hook_rot_q", B + "attn.hook_rot_k"),
    (B + "attn.hook_q", B + "attn.hook_k"),
)
VALUE, Z = B + "attn.hook_v", B + "attn.hook_z"
GATES = (B + "attn.hook_gate", B + "attn.hook_q_gate")
RESID_PRE, RESID_POST = B + "hook_resid_pre", B + "hook_resid_post"
# On BERT hook_attn_out is the state after the next norm; what attention adds is attn.o's output.
ATTN_OUT = (B + "hook_attn_out", B + "attn.o.hook_out")
MLP_OUT = (B + "hook_mlp_out", B + "mlp.out.hook_out")
LN1_IN, LN1_OUT, LN2_IN = B + "ln1.hook_in", B + "ln1.hook_out", B + "ln2.hook_in"
NEURONS, DOWN_IN = B + "mlp.hook_post", B + "mlp.out.hook_in"

CANDIDATES = (
    *(PATTERN, SCORES, *QUERY_KEY[0], *QUERY_KEY[1], VALUE, Z, *GATES),
    *(RESID_PRE, RESID_POST, *ATTN_OUT, *MLP_OUT, LN1_IN, LN1_OUT, LN2_IN, NEURONS, DOWN_IN),
)
"""Templates of all hook points that may carry a signal or serve to check one."""


@dataclass
class Findings:
    """What the checks found.

    Attributes:
        scales: The factor on q·k in each layer.
        stock_differs: In what the stock bridge computes something else than the model, or None.
        signals: Signal name to hook template, for the signals that passed.
        reasons: Signal name to why it is not offered.
        softmax: Whether the pattern is a softmax of the scores, of which a place that is no key (a
            learned sink, a key bias without value, off-by-one) may take a share.
        gated: Whether a gate multiplies what the pattern mixes before it becomes ``z``.
    """

    scales: tuple[float, ...]
    stock_differs: str | None = None
    signals: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    softmax: bool = True
    gated: bool = False

    def accept(self, **hooks: str) -> None:
        """Offer signals under these hooks."""
        self.signals |= hooks

    def reject(self, reason: str, *signals: str) -> None:
        """Say why signals are not offered."""
        self.reasons |= dict.fromkeys(signals, reason)

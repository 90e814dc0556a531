"""Assignment of hook points of the unmodified bridge to signals, verified numerically.

The name of a hook point only makes it a candidate. A pattern must be zero at masked keys; the
scaled products of queries and keys must explain the pattern or the scores; scores must give the
pattern under softmax, or equal these products; the pattern-weighted sum of values must be ``z``
(possibly after a gate); and the residual stream must add up. Signals that fail are not available,
with the reason.

Attention need not be a softmax: any non-negative weights are allowed. Whether it is one is
determined as well, since some metrics, such as the entropy of a row, are defined only then.
"""

from __future__ import annotations

from itertools import product

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from sinkscope.metrics.gates import ACTIVATIONS, factors
from sinkscope.metrics.positions import visible
from sinkscope.metrics.values import per_query_head
from sinkscope.models.anatomy import Anatomy
from sinkscope.models.probe import (
    ATTN_OUT,
    BLOCK_OUT,
    DOWN_IN,
    GATES,
    LATENT,
    LATENT_NORM_OUT,
    LN1_IN,
    LN1_OUT,
    LN2_IN,
    MIXER_OUT,
    MLP_OUT,
    NEURONS,
    NORMED_LATENT,
    PATTERN,
    QUERY_KEY,
    RESID_POST,
    RESID_PRE,
    SCORES,
    UP_IN,
    UP_OUT,
    VALUE,
    Findings,
    Probe,
    Z,
)

# -- the arithmetic of the checks ------------------------------------------------------------------


def scaled_products(
    query: Float[Tensor, "prompt query head d_head"],
    key: Float[Tensor, "prompt key kv_head d_head"],
    scale: float,
    softcap: float | None,
) -> Float[Tensor, "prompt head query key"]:
    """Scores: scale · q·k, bounded to ±softcap by tanh if there is a softcap (Gemma-2)."""
    query, key = (rearrange(x, "b t h d -> b h t d") for x in (query, key))
    key = per_query_head(key, query.shape[1])
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * scale
    return scores if softcap is None else softcap * torch.tanh(scores / softcap)


def masked_softmax(
    scores: Float[Tensor, "prompt head query key"],
    visible: Bool[Tensor, "query key"],
    sinks: Float[Tensor, "head"] | None,
) -> Float[Tensor, "prompt head query key"]:
    """Softmax over visible keys and a learned sink, if there is one, whose share is dropped."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is None:
        return scores.softmax(-1)
    sink = rearrange(sinks, "h -> 1 h 1 1").expand(*scores.shape[:-1], 1)
    return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]


def mixed_values(
    pattern: Float[Tensor, "prompt head query key"],
    value: Float[Tensor, "prompt key kv_head d_head"],
) -> Float[Tensor, "prompt query head d_head"]:
    """Σ_j A_ij v_j for every query head."""
    value = per_query_head(rearrange(value, "b t h d -> b h t d"), pattern.shape[1])
    return torch.einsum("bhqk,bhkd->bqhd", pattern, value)


def close(left: Tensor, right: Tensor, tolerance: float) -> bool:
    """Equal shapes, and equal up to ``tolerance`` times the largest magnitude of either.

    What is infinite or nan on either side proves nothing, and is not close to anything.
    """
    if left.shape != right.shape:
        return False
    size = torch.maximum(left.abs().max(), right.abs().max()).clamp_min(1e-30)
    if not size.isfinite():
        return False
    return bool((left - right).abs().max() <= tolerance * size)


OF_ATTENTION = frozenset(
    {"pattern", "scores", "query", "key", "value", "z", "gate", "latent", "normed_latent"}
)
"""Signals that exist only in layers with attention."""

HIDDEN = torch.finfo(torch.float32).min / 2
"""Scores below this are masked."""

Layers = list[Tensor]


def is_causal(probe: Probe, anatomy: Anatomy, tolerance: float) -> bool:
    """Whether no query attends to a later key; without a pattern, tested on the final states."""
    pattern = probe.layers(PATTERN, anatomy.attending)
    final = probe.layers(RESID_POST, range(anatomy.n_layers))
    if pattern:
        length = probe.tokens.shape[1]
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        return not any(p[..., future].any() for p in pattern)
    if final is None:
        return True
    first, second = final[-1][:, :-1]  # the two prompts differ in their last token
    return close(first, second, tolerance)


def find_signals(probe: Probe, anatomy: Anatomy, causal: bool, tolerance: float) -> Findings:
    """Check every candidate.

    Args:
        probe: The recorded forward pass.
        anatomy: The model's structure.
        causal: Whether a position attends only to itself and earlier ones.
        tolerance: Relative error due to the model's dtype.
    """
    checks = _Checks(probe, anatomy, causal, tolerance)
    if anatomy.attending:
        checks.pattern()
        checks.query_key()
        checks.scores()
        checks.values()
        checks.latents()
    else:
        checks.findings.reject(anatomy.no_attention, *sorted(OF_ATTENTION))
    checks.residual()
    checks.neurons()
    return checks.findings


class _Checks:
    """The checks, in an order in which each may rely on the previous ones.

    Those of attention run over the layers with attention; in their methods ``layer`` is an index
    into `anatomy.attending`.
    """

    def __init__(self, probe: Probe, anatomy: Anatomy, causal: bool, tolerance: float) -> None:
        self.probe, self.anatomy, self.tolerance = probe, anatomy, tolerance
        real = torch.ones(1, probe.tokens.shape[1], dtype=torch.bool)
        at = anatomy.attending
        self.visible = [visible(real, causal, anatomy.windows[layer])[0] for layer in at]
        self.sinks = [anatomy.sinks[layer] for layer in at]
        self.scales = [anatomy.scales[layer] for layer in at]
        self.stated_scales = [anatomy.stated_scales[layer] for layer in at]
        self.findings = Findings(scales=tuple(scales[0] for scales in self.scales))
        self.products: Layers | None = None  # scaled q·k of the accepted queries and keys

    def attention(self, template: str) -> Layers | None:
        """Activations of a hook in the layers with attention."""
        return self.probe.layers(template, self.anatomy.attending)

    def layers(self, template: str) -> Layers | None:
        """Activations of a hook in all layers."""
        return self.probe.layers(template, range(self.anatomy.n_layers))

    def close(self, left: Tensor, right: Tensor) -> bool:
        return close(left, right, self.tolerance)

    def same(self, left: Layers, right: Layers) -> bool:
        return all(map(self.close, left, right))

    def pattern(self) -> None:
        """A pattern is non-negative, and zero at keys masked by causality and window."""
        pattern = self.attention(PATTERN)
        if pattern is None:
            self.findings.reject(
                "hook_pattern does not fire in every block that attends, because this attention "
                "implementation computes no pattern "
                '(bridge.original_model.set_attn_implementation("eager") does)',
                "pattern",
            )
        elif all(p.ndim == 4 and self.reads_the_visible(i, p) for i, p in enumerate(pattern)):
            self.findings.accept(pattern=PATTERN)
        else:
            self.findings.reject(
                "hook_pattern does not read the keys that the config's mask leaves visible",
                "pattern",
            )

    def reads_the_visible(self, layer: int, pattern: Tensor) -> bool:
        """Whether masked keys get no attention, and the other keys are known to be visible.

        Under a softmax some head attends to each visible key. With other operators its attention
        may be zero in all heads (ReLU, softpick, no attention at all); then the scores must confirm
        the mask.
        """
        seen, scores = self.visible[layer], self.attention(SCORES)
        if (pattern < 0).any() or pattern[..., ~seen].any():
            return False
        if (pattern.sum((0, 1)) > 0)[seen].all():
            return True
        return scores is not None and bool(((scores[layer] > HIDDEN) == seen).all())

    def query_key(self) -> None:
        """The scaled products of queries and keys explain the pattern or the scores."""
        for query_hook, key_hook in QUERY_KEY:
            query, key = self.attention(query_hook), self.attention(key_hook)
            if query is None or key is None:
                continue
            scales = [self.scale(i, query[i], key[i]) for i in range(len(query))]
            fitting = tuple(scale for scale in scales if scale is not None)
            if len(fitting) == len(scales):
                self.compare_scales(fitting)
                self.findings.accept(query=query_hook, key=key_hook)
                self.products = list(map(self.scaled, query, key, fitting))
                return
        reason = "the stock bridge shows no queries and keys as attention multiplies them"
        if self.anatomy.positions == "rotary":
            reason += " (hook_rot_q and hook_rot_k do not fire here)"
        elif self.anatomy.positions == "alibi":
            reason += " (a position bias is added to their products)"
        self.findings.reject(reason, "query", "key")

    def compare_scales(self, fitting: tuple[float, ...]) -> None:
        """Store the fitting scales, unless the model's own modules state others.

        Stated scales are tried first, so if another one fits, the bridge does not use the model's.
        """
        model = tuple(
            fits if stated is None else stated
            for fits, stated in zip(fitting, self.stated_scales, strict=True)
        )
        self.findings.scales = model
        for layer, (fits, stated) in enumerate(zip(fitting, model, strict=True)):
            if fits != stated:
                self.findings.stock_differs = (
                    f"the stock bridge scales q·k by {fits:.3g} in layer "
                    f"{self.anatomy.attending[layer]}, where the model scales it by {stated:.3g}"
                )
                return

    def scale(self, layer: int, query: Tensor, key: Tensor) -> float | None:
        """The first scale that fits this layer; uniform patterns do not determine it, scores do."""
        products = {scale: self.scaled(query, key, scale) for scale in self.scales[layer]}
        for fits in (self.are_scores, self.explains_pattern):
            for scale, scores in products.items():
                if fits(layer, scores):
                    return scale
        return None

    def scaled(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        return scaled_products(query, key, scale, self.anatomy.softcap)

    def explains_pattern(self, layer: int, scores: Tensor) -> bool:
        """Whether a masked softmax of these scores is the layer's pattern."""
        pattern = self.attention(PATTERN)
        if pattern is None or scores.shape != pattern[layer].shape:
            return False
        expected = masked_softmax(scores, self.visible[layer], self.sinks[layer])
        return self.close(expected, pattern[layer])

    def are_scores(self, layer: int, products: Tensor) -> bool:
        """Whether these products equal ``hook_attn_scores`` at visible keys."""
        scores = self.attention(SCORES)
        if scores is None or products.shape != scores[layer].shape:
            return False
        seen = self.visible[layer]
        return self.close(products[..., seen], scores[layer][..., seen])

    def scores(self) -> None:
        """The softmax of the scores is the pattern, or the scores are the scaled products."""
        findings, scores, pattern = self.findings, self.attention(SCORES), self.attention(PATTERN)
        if pattern is not None:  # without true scores, rows that sum to one count as softmax
            findings.softmax = all(self.close(p.sum(-1), torch.ones(p.shape[:-1])) for p in pattern)
        if scores is None:
            findings.reject("hook_attn_scores does not fire in every block that attends", "scores")
        elif pattern is not None and self.same(scores, pattern):
            findings.reject("the stock bridge's hook_attn_scores is the pattern itself", "scores")
        else:
            findings.softmax = all(self.is_softmax(i, s) for i, s in enumerate(scores))
            products = self.products or ()
            if findings.softmax or (
                products and all(self.are_scores(i, s) for i, s in enumerate(products))
            ):
                findings.accept(scores=SCORES)
            else:
                findings.reject("hook_pattern is not the softmax of hook_attn_scores", "scores")

    def is_softmax(self, layer: int, scores: Tensor) -> bool:
        """Whether the softmax of these scores is the layer's pattern, up to a share of no key."""
        if self.explains_pattern(layer, scores):
            return True
        pattern = self.attention(PATTERN)
        if pattern is None or scores.shape != pattern[layer].shape:
            return False
        total = pattern[layer].sum(-1, keepdim=True)
        if (total <= 0).any() or (total > 1 + self.tolerance).any():
            return False
        return self.close(masked_softmax(scores, self.visible[layer], None), pattern[layer] / total)

    def values(self) -> None:
        """The pattern-weighted sum of the values is ``z``, before a gate if there is one."""
        value, z = self.attention(VALUE), self.attention(Z)
        if value is None or z is None or any(x.ndim != 4 for x in (*value, *z)):
            self.findings.reject(
                "hook_v and hook_z do not show one vector a head", "value", "z", "gate"
            )
        elif "pattern" not in self.findings.signals:
            # z is the output projection's input by construction; there may be a norm or another
            # step between the value projection and the values that attention averages.
            self.findings.accept(z=Z)
            self.findings.reject(
                "there is no pattern to prove that hook_v is what attention mixes", "value"
            )
            self.findings.gated = any(self.attention(hook) for hook in GATES)
            self.findings.reject(
                "there is no pattern to prove what the gate multiplies"
                if self.findings.gated
                else "no gate fires behind the heads",
                "gate",
            )
        else:
            mixed = list(map(mixed_values, self.attention(PATTERN) or [], value))
            plain = self.same(mixed, z)
            if plain:
                self.findings.reject("no gate stands behind the heads", "gate")
            else:
                self.gate(mixed, z)
            if plain or self.findings.gated:
                self.findings.accept(value=VALUE, z=Z)
            else:
                self.findings.reject(
                    "the pattern does not mix hook_v into hook_z", "value", "z", "gate"
                )

    def latents(self) -> None:
        """The normalised latent is the input of the projection to keys and values of all heads.

        The last output channels of the projection for each head are its values.
        """
        names = ("latent", "normed_latent")
        latent, normed = self.attention(LATENT), self.attention(NORMED_LATENT)
        given, read, made = map(self.attention, (LATENT_NORM_OUT, UP_IN, UP_OUT))
        value = self.attention(VALUE) if "value" in self.findings.signals else None
        if latent is None or normed is None:
            self.findings.reject(
                f"{self.anatomy.architecture} projects keys and values from the residual stream, "
                "not from a latent",
                *names,
            )
        elif not (given and read and made and value):
            self.findings.reject("no values show what is made of the latent", *names)
        elif self.same(normed, given) and self.same(normed, read) and self.hold(made, value):
            self.findings.accept(latent=LATENT, normed_latent=NORMED_LATENT)
        else:
            self.findings.reject("the latent's projection does not end in the values", *names)

    def hold(self, made: Layers, value: Layers) -> bool:
        """Whether the projection of the latents ends, for each head, in the values."""
        each = [
            rearrange(x, "b t (h d) -> b t h d", h=v.shape[2])
            for x, v in zip(made, value, strict=True)
        ]
        return self.same([x[..., -v.shape[-1] :] for x, v in zip(each, value, strict=True)], value)

    def gate(self, mixed: Layers, z: Layers) -> None:
        """A gate is a hook whose activation times the weighted sum of values gives ``z``."""
        for hook in GATES:
            shown = self.attention(hook)
            if shown is None or any(
                gate.shape[-1] % x.shape[2] for gate, x in zip(shown, z, strict=True)
            ):
                continue
            for activation in ACTIVATIONS:
                # One factor per channel of a head, or one for all channels.
                gates = [
                    factors(gate, activation, x.shape[2]) for gate, x in zip(shown, z, strict=True)
                ]
                if self.same([x * gate for x, gate in zip(mixed, gates, strict=True)], z):
                    self.findings.gated, self.findings.gate = True, activation
                    self.findings.accept(gate=hook)
                    return

    def residual(self) -> None:
        """Block outputs are the next block's inputs, and the two sub-layers' outputs add up."""
        findings, before = self.findings, self.layers(RESID_PRE)
        shown = next((hook for hook in BLOCK_OUT if self.layers(hook)), RESID_POST)
        after = self.layers(shown)
        shape = (*self.probe.tokens.shape, self.anatomy.d_model)
        names = ("resid_pre", "resid_post", "attn_out", "mlp_out")
        if before is None or after is None or any(x.shape != shape for x in (*before, *after)):
            findings.reject("a block does not pass on one residual vector a position", *names)
            return
        if not self.same(after[:-1], before[1:]):
            findings.reject("a block's output is not the next block's input", *names)
            return
        findings.accept(resid_pre=RESID_PRE, resid_post=shown)
        others = MIXER_OUT if len(self.anatomy.attending) < self.anatomy.n_layers else (None,)
        for attn_hook, other_hook, mlp_hook in product(ATTN_OUT, others, MLP_OUT):
            attn, mlp = self.first_half(attn_hook, other_hook), self.layers(mlp_hook)
            if attn and mlp and self.add_up(before, attn, mlp, after):
                findings.accept(attn_out=attn_hook, mlp_out=mlp_hook)
                if other_hook is not None and other_hook != attn_hook:
                    findings.elsewhere["attn_out"] = other_hook
                return
        findings.reject("no hook points show what each half of a block adds", "attn_out", "mlp_out")
        for mlp_hook in MLP_OUT:
            middle, mlp = self.layers(LN2_IN), self.layers(mlp_hook)
            if middle and mlp and self.adds(middle, mlp, after):
                del findings.reasons["mlp_out"]
                findings.accept(mlp_out=mlp_hook)
                return

    def first_half(self, attn_hook: str, other_hook: str | None) -> Layers | None:
        """Output of attention, or of the module in its place, in each layer."""
        at = self.anatomy.attending
        elsewhere = [layer for layer in range(self.anatomy.n_layers) if layer not in at]
        attn = self.attention(attn_hook)
        others = self.probe.layers(other_hook, elsewhere) if other_hook else []
        if attn is None or others is None:
            return None
        of_layer = dict(zip((*at, *elsewhere), (*attn, *others), strict=True))
        return [of_layer[layer] for layer in range(self.anatomy.n_layers)]

    def adds(self, before: Layers, part: Layers, after: Layers) -> bool:
        """Whether the output of a part of each block is added to its input state."""
        shapes = all(x.shape == p.shape for x, p in zip(before, part, strict=True))
        return shapes and self.same([x + p for x, p in zip(before, part, strict=True)], after)

    def add_up(self, before: Layers, attn: Layers, mlp: Layers, after: Layers) -> bool:
        """In pre-norm blocks the sum is the output; in post-norm blocks each sum is normalised."""
        if any(
            a.shape != x.shape or m.shape != x.shape
            for x, a, m in zip(before, attn, mlp, strict=True)
        ):
            return False
        if self.same([x + a + m for x, a, m in zip(before, attn, mlp, strict=True)], after):
            return True
        ln1_in, ln1_out, ln2_in = (self.layers(hook) for hook in (LN1_IN, LN1_OUT, LN2_IN))
        if not (ln1_in and ln1_out and ln2_in):
            return False
        first = [x + a for x, a in zip(before, attn, strict=True)]
        second = [x + m for x, m in zip(ln1_out, mlp, strict=True)]
        return self.same(first, ln1_in) and self.same(second, ln2_in)

    def neurons(self) -> None:
        """Neurons are the input of the FFN's down-projection."""
        hidden, down = self.layers(NEURONS), self.layers(DOWN_IN)
        if self.anatomy.moe:
            self.findings.reject(
                "a mixture of experts has no one set of neurons: every token passes through those "
                "of its own experts",
                "neurons",
            )
        elif hidden and down and hidden[0].ndim == 3 and self.same(hidden, down):
            self.findings.accept(neurons=NEURONS)
        else:
            self.findings.reject("no hook point shows what the down-projection reads", "neurons")

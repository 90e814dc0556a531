"""The toy transformer: the model of Guo et al. 2024, with mitigations proposed since.

Pre-norm, learned token and position embeddings, ReLU feed-forward, no biases in linear maps, untied
unembedding, PyTorch's default initialisation. Sub-modules are named as in TransformerLens' native
model, so that `sinkscope.bb.to_bridge` wraps this module without conversion.

Every intermediate value passes through a *tap*, a function (name, tensor) -> tensor with the hook
names of TransformerLens. A tap records or edits values, or (by default) does nothing and compiles
away. The entry point is `BackcopyTransformer`, at the end of this file.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sinkscope.attention import operators
from sinkscope.bb.config import ModelConfig
from sinkscope.errors import UnsupportedError

Tap = Callable[[str, Tensor], Tensor]
MASKED = torch.finfo(torch.float32).min


def no_tap(name: str, value: Tensor) -> Tensor:
    """Return every value unchanged."""
    return value


class Attention(nn.Module):
    """Causal self-attention of one of the kinds `sinkscope.bb.ATTENTIONS`.

    "softmax", "relu", "sigmoid", "off-by-one" and "softpick" name an operator of
    `sinkscope.attention.operators`. "learned-sink" and "key-bias" are softmax with an extra logit:
    a learned number per head, or q·k* with a learned key k* whose value is zero. "gated" is softmax
    with a gate on the head's output, σ(W_g x) element by element (Qiu et al. 2025, Gated Attention
    for Large Language Models, arXiv 2505.06708).
    """

    def __init__(self, config: ModelConfig, operator: str) -> None:
        super().__init__()
        self.operator, self.heads, self.scale = operator, config.heads, config.d_head**-0.5
        linear = partial(nn.Linear, config.width, config.width, bias=False)
        self.q, self.k, self.v, self.o = linear(), linear(), linear(), linear()
        if operator == "learned-sink":
            self.sinks = nn.Parameter(torch.zeros(config.heads))
        if operator == "key-bias":
            self.bias_key = nn.Parameter(torch.randn(config.heads, config.d_head))
        if operator == "gated":
            self.gate = linear()

    def forward(
        self,
        hidden_states: Float[Tensor, "prompt position dim"],
        visible: Bool[Tensor, "*#prompt query key"],
        tap: Tap = no_tap,
    ) -> Float[Tensor, "prompt position dim"]:
        """Return what the layer adds to the residual stream; `visible` is the attention mask."""
        split = partial(rearrange, pattern="b t (h d) -> b t h d", h=self.heads)
        query = tap("hook_q", split(self.q(hidden_states)))
        key = tap("hook_k", split(self.k(hidden_states)))
        value = tap("hook_v", split(self.v(hidden_states)))
        scores = einsum(query, key, "b q h d, b k h d -> b h q k").float() * self.scale
        scores = scores.masked_fill(~visible.unsqueeze(-3), MASKED)
        scores = tap("hook_attn_scores", scores)
        pattern = tap("hook_pattern", self.pattern(scores, query)).to(value.dtype)
        z = einsum(pattern, value, "b h q k, b k h d -> b q h d")
        if self.operator == "gated":
            z = z * tap("hook_gate", torch.sigmoid(split(self.gate(hidden_states))))
        z = tap("hook_z", z)
        return self.o(rearrange(z, "b q h d -> b q (h d)"))

    def pattern(
        self, scores: Float[Tensor, "prompt head query key"], query: Tensor
    ) -> Float[Tensor, "prompt head query key"]:
        """Return attention weights from masked scores, by this layer's operator."""
        if self.operator == "learned-sink":
            sinks = rearrange(self.sinks.float(), "h -> h 1 1")
            return operators.softmax_with_extra_logit(scores, sinks)
        if self.operator == "key-bias":
            logit = einsum(query.float(), self.bias_key.float(), "b q h d, h d -> b h q")
            return operators.softmax_with_extra_logit(scores, logit.unsqueeze(-1) * self.scale)
        if self.operator == "gated":  # the gate multiplies the head's output, not its pattern
            return operators.softmax(scores)
        if self.operator == "none":
            return operators.zero(scores)
        return operators.OPERATORS[self.operator](scores, None)


class FeedForward(nn.Module):
    """W_out ReLU(W_in x), four times as wide as the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc_in = nn.Linear(config.width, 4 * config.width, bias=False)
        self.fc_out = nn.Linear(4 * config.width, config.width, bias=False)
        self.activation: nn.Module = nn.ReLU()

    def forward(
        self, hidden_states: Float[Tensor, "prompt position dim"], tap: Tap = no_tap
    ) -> Float[Tensor, "prompt position dim"]:
        """Return what the network adds to the residual stream."""
        before = tap("hook_pre", self.fc_in(hidden_states))
        return self.fc_out(tap("hook_post", self.activation(before)))


class TokenEmbedding(nn.Embedding):
    """An embedding whose gradient is one matrix product and therefore deterministic.

    The usual gradient adds 131,072 rows into 67 in the order of the GPU's atomic operations; this
    one costs the same and is bitwise reproducible.
    """

    def forward(self, input_ids: Int[Tensor, "*row"]) -> Float[Tensor, "*row dim"]:
        """Return the rows of the table."""
        return _Lookup.apply(input_ids, self.weight)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.rows = len(table)
        return nn.functional.embedding(ids, table)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        (ids,) = ctx.saved_tensors
        chosen = nn.functional.one_hot(ids.flatten(), ctx.rows).to(grad.dtype)
        return None, chosen.T @ grad.flatten(0, -2)


class LinearFeedForward(nn.Linear):
    """One matrix in place of the feed-forward network."""

    def forward(self, hidden_states: Tensor, tap: Tap = no_tap) -> Tensor:
        """Return W x; there is no intermediate value to tap."""
        return super().forward(hidden_states)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)); either part may be absent."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        norm = partial(nn.LayerNorm, config.width, eps=1e-5)
        if config.no_norm:
            norm = nn.Identity
        self.attn: Attention | None = None
        self.mlp: FeedForward | LinearFeedForward | None = None
        if layer not in config.no_attention:
            self.ln1, self.attn = norm(), Attention(config, config.attention)
        if layer not in config.no_ffn:
            self.ln2 = norm()
            linear = layer in config.linear_ffn
            self.mlp = (
                LinearFeedForward(config.width, config.width, bias=False)
                if linear
                else FeedForward(config)
            )

    def forward(
        self,
        hidden_states: Float[Tensor, "prompt position dim"],
        visible: Bool[Tensor, "*#prompt query key"],
        tap: Tap = no_tap,
    ) -> Float[Tensor, "prompt position dim"]:
        """Return the residual stream after this block."""
        x = tap("hook_resid_pre", hidden_states)
        if self.attn is not None:
            x = x + tap("hook_attn_out", self.attn(self.ln1(x), visible, within(tap, "attn.")))
        if self.mlp is not None:
            x = x + tap("hook_mlp_out", self.mlp(self.ln2(x), within(tap, "mlp.")))
        return tap("hook_resid_post", x)


class BackcopyTransformer(nn.Module):
    """The whole model, from token ids to logits.

    Args:
        config: The architecture.
        seed: Seed of the initial weights, which leaves torch's global generator unchanged; None
            draws from the global generator.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        if seed is None:
            self._build(config)
            return
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._build(config)

    def _build(self, config: ModelConfig) -> None:
        self.tok_embed = TokenEmbedding(config.vocab, config.width)
        self.pos = nn.Embedding(config.context, config.width)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.layers))
        self.ln_out = nn.Identity() if config.no_norm else nn.LayerNorm(config.width, eps=1e-5)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        causal = torch.ones(config.context, config.context, dtype=torch.bool).tril()
        self.register_buffer("causal", causal, persistent=False)

    def forward(
        self,
        input_ids: Int[Tensor, "prompt position"],
        attention_mask: Tensor | None = None,
        tap: Tap = no_tap,
        inputs_embeds: Tensor | None = None,
        **unused: object,
    ) -> Float[Tensor, "prompt position vocab"]:
        """Return the logits at every position.

        Args:
            input_ids: Token ids.
            attention_mask: 1 for real tokens; padding must be on the right.
            tap: Called with every intermediate value, which it may replace.
            inputs_embeds: Not supported; an argument so that it is refused rather than ignored.
            unused: Options of Hugging Face models that a bridge passes on.

        Raises:
            UnsupportedError: For input embeddings, padding on the left, or too many tokens.
        """
        if inputs_embeds is not None:
            raise UnsupportedError("This model takes token ids, not inputs_embeds; pass input_ids.")
        length = input_ids.shape[1]
        if length > self.config.context:
            raise UnsupportedError(
                f"{length} tokens were given, but this model has {self.config.context} position "
                "embeddings; cut the input."
            )
        visible = self.causal[:length, :length]
        if attention_mask is not None:
            visible = self._unpadded(visible, attention_mask)
        positions = torch.arange(length, device=input_ids.device).unsqueeze(0)
        x = tap("hook_embed", self.tok_embed(input_ids))
        x = x + tap("hook_pos_embed", self.pos(positions))
        for layer, block in enumerate(self.layers):
            x = block(x, visible=visible, tap=within(tap, f"blocks.{layer}."))
        return self.head(self.ln_out(x))

    @staticmethod
    def _unpadded(visible: Tensor, attention_mask: Tensor) -> Bool[Tensor, "prompt query key"]:
        if attention_mask.ndim != 2 or not bool((attention_mask[:, 0] != 0).all()):
            raise UnsupportedError(
                "Padding must be on the right and the mask [prompt position], since positions are "
                f"learned; this mask has the shape {tuple(attention_mask.shape)}."
            )
        return visible & (attention_mask != 0).unsqueeze(1)


def within(tap: Tap, prefix: str) -> Tap:
    """Return the tap for a sub-module, with the module's prefix added to names."""
    if tap is no_tap:
        return no_tap
    return lambda name, value: tap(prefix + name, value)


def recorder(*endings: str) -> tuple[dict[str, Tensor], Tap]:
    """Return a dict, and a tap that stores in it the values whose names end in one of `endings`."""
    kept: dict[str, Tensor] = {}

    def tap(name: str, value: Tensor) -> Tensor:
        if name.endswith(endings):
            kept[name] = value
        return value

    return kept, tap

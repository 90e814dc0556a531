"""Parameters of an attention call: everything besides q, k and v that determines A_ij.

Statistics computed from q, k and the log-sum-exp need exactly the scores of the model's own kernel,
and therefore its scale, softcap, mask and learned sink.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from sinkscope.errors import SinkscopeError


@dataclass(frozen=True)
class AttentionCall:
    """One attention call: s_ij = cap(scale · q_i·k_j) + b_j where j is visible to i, else -inf.

    Query i is at key index p = ``offset`` + i. Key j is visible to it if j ≤ p (when ``causal``),
    |p − j| < ``window`` (when there is one), and ``mask`` allows it.

    Attributes:
        scale: Factor on the dot product.
        softcap: Cap c of c·tanh(s / c), or None.
        window: Sliding window [tokens], or None.
        causal: Whether a query sees no later key.
        learned_sink: Logit of each head that is added to the softmax's denominator, or None.
        key_bias: b_j of each head, or None. ALiBi (Press et al. 2021, arXiv:2108.12409) adds
            slope · (j − p) to a score; as terms equal for all keys of a query do not affect A_ij,
            transformers' models add slope · j.
        mask: None, or real keys [prompt key] (True = visible), or the caller's mask [prompt|1
            head|1 query key]: bool (True = visible), or a float added to the scores.
        offset: Number of keys before the first query: the length of a KV cache.
        prescale: Factor already applied to the queries by the module, as in OPT; queries at
            ``hook_rot_q`` include it.
    """

    scale: float
    softcap: float | None = None
    window: int | None = None
    causal: bool = True
    learned_sink: Float[Tensor, "head"] | None = None
    key_bias: Float[Tensor, "_ head key"] | None = None
    mask: Shaped[Tensor, "prompt key"] | Shaped[Tensor, "_ _ query key"] | None = None
    offset: int = 0
    prescale: float = 1.0
    _keys: weakref.ref | None = field(default=None, repr=False, compare=False)

    @property
    def keys(self) -> Float[Tensor, "prompt key kv_head d_head"]:
        """All keys of this call, those of a KV cache included.

        Equal to ``hook_rot_k`` unless there is a cache. Only available while ``hook_lse`` of the
        same layer fires; otherwise the keys of every layer would stay in memory.

        Raises:
            SinkscopeError: If it is read later.
        """
        keys = self._keys() if self._keys is not None else None
        if keys is None:
            raise SinkscopeError(
                "The keys of an attention call were read after the call: read them inside a hook "
                "on hook_lse of the same layer."
            )
        return keys.transpose(1, 2)

    def visible(
        self, queries: slice, keys: slice, device: torch.device
    ) -> Bool[Tensor, "_ _ query key"] | None:
        """Mask of the keys visible to these queries, or None if all are visible.

        Args:
            queries: Range of query indices, with both ends given.
            keys: Range of key indices, with both ends given.
            device: Device of the result.
        """
        seen = None
        if self._hides_some(queries, keys):
            key = torch.arange(keys.start, keys.stop, device=device)
            seen = self._near(self._stand(queries, device), key)[None, None]
        if self.mask is None or (self.mask.ndim == 4 and self.mask.is_floating_point()):
            return seen
        if self.mask.ndim == 2:
            real = self.mask[:, None, None, keys].to(device)
        else:
            real = self.mask[..., queries, keys].to(device)
        return real if seen is None else seen & real

    def bias(
        self, queries: slice, keys: slice, device: torch.device
    ) -> Float[Tensor, "_ _ _ key"] | None:
        """The term added to the scores of these queries and keys, or None.

        The sum of `key_bias` and of the mask, if it is a float one.
        """
        added = None if self.key_bias is None else self.key_bias[:, :, None, keys].to(device)
        if self.mask is None or self.mask.ndim == 2 or not self.mask.is_floating_point():
            return added
        mask = self.mask[..., queries, keys].to(device)
        return mask if added is None else mask + added

    def at_keys(self, index: Int[Tensor, "prompt chosen"]) -> ChosenKeys:
        """Restrict the call to some keys of each prompt."""
        return ChosenKeys(self, index)

    def key_range(self, queries: slice, n_keys: int) -> slice:
        """Smallest range that contains all keys visible to these queries."""
        first, last = self.offset + queries.start, self.offset + queries.stop
        start, stop = 0, n_keys
        if self.window is not None:
            start, stop = max(0, first - self.window + 1), min(n_keys, last + self.window - 1)
        if self.causal:
            stop = min(stop, last)
        return slice(min(start, stop), stop)

    def _stand(self, queries: slice, device: torch.device) -> Int[Tensor, "query 1"]:
        start, stop = self.offset + queries.start, self.offset + queries.stop
        return torch.arange(start, stop, device=device)[:, None]

    def _near(self, stand: Int[Tensor, "query 1"], key: Int[Tensor, "*_ _"]) -> Bool[Tensor, "..."]:
        """Whether a key index is visible from a query's key index by causality and window."""
        ahead = key - stand
        seen = ahead <= 0 if self.causal else torch.ones_like(ahead, dtype=torch.bool)
        return seen if self.window is None else seen & (ahead.abs() < self.window)

    def _hides_some(self, queries: slice, keys: slice) -> bool:
        first, last = self.offset + queries.start, self.offset + queries.stop - 1
        if self.causal and keys.stop - 1 > first:
            return True
        farthest = max(last - keys.start, keys.stop - 1 - first)
        return self.window is not None and farthest >= self.window


@dataclass(frozen=True)
class ChosenKeys:
    """An `AttentionCall` restricted to a few keys of each prompt.

    Attributes:
        call: The call.
        index: Indices of the keys.
    """

    call: AttentionCall
    index: Int[Tensor, "prompt chosen"]

    def visible(self, queries: slice) -> Bool[Tensor, "prompt _ query chosen"]:
        """Mask of the chosen keys visible to these queries."""
        call, index = self.call, self.index
        stand = call._stand(queries, index.device)
        seen = call._near(stand, index[:, None, None, :])
        if call.mask is None or (call.mask.ndim == 4 and call.mask.is_floating_point()):
            return seen
        return seen & self._cut(queries)

    def bias(self, queries: slice) -> Float[Tensor, "prompt _ _ chosen"] | None:
        """`AttentionCall.bias` at these keys."""
        mask, added = self.call.mask, self.call.key_bias
        if added is not None:
            added = added.to(self.index.device).expand(len(self.index), -1, -1)
            added = added.gather(2, self.index[:, None].expand(-1, added.shape[1], -1))[:, :, None]
        if mask is None or mask.ndim == 2 or not mask.is_floating_point():
            return added
        return self._cut(queries) if added is None else self._cut(queries) + added

    def _cut(self, queries: slice) -> Tensor:
        mask, index = self.call.mask.to(self.index.device), self.index
        if mask.ndim == 2:
            return mask.gather(1, index)[:, None, None, :]
        rows = mask[..., queries, :].expand(len(index), -1, -1, -1)
        return rows.gather(3, index[:, None, None, :].expand(-1, *rows.shape[1:3], -1))

"""Special tokens around a prompt, by an explicit policy whose result is recorded."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from sinkscope.errors import TextError
from sinkscope.validation import one_of

POLICIES = ("auto", "always", "never", "random")

_PROBE = "a b"


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens added to every prompt.

    Attributes:
        prefix: ids before the text; None means an ordinary token drawn anew for each prompt.
        suffix: ids after the text, for example BERT's [SEP]; None as in `prefix`.
        label: the policy and its result, for the report: "auto (none)", "always (<s>)".
        ordinary: the ids to draw from.
    """

    prefix: tuple[int | None, ...]
    suffix: tuple[int | None, ...]
    label: str
    ordinary: tuple[int, ...] = ()

    @property
    def count(self) -> int:
        """Number of tokens added to a prompt."""
        return len(self.prefix) + len(self.suffix)

    def around(self, body: list[int], rng: random.Random) -> list[int]:
        """Add the special tokens to `body`."""
        before, after = (
            [rng.choice(self.ordinary) if id is None else id for id in side]
            for side in (self.prefix, self.suffix)
        )
        return [*before, *body, *after]

    def begun(self, ids: list[int]) -> int:
        """Length of the prefix if the ids already begin with it, else 0."""
        size = len(self.prefix)
        return size if size and tuple(ids[:size]) == self.prefix else 0

    def inside(self, ids: list[int]) -> list[int]:
        """Remove the prefix and suffix from a whole text that already contains them."""
        ids, size = ids[self.begun(ids) :], len(self.suffix)
        return ids[:-size] if size and tuple(ids[-size:]) == self.suffix else ids


def special_tokens(tokenizer: Any, policy: str, d_vocab: int | None) -> SpecialTokens:
    """Resolve a BOS policy for a tokenizer.

    Args:
        tokenizer: the model's Hugging Face tokenizer.
        policy: "auto" uses the tokenizer's default; "always" prepends the BOS token (for BERT,
            [CLS]) even if the tokenizer does not; "never" adds nothing; "random" adds an ordinary
            token, drawn anew for each prompt, in place of each special token of "always" (the
            first-token policy of Yan et al. 2024).
        d_vocab: number of rows of the model's embedding, None if unknown.

    Raises:
        TextError: if the policy is unknown, or "always" without a BOS token.
    """
    one_of("bos", policy, POLICIES, error=TextError)
    if policy == "never":
        return SpecialTokens((), (), "never")
    own = own_tokenizer(tokenizer)
    prefix, suffix = _added(own)
    if policy == "random":
        ordinary = tuple(ordinary_ids(tokenizer, d_vocab))
        return SpecialTokens((None,) * max(1, len(prefix)), (None,) * len(suffix), policy, ordinary)
    if policy == "always" and not prefix:
        prefix = (_bos(own),)
    return SpecialTokens(prefix, suffix, f"{policy} ({_names(own, prefix, suffix)})")


def ordinary_ids(tokenizer: Any, d_vocab: int | None) -> list[int]:
    """Ids of the vocabulary, in order, that are not special tokens."""
    special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    ids = sorted(set(tokenizer.get_vocab().values()) - special)
    return ids if d_vocab is None else [id for id in ids if id < d_vocab]


def own_tokenizer(tokenizer: Any) -> Any:
    """The original tokenizer of a model.

    TransformerLens reloads a model's tokenizer with ``add_bos_token=True`` and replaces a missing
    BOS by EOS, so that a bridge's tokenizer no longer has the original defaults. The original is
    loaded again from its source; a tokenizer made in memory is returned unchanged.
    """
    rewritten = tokenizer.init_kwargs.get("add_bos_token") or (
        tokenizer.bos_token is not None and tokenizer.bos_token == tokenizer.eos_token
    )
    if not rewritten or not tokenizer.name_or_path:
        return tokenizer
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(
            tokenizer.name_or_path, local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError):
        return tokenizer


def _added(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ids that the tokenizer adds before and after a text by default."""
    plain = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    full = tokenizer(_PROBE, add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    raise TextError(
        "This tokenizer does more than put special tokens around a text, so its special tokens "
        "cannot be determined; pass bos='never', or exact ids with token_ids(...)."
    )


def _bos(tokenizer: Any) -> int:
    for id in (tokenizer.bos_token_id, tokenizer.cls_token_id):
        if id is not None:
            return id
    raise TextError(
        "bos='always' needs a BOS token and this model's tokenizer has none; pass bos='auto' or "
        "bos='never'."
    )


def _names(tokenizer: Any, prefix: tuple[int, ...], suffix: tuple[int, ...]) -> str:
    """Description of the special tokens, such as "none", "<s>" or "[CLS] … [SEP]"."""
    before = " ".join(tokenizer.convert_ids_to_tokens(list(prefix)))
    after = " ".join(tokenizer.convert_ids_to_tokens(list(suffix)))
    return f"{before} … {after}".strip() if after else before or "none"

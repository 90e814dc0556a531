"""Token tensors with their mask, as used by a scan."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sinkscope import validation
from sinkscope.errors import SinkscopeWarning, TextError
from sinkscope.output import counted
from sinkscope.prompts.documents import read_text
from sinkscope.validation import shown


@dataclass(frozen=True, eq=False)
class Texts:
    """Prompts as token ids, padded to one length.

    Attributes:
        tokens: token ids [prompt position]; 0 where padded.
        mask: whether a position is a real token [prompt position]. The real tokens of a prompt are
            contiguous, at its left or right end.
        bos: the BOS policy and its result, for example "auto (none)".
        source: name of the source, for example "prose".
        strings: the text of each real token, prompt by prompt; None without a tokenizer.
        seed: seed of the prompts; None if nothing was drawn.

    Created by `token_ids` or by a recipe's ``tokenize``, which ensure these properties.
    """

    tokens: Int[Tensor, "prompt position"]
    mask: Bool[Tensor, "prompt position"]
    bos: str
    source: str
    strings: list[list[str]] | None = None
    seed: int | None = None

    def __len__(self) -> int:
        """Number of prompts."""
        return self.tokens.shape[0]

    def __repr__(self) -> str:
        low, high = int(self.lengths.min()), int(self.lengths.max())
        length = f"{high} tokens each" if low == high else f"{low} to {high} tokens"
        prompts = "1 prompt" if len(self) == 1 else f"{len(self)} prompts"
        return f"Texts({self.source!r}: {prompts}, {length}, BOS {self.bos})"

    @property
    def lengths(self) -> Int[Tensor, "prompt"]:
        """Number of real tokens of each prompt [prompt]."""
        return self.mask.sum(1)

    def right_padded(self) -> Texts:
        """The prompts with padding on the right, as wide as the longest prompt."""
        positions = torch.arange(int(self.lengths.max()), device=self.mask.device)
        mask = positions < self.lengths[:, None]
        tokens = self.tokens.new_zeros(mask.shape)
        tokens[mask] = self.tokens[self.mask]  # both masks are in row-major order
        return dataclasses.replace(self, tokens=tokens, mask=mask)

    def left_padded(self) -> Texts:
        """The prompts with padding on the left, as wide as the longest prompt."""
        mask = self.right_padded().mask.flip(1)
        tokens = self.tokens.new_zeros(mask.shape)
        tokens[mask] = self.tokens[self.mask]
        return dataclasses.replace(self, tokens=tokens, mask=mask)

    def tokenize(self, model: Any) -> Texts:
        """Check the prompts against `model`, and add the text of their tokens.

        Args:
            model: anything with ``.cfg`` and, for the strings, ``.tokenizer``.

        Raises:
            TextError: if ids are outside the model's vocabulary, or a prompt exceeds its context.
        """
        d_vocab, n_ctx = vocabulary_size(model), context_size(model)
        bad = (self.tokens < 0) if d_vocab is None else (self.tokens < 0) | (self.tokens >= d_vocab)
        if bad.any():
            prompt, position = (int(index) for index in bad.nonzero()[0])
            raise TextError(
                f"Token id {int(self.tokens[prompt, position])} at prompt {prompt}, position "
                f"{position} is out of range: this model's ids run from 0 to "
                f"{'its vocabulary' if d_vocab is None else d_vocab - 1}."
            )
        check_length(int(self.lengths.max()), n_ctx)
        strings, tokenizer = self.strings, getattr(model, "tokenizer", None)
        if bool(self.mask.all()):
            _warn_of_padding(self.tokens, tokenizer)
        if strings is None and tokenizer is not None:
            strings = token_strings(tokenizer, self.tokens, self.mask)
        return dataclasses.replace(self, strings=strings)


def token_ids(
    ids: Sequence[Sequence[int] | Tensor | np.ndarray] | Tensor | np.ndarray,
    mask: Sequence[Sequence[bool | int]] | Tensor | np.ndarray | None = None,
) -> Texts:
    """Exact token ids; nothing is added to them.

    Args:
        ids: one list of ids per prompt (lengths may differ), or a tensor or array [prompt
            position].
        mask: whether a position is real [prompt position], for ids that are padded already.

    Returns:
        The prompts; ragged lists are padded on the right.

    Raises:
        TextError: if there are no ids, ids are not integers, a prompt has no token, or the mask has
            another shape or padding between tokens.
    """
    return exact(ids, mask, "token ids")


def exact(ids: Any, mask: Any, source: str) -> Texts:
    """`token_ids` with all inputs checked."""
    if isinstance(ids, Mapping) and "input_ids" in ids:
        raise TextError(
            f"Token ids should be only the ids, not a {type(ids).__name__}; for the output of a "
            'tokenizer, pass token_ids(x["input_ids"], x["attention_mask"]).'
        )
    if isinstance(ids, np.ndarray):
        ids = _tensor(ids)
    if isinstance(ids, Tensor):
        tokens, real = ids, torch.ones_like(ids, dtype=torch.bool)
    else:
        rows = _rows(ids)
        if mask is not None and len({len(row) for row in rows}) > 1:
            raise TextError("A mask needs ids of equal length; leave it out for ragged lists.")
        tokens, real = pack(rows)
    if mask is not None:
        real = _mask(mask).to(tokens.device)
    _check_tensors(tokens, real)
    tokens = torch.where(real, tokens.long(), 0)  # masked ids may be anything, such as -100
    return Texts(tokens, real, bos="as given", source=source)


def read_token_ids(path: str | Path) -> Texts:
    """Exact token ids from a JSON file with a list of lists of integers.

    Args:
        path: path of the file.

    Returns:
        The prompts; nothing is added to them.

    Raises:
        TextError: if the file cannot be read or has other content.
    """
    path = validation.path("path", path, error=TextError)
    text = read_text(path)
    try:
        ids = json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, a number too long, nested too deeply
        raise TextError(f"{path} cannot be read as JSON: {error}.") from error
    try:
        return exact(ids, None, path.name)
    except TextError as error:
        raise TextError(f"{path}: {error}") from error


def pack(
    rows: Sequence[Sequence[int]],
) -> tuple[Int[Tensor, "prompt position"], Bool[Tensor, "prompt position"]]:
    """Pack rows of ids into one right-padded tensor, with the mask of real positions."""
    longest = max((len(row) for row in rows), default=0)
    tokens = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.bool)
    for index, row in enumerate(rows):
        tokens[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[index, : len(row)] = True
    return tokens, mask


def token_strings(tokenizer: Any, tokens: Tensor, mask: Tensor) -> list[list[str]]:
    """The text of every real token, spaces included, prompt by prompt."""
    rows = [row[real].tolist() for row, real in zip(tokens.cpu(), mask.cpu(), strict=True)]
    ids = sorted({id for row in rows for id in row})
    text = {
        id: _token_text(tokenizer, id, piece)
        for id, piece in zip(ids, tokenizer.convert_ids_to_tokens(ids), strict=True)
    }
    return [[text[id] for id in row] for row in rows]


def context_size(model: Any) -> int | None:
    """Longest context of the model in positions, None if it states none."""
    return getattr(model.cfg, "n_ctx", None) or None


def vocabulary_size(model: Any) -> int | None:
    """Number of rows of the model's embedding, None if it states none."""
    size = getattr(model.cfg, "d_vocab", None)
    return size if size and size > 0 else None


def check_length(length: int, n_ctx: int | None) -> None:
    """Refuse lengths beyond the model's context."""
    if n_ctx is not None and length > n_ctx:
        raise TextError(
            f"{length} tokens are more than the {n_ctx} positions of this model's context; ask "
            f"for a length of {n_ctx} or less."
        )


def check_reached(positions: Iterable[int], texts: Texts) -> None:
    """Refuse sink positions that not every prompt reaches."""
    shortest = int(texts.lengths.min())
    for position in positions:
        if not 0 <= position < shortest:
            raise TextError(
                f"Sink position {position} is outside the shortest prompt, whose positions run "
                f"from 0 to {shortest - 1}."
            )


def check_embedded(tokens: Tensor, d_vocab: int | None, tokenizer: Any) -> None:
    """Refuse ids from a tokenizer for which the model's embedding has no row."""
    if d_vocab is None or not bool((beyond := tokens >= d_vocab).any()):
        return
    id = int(tokens[beyond][0])
    text = "" if tokenizer is None else f" ({_token_text(tokenizer, id, None)!r})"
    raise TextError(
        f"The tokenizer gives the id {id}{text}, but this model's embedding has the rows 0 to "
        f"{d_vocab - 1}; load the tokenizer that belongs to it, or add the rows with "
        "model.resize_token_embeddings(len(tokenizer)) before loading it."
    )


def _warn_of_padding(tokens: Int[Tensor, "prompt position"], tokenizer: Any) -> None:
    """Warn if prompts without a mask begin or end with what looks like padding.

    This is the tokenizer's padding token; if that also serves as BOS or EOS, or there is no
    tokenizer (then it is 0), it must occur at least twice.
    """
    pad = getattr(tokenizer, "pad_token_id", None)
    if tokenizer is not None and pad is None:
        return
    others = [getattr(tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "unk")]
    twice = tokenizer is None or pad in others
    is_pad = tokens == (0 if pad is None else pad)
    ends = is_pad[:, :2], is_pad[:, -2:]
    padded = [
        (end.all(1) if twice else end[:, index]) for end, index in zip(ends, (0, -1), strict=True)
    ]
    mixed = ~is_pad.all(1)
    for side, rows in zip(("begin", "end"), padded, strict=True):
        if count := int((rows & mixed).sum()):
            warnings.warn(
                f"{counted(count, 'prompt')} of exact token ids {side}{'s' * (count == 1)} with "
                "what looks like padding, which is measured like any token; pass "
                "token_ids(ids, attention_mask) to leave it out.",
                SinkscopeWarning,
                stacklevel=3,
            )


def _token_text(tokenizer: Any, id: int, piece: str | None) -> str:
    if piece is None:  # a row of the embedding that the tokenizer does not use
        return f"<{id}>"
    if piece.startswith("▁"):  # SentencePiece drops the space when decoding a single token
        return piece.replace("▁", " ")
    return tokenizer.decode([id], clean_up_tokenization_spaces=False)


def _tensor(ids: np.ndarray) -> Tensor:
    """Copy integers of any width, byte order and strides to a tensor."""
    if ids.dtype.kind not in "iu":
        raise TextError(f"Token ids should be integers, not {ids.dtype}.")
    return torch.from_numpy(ids.astype(np.int64, order="C"))


def _rows(ids: Any) -> list[list[int]]:
    """`ids` as rows of plain integers."""
    rows: list[Any] = list(ids) if isinstance(ids, list | tuple) else [None]
    rows = [row.tolist() if isinstance(row, np.ndarray | Tensor) else row for row in rows]
    if rows and all(isinstance(row, int | np.integer) for row in rows):
        raise TextError(
            "Token ids should be a list of lists of integers, one list a prompt; these are the "
            f"ids of a single prompt, so put them into a list: [{shown(rows, 30)}]."
        )
    if not all(isinstance(row, list | tuple) for row in rows):
        raise TextError("Token ids should be a list of lists of integers, one list a prompt.")
    if wrong := [id for row in rows for id in row if not _is_whole(id)]:
        raise TextError(
            f"Token ids should be integers, not {shown(wrong[0])}; text goes to texts() or --texts."
        )
    if not all(-(2**63) <= id < 2**63 for row in rows for id in row):
        raise TextError("A token id is out of range: it does not fit into 64 bits.")
    return [[int(id) for id in row] for row in rows]


def _is_whole(id: Any) -> bool:
    return type(id) is int or isinstance(id, np.integer)


def _mask(mask: Any) -> Bool[Tensor, "..."]:
    """`mask` as a tensor of True and False."""
    try:
        real = torch.as_tensor(mask)
    except (RuntimeError, TypeError, ValueError):
        raise TextError(
            "A mask should be lists of True and False, one list a prompt and all of equal length."
        ) from None
    if not ((real == 0) | (real == 1)).all():
        raise TextError("A mask must be True for real tokens and False for padding.")
    return real.bool()


def _check_tensors(tokens: Tensor, mask: Tensor) -> None:
    if tokens.ndim != 2:
        raise TextError(
            f"Token ids should be [prompt position], but have the shape {tuple(tokens.shape)}; "
            "a prompt alone is ids[None]."
        )
    if tokens.shape != mask.shape:
        raise TextError(
            f"Tokens and mask should both be [prompt position], but have the shapes "
            f"{tuple(tokens.shape)} and {tuple(mask.shape)}."
        )
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise TextError(f"Token ids should be integers, not {tokens.dtype}.")
    if tokens.shape[0] == 0 or not mask.any(1).all():
        empty = "there are none" if tokens.shape[0] == 0 else "one has no token"
        raise TextError(f"Prompts should have at least one token each, but {empty}.")
    # Contiguous real tokens at one end give at most one change along a row.
    changes = (mask[:, 1:] != mask[:, :-1]).sum(1)
    if (changes > 1).any():
        prompt = int((changes > 1).nonzero()[0])
        raise TextError(
            f"The mask of prompt {prompt} has padding between or on both sides of its tokens; pad "
            "on one side."
        )

"""A character tokenizer for toy models, so that they can run on any text."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sinkscope.bb.task import BigramBackcopy

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS, DELIMITER = "<s>", "<d>"


def make_tokenizer(task: BigramBackcopy) -> PreTrainedTokenizerFast | None:
    """Make a tokenizer with a token per character and BOS in front; None for symbols without text.

    Unknown characters become the delimiter, which the task never emits and on which the model was
    therefore not trained.
    """
    if task.source.symbols is None or any(len(symbol) != 1 for symbol in task.source.symbols):
        return None
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {symbol: i for i, symbol in enumerate(task.source.symbols)}
    ids |= {BOS: task.bos_id, DELIMITER: task.delimiter_id}
    characters = Tokenizer(models.WordLevel(ids, unk_token=DELIMITER))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    characters.post_processor = processors.TemplateProcessing(
        single=" ".join([BOS] * task.bos + ["$A"]), special_tokens=[(BOS, task.bos_id)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=characters,
        bos_token=BOS,
        unk_token=DELIMITER,
        pad_token=DELIMITER,
        clean_up_tokenization_spaces=False,
    )
    # TransformerLens reloads a tokenizer by name to make it prepend BOS; this one has no name to
    # reload and prepends BOS already.
    tokenizer.name_or_path = ""
    tokenizer.init_kwargs |= {"name_or_path": "", "add_bos_token": True}
    return tokenizer

from .replace import ReplaceEnd as ReplaceEnd
from .replace import ReplaceStart as ReplaceStart
from .texts import long_text as long_text
from .texts import random_tokens as random_tokens
from .texts import repeated_tokens as repeated_tokens
from .tokens import Texts as Texts
from .tokens import read_token_ids as read_token_ids
from .tokens import token_ids as token_ids

__all__ = [
    "random_tokens",
    "repeated_tokens",
    "long_text",
    "Texts",
    "token_ids",
    "read_token_ids",
    "ReplaceEnd",
    "ReplaceStart",
]

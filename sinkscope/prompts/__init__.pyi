from .texts import random_tokens as random_tokens
from .texts import repeated_tokens as repeated_tokens
from .texts import long_text as long_text
from .tokens import Texts as Texts
from .tokens import token_ids as token_ids
from .tokens import read_token_ids as read_token_ids
from .replace import ReplaceEnd as ReplaceEnd
from .replace import ReplaceStart as ReplaceStart

"""Token ids folded by what they say: case, accents, compatibility forms and runs of spaces make no difference.

Engram (DeepSeek-V4.1) hashes these folded ids instead of token ids. Ids are numbered in the order in which their text
is first seen; text that is not whole UTF-8 stands for itself. Source: DeepSeek-V4.1-Flash, inference/engram.py.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.tokenizer import Tokenizer

SPACE = "\ue000"  # stands for a text that is one space while spaces at the ends are stripped
BROKEN = "\ufffd"


@lru_cache(maxsize=4)
def token_map(folder: Path, expected: int) -> Tensor:
    """int64 (tokens,): the folded id of each token id of the tokenizer in `folder`.

    Raises DscError where there are not `expected` different ones: another map would look up other rows without a sign.
    """
    tokenizer, fold = Tokenizer(folder), _folding()
    known: dict[str, int] = {}
    found = []
    for index in range(tokenizer.vocab_size):
        text = tokenizer.decode([index], skip_special=False)
        key = (tokenizer.token(index) or "") if BROKEN in text else (fold.normalize_str(text) or text)
        found.append(known.setdefault(key, len(known)))
    if len(known) != expected:
        raise DscError(
            f"{folder / 'tokenizer.json'}: {len(known)} tokens differ beyond case, accents and spaces, config.json "
            f"says engram_compressed_vocab_size {expected}",
            "give the tokenizer.json of this checkpoint",
        )
    return torch.tensor(found)


def _folding() -> Any:  # a class of the library, which has no types
    from tokenizers import Regex, normalizers

    return normalizers.Sequence(
        [
            normalizers.NFKC(),
            normalizers.NFD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[ \t\r\n]+"), " "),
            normalizers.Replace(Regex("^ $"), SPACE),
            normalizers.Strip(),
            normalizers.Replace(SPACE, " "),
        ]
    )

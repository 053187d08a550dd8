"""The public text of the benchmark's own mixture-of-experts model: GSM8K's training problems, WikiText-2's validation.

The last tenth of each file is held out: the model is neither trained on it nor calibrated on it.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from benchmarks.common import DATA

GSM8K, WIKITEXT = DATA / "gsm8k.train.jsonl", DATA / "wt2.valid.txt"
HELD = 0.1
BOS, EOS = "<bos>", "<eos>"  # ids 0 and 1


def documents() -> dict[str, list[str]]:
    """Documents of each file, in its order: a problem with its answer; an article."""
    for file in (GSM8K, WIKITEXT):
        if not file.exists():
            raise SystemExit(f"{file}: no such file; put GSM8K's training set and WikiText-2's validation text there")
    problems = [json.loads(line) for line in GSM8K.read_text(encoding="utf-8").splitlines()]
    return {
        "gsm8k": [f"{problem['question']}\n{problem['answer']}\n" for problem in problems],
        "wikitext": articles(WIKITEXT.read_text(encoding="utf-8")),
    }


def articles(text: str) -> list[str]:
    """WikiText's articles: a line ` = Title = ` between two blank lines opens one."""
    found: list[list[str]] = [[]]
    lines = text.splitlines(keepends=True)
    for index, line in enumerate(lines):
        blank = all(not near.strip() for near in (*lines[max(0, index - 1) : index], *lines[index + 1 : index + 2]))
        if blank and line.startswith(" = ") and not line.startswith(" = = ") and found[-1]:
            found.append([])
        found[-1].append(line)
    return ["".join(article) for article in found]


def split(parts: list[str]) -> tuple[list[str], list[str]]:
    """(to learn from, held out): whole documents; the held ones have at least `HELD` of the characters."""
    left = HELD * sum(map(len, parts))
    cut = len(parts)
    while left > 0:
        cut -= 1
        left -= len(parts[cut])
    return parts[:cut], parts[cut:]


def train_tokenizer(texts: list[str], vocabulary: int, out: Path) -> None:
    """Write a byte-level BPE of `vocabulary` tokens, learnt from `texts`, as tokenizer.json with its config."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator(texts, trainer)
    words.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")


def stream(texts: list[str], tokenizer: Path, seed: int) -> np.ndarray:
    """int64 (tokens,): the documents in an order drawn from `seed`, each between BOS and EOS."""
    from tokenizers import Tokenizer

    words = Tokenizer.from_file(str(tokenizer))
    order = np.random.default_rng(seed).permutation(len(texts))
    encoded = words.encode_batch([texts[index] for index in order], add_special_tokens=False)
    bos, eos = words.token_to_id(BOS), words.token_to_id(EOS)
    return np.concatenate([np.array([bos, *one.ids, eos], np.int64) for one in encoded])

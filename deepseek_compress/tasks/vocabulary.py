"""The closed vocabulary of the built-in tasks: 512 words, separated by spaces, digits as tokens of their own.

`4 7` is the number forty-seven. A word that is not in the list becomes `<unk>`. `build_tokenizer` writes the
Hugging Face files that transformers and serving engines load; a text is prefixed with `<bos>`.
"""

from __future__ import annotations

import json
from pathlib import Path

SIZE = 512
PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
THINK, END_THINK = "<think>", "</think>"
SPECIAL = (PAD, BOS, EOS, UNK)

SYMBOLS = [THINK, END_THINK, *". , ; : ? = + - * / > < ( )".split(), *"0123456789"]

NAMES = """anna bob carl dora emil fay gus hana ivan judy kurt lena milo nina otto paula quinn rosa sven tara uma
victor wanda xena yusuf zoe adam bella cyrus dina egon flora greta hugo irene jonas karla leon maria noah olga peter
rita sam tina urs vera willi ximena yara zack alma boris clara david elsa felix gina hans ida jack kim luis mona nils
opal pablo ruth simon thea ugo vito wim yves zelda amir britta""".split()

ITEMS = """apples coins books pens cards stamps shells stones marbles eggs cups plates spoons flowers tickets
buttons pearls nuts plums pears lemons cookies candles bricks nails beads feathers stickers balloons pencils
photos toys seeds ribbons tiles badges maps bottles carrots onions""".split()

THINGS = """key ring letter watch phone knife brush doll ball hat glove scarf lamp clock radio camera wallet stamp
coin pearl medal whistle comb needle pin thread map ticket photo note pen spoon fork cup marble shell stone feather
button nut""".split()

CONTAINERS = """box bag drawer basket chest suitcase jar bucket crate cupboard barrel backpack envelope case tin pouch
trunk locker sack cabinet""".split()

ROOMS = """kitchen garage cellar attic garden office library bedroom bathroom hall shed barn studio workshop balcony
pantry""".split()

#: comparative, its opposite, superlative, the opposite's superlative; the tasks use the first `USED_RELATIONS`
USED_RELATIONS = 4
RELATIONS = [
    ("taller", "shorter", "tallest", "shortest"),
    ("older", "younger", "oldest", "youngest"),
    ("faster", "slower", "fastest", "slowest"),
    ("heavier", "lighter", "heaviest", "lightest"),
    ("richer", "poorer", "richest", "poorest"),
    ("stronger", "weaker", "strongest", "weakest"),
    ("louder", "quieter", "loudest", "quietest"),
    ("warmer", "colder", "warmest", "coldest"),
]

#: relation -> (of a woman, of a man)
KIN = {
    "parent": ("mother", "father"),
    "child": ("daughter", "son"),
    "sibling": ("sister", "brother"),
    "grandparent": ("grandmother", "grandfather"),
    "grandchild": ("granddaughter", "grandson"),
    "great-grandparent": ("great-grandmother", "great-grandfather"),
    "great-grandchild": ("great-granddaughter", "great-grandson"),
    "uncle": ("aunt", "uncle"),
    "nephew": ("niece", "nephew"),
}

DAYS = "monday tuesday wednesday thursday friday saturday sunday".split()

ACTIVITIES = """lesson movie match concert meal walk meeting break show game dance class exam flight trip party lunch
dinner visit race""".split()

WORDS = """start with add subtract multiply by then what is the result has buys finds gets gives loses sells eats more
to from how many do does have now each in of and times plus minus x y a b c d m n times as fewer than they together
run if else repeat print yes no complete f test max min who second than are there today days later which day takes
minutes starts at when end ends puts moves where room some contradiction missing value unknown not after before first
last all both same different put took lost holds another one two three between next left right total sum difference
product half double true false think answer because since so it was were will be can only most least every person
people name number question problem step unit result program function variable""".split()


def words() -> list[str]:
    """Return the 512 words in the order of their ids: special ones first, unused places last."""
    kin = [word for pair in KIN.values() for word in pair]
    relations = [word for row in RELATIONS for word in row]
    groups = (SPECIAL, SYMBOLS, WORDS, NAMES, ITEMS, THINGS, CONTAINERS, ROOMS, relations, kin, DAYS, ACTIVITIES)
    found = list(dict.fromkeys(word for group in groups for word in group))
    return found + [f"<unused{i}>" for i in range(SIZE - len(found))]


def write_tokenizer(folder: Path) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json` into `folder`.

    One word, one token; `<think>` and `</think>` are ordinary words, so that decoding shows them.
    """
    ids = {word: index for index, word in enumerate(words())}
    added = [
        {"id": ids[word], "content": word, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for word in SPECIAL
    ]  # fmt: skip
    document = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": BOS, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                {"SpecialToken": {"id": BOS, "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {BOS: {"id": BOS, "ids": [ids[BOS]], "tokens": [BOS]}},
        },
        "decoder": None,
        "model": {"type": "WordLevel", "vocab": ids, "unk_token": UNK},
    }
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK}
    config = {
        **names,
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "padding_side": "left",
    }
    for name, content in (
        ("tokenizer.json", document),
        ("tokenizer_config.json", config),
        ("special_tokens_map.json", names),
    ):
        (folder / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")

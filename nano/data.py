"""Training rows: problems of the task mix as token ids, alone in a row or packed.

A problem is `<bos> prompt <think> steps </think> answer <eos>`. Half of the batches hold one problem a row, as it is
asked later; the other half hold rows of `PACKED` tokens filled with whole problems, as calibration text is, so that
both kinds of input are what the model knows. Each word carries a weight in the loss: 1 in a solution, `PROMPT_WEIGHT`
in a prompt, 0 in padding.
"""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np

from deepseek_compress import tasks
from deepseek_compress.tasks.vocabulary import BOS, EOS, PAD, words

SINGLE, PACKED = 112, 512  # tokens a row
PROMPT_WEIGHT = 0.1
CHUNK = 2000  # problems made together, by one process from one seed

#: sub-tasks that are learnt late, and the problems of each that every chunk holds on top of the mix
LATE = {
    ("commonsense", "order"): 180, ("commonsense", "kinship"): 220, ("adversarial", "cycle"): 100,
    ("programs", "straight"): 140, ("programs", "branch"): 60, ("programs", "linear"): 60,
}  # fmt: skip

Rows = tuple[np.ndarray, np.ndarray]  # ids int16 (rows, length), weights float16 (rows, length)

_IDS = {word: index for index, word in enumerate(words())}


def encode(text: str) -> list[int]:
    """Words to ids; a word outside the vocabulary is an error."""
    return [_IDS[word] for word in text.split()]


def tokens_of(problem: tasks.Problem) -> tuple[list[int], int]:
    """Return the ids of a problem with its solution, and how many of them belong to the prompt (with `<bos>`)."""
    prompt = [_IDS[BOS], *encode(problem.prompt)]
    return [*prompt, *encode(problem.solution), _IDS[EOS]], len(prompt)


def singles(problems: Sequence[tasks.Problem]) -> Rows:
    """One problem a row, padded to `SINGLE`."""
    return _rows([[tokens_of(problem)] for problem in problems], SINGLE)


def packed(problems: Sequence[tasks.Problem]) -> Rows:
    """As many whole problems a row as fit into `PACKED`."""
    rows: list[list[tuple[list[int], int]]] = [[]]
    free = PACKED
    for problem in problems:
        item = tokens_of(problem)
        if len(item[0]) > free:
            rows.append([])
            free = PACKED
        rows[-1].append(item)
        free -= len(item[0])
    return _rows(rows, PACKED)


def pool(problems: int, seed: int, difficulty: tasks.Difficulty, workers: int) -> tuple[Rows, Rows]:
    """(single rows, packed rows) of the training split, the same whatever `workers` is."""
    job = partial(_chunk, difficulty=difficulty)
    seeds = [seed * 1_000_000 + index for index in range(max(1, problems // CHUNK))]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("forkserver")) as executor:
        parts = list(executor.map(job, seeds, chunksize=8))
    return _join([one for one, _ in parts]), _join([two for _, two in parts])


def _chunk(seed: int, difficulty: tasks.Difficulty) -> tuple[Rows, Rows]:
    problems = tasks.mixture(seed, CHUNK - sum(LATE.values()), "train", difficulty)
    for (family, kind), count in LATE.items():
        problems += tasks.generate(family, seed, count, "train", difficulty, kind)
    random.Random(seed).shuffle(problems)
    half = len(problems) // 2
    return singles(problems[:half]), packed(problems[half:])


def _join(parts: Sequence[Rows]) -> Rows:
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([weights for _, weights in parts])


def _rows(rows: Sequence[Sequence[tuple[list[int], int]]], length: int) -> Rows:
    ids = np.full((len(rows), length), _IDS[PAD], np.int16)
    weights = np.zeros((len(rows), length), np.float16)
    for index, row in enumerate(rows):
        at = 0
        for tokens, prompt in row:
            end = at + len(tokens)
            ids[index, at:end] = tokens
            weights[index, at:end] = 1.0
            weights[index, at : at + prompt] = PROMPT_WEIGHT
            weights[index, at] = 0.0  # <bos> cannot be foreseen
            at = end
    return ids, weights

"""What an embedding and a head on few bits cost: KL of each alone, everything else as it is.

    python -m benchmarks.tables [--cases moe smollm2] [--windows 8] [--samples 16]

Both texts of `benchmarks.accuracy`, its tuning windows; the head's Hessian from the first calibration samples, what the
recipe gives it. A row's bytes are those of the two tables; the bar for a default is a rise of 0.001 nats on both texts.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.cases import Case, case
from benchmarks.common import present
from deepseek_compress.compress import tables
from deepseek_compress.evaluation.divergence import Sample, measure, record
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.evaluation.trace import Trace
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.gptq import Gptq
from deepseek_compress.numerics.hessian import add_gram, mirror
from deepseek_compress.numerics.types import Quantized, Statistics

BAR = 0.001
Variant = tuple[str, str, Quantized | None, Quantized | None]  # embedding and head: how, and their codes
COLUMNS = ("model", "embedding", "head", "tied", "MB", "KL like", "up to", "KL other", "up to ", "passed")


@torch.no_grad()
def hessian(model: Model, subject: Case, samples: int) -> Statistics:
    """Of what the final norm gives on calibration text."""
    total: Tensor | None = None
    tokens = torch.from_numpy(np.load(subject.ids(subject.samples)))[:samples]
    for row in tokens:
        states = model.hidden_states(row[None])[-1]
        total = add_gram(total, model.family.final_hidden(model.cfg, model.top, states)[0])
    assert total is not None
    return Statistics(tokens.numel(), mirror(total))


def variants(model: Model, subject: Case, samples: int) -> list[Variant]:
    """(embedding, head, their codes): rounded to nearest, and the head solved too where it is not tied."""
    names, columns = model.cfg.names, model.cfg.hidden_size
    table = model.weights[names.embedding]
    rounded = {bits: tables.round_rows(table, tables.Embedding(num_bits=bits).rounding(columns)) for bits in (8, 4)}
    found: list[Variant] = [(f"{bits} bits, nearest", "", codes, None) for bits, codes in rounded.items()]
    if model.cfg.tie_word_embeddings:
        return found
    how = tables.Head().rounding(columns)
    solver = tables.solved(how, Gptq())
    assert solver is not None
    solved = tables.solve_rows(model.head, solver, hessian(model, subject, samples))
    found.append(("", "8 bits, nearest", None, tables.round_rows(model.head, how)))
    found.append(("", "8 bits, GPTQ", None, solved))
    return [*found, ("8 bits, nearest", "8 bits, GPTQ", rounded[8], solved)]


def run(name: str, windows: int, samples: int) -> list[list[Any]]:
    """The rows of a model."""
    subject, lines = case(name), []
    model = Model.load(subject.model)
    with tempfile.TemporaryDirectory() as folder:
        judges = [judge(model, subject, kind, windows, Path(folder) / kind) for kind in ("like", "other")]
        for variant in variants(model, subject, samples):
            lines.append(line(name, model, variant, judges))
            print(lines[-1], flush=True)
    return lines


def judge(model: Model, subject: Case, kind: str, windows: int, folder: Path) -> tuple[list[Sample], Trace]:
    """Windows of a text and what the original says to them."""
    texts = [Sample(tokens, 1) for tokens in subject.judging_windows(kind, "tuning")[:windows]]
    folder.mkdir()
    return texts, record(model, texts, folder)[0]


def line(name: str, model: Model, variant: Variant, judges: list[tuple[list[Sample], Trace]]) -> list[Any]:
    """A row of the table."""
    names, (embedding, head, table, top) = model.cfg.names, variant
    weights = dict(model.weights)
    weights |= {} if table is None else {names.embedding: table.dequantize()}
    weights |= {} if top is None else {names.head: top.dequantize()}
    changed, cells = Model(model.family, model.cfg, weights), []
    for texts, trace in judges:
        found = measure(changed, texts, trace)
        assert found.kl is not None
        each = [kl / tokens for kl, tokens in zip(found.kl, found.tokens, strict=True)]
        limits = Bootstrap(len(each)).ratio(each)
        cells += [sum(each) / len(each), limits and limits[1]]
    stored = [(names.embedding, table), *([] if model.cfg.tie_word_embeddings else [(names.head, top)])]
    size = sum(bytes_of(model.weights[key], codes) for key, codes in stored)
    passed = all(value is not None and value <= BAR for value in cells)
    return [name, embedding, head, model.cfg.tie_word_embeddings, size / 1e6, *cells, passed]


def bytes_of(table: Tensor, codes: Quantized | None) -> float:
    """On disk: packed, or 16 bits."""
    return 2.0 * table.numel() if codes is None else sum(part.nbytes for part in tables.stored(codes).values())


def main() -> int:
    """Measure and present."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=["moe", "smollm2"])
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lines = [line for name in options.cases for line in run(name, options.windows, options.samples)]
    present("tables", COLUMNS, lines, {"windows": options.windows, "samples": options.samples, "bar": BAR})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

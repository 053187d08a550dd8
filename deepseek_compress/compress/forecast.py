"""Prediction of a compression's output and costs, from shapes alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from typing import NamedTuple

from deepseek_compress.checkpoint.header import Header, TensorInfo
from deepseek_compress.compress.job import by_input
from deepseek_compress.compress.layout import packed, stored16
from deepseek_compress.compress.row_tables import PIECE as ROW_PIECE
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.compress.tables import PIECE
from deepseek_compress.models import Architecture, Linear, ModelConfig, Role
from deepseek_compress.models.attend import SCORES_AT_ONCE
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.planning.costs import Memory, Work, total
from deepseek_compress.streaming.batches import BATCH_TOKENS
from deepseek_compress.streaming.hidden_store import RESIDENT

HESSIANS = 3  # matrices of the size of a Hessian that factoring it holds at once
COPIES = 3  # of a weight, in float32, that solving it holds at once, with the Hessian and its factor
KEPT = 1.25  # what a worker holds, over what its task does: it keeps freed memory, in pieces
TEXT = 140_000_000  # bytes of the tokeniser's library
WAITING = 64 << 20  # bytes of an unfinished shard in memory
SLOW = 20  # times as long as packing it in one pass takes a weight that is decoded and solved in torch, by experience


class Expected(NamedTuple):
    """Predicted output and costs of a run."""

    header: Header  # of the output
    changed: int  # linears
    bytes: int  # on disk
    memory: Memory
    work: Work
    tasks: Work


def expect(
    architecture: Architecture,
    solver: LinearSolver,
    samples: int,
    length: int,
    tables: Mapping[str, Rtn] = {},
    rows: Mapping[str, Rtn] = {},
) -> Expected:
    """For calibration with `samples` of `length` tokens; no samples: no block is run.

    A change that needs statistics then has them from before. `tables`: embedding and head that change; `rows`:
    Engram tables.
    """
    cfg, header = architecture.cfg, architecture.header
    streamed = {name for name in header.tensors if architecture.family.untouched(name)} | rows.keys()
    tensors = {name: info if name in streamed else stored16(info) for name, info in header.tensors.items()}
    tensors |= {name: packed(tensors[name], rounding) for name, rounding in [*tables.items(), *rows.items()]}
    changed: list[str] = []
    quick: list[str] = []  # those that a data-free run packs in one pass
    costs = [_Block(0, 0, 0, Work(), Work())]
    for block in architecture.blocks:
        wanted = [linear for linear in block.linears if solver.wants(block, linear)]
        for linear in wanted:
            name = f"{block.prefix}{linear.name}.weight"
            weights = solver.quantizer(block, linear, fallback=False)
            if weights is not None:
                tensors[name] = packed(tensors[name], weights)
            if isinstance(weights, Rtn) and weights.num_bits == 4 and solver.sparsity is None:
                quick.append(name)
            changed.append(name)
        if samples:
            paired = "cross_covariance" in solver.needs
            costs.append(calibrated_cost(cfg, block.linears, wanted, samples, length, paired))
    out = dataclasses.replace(header, tensors=tensors)
    if samples:
        embedding = _tables(cfg, tables)
        alone, resident, task = (max(getattr(cost, key) for cost in costs) for key in ("alone", "resident", "task"))
        memory = Memory(TEXT + max(alone, embedding), TEXT + resident, task)
    else:
        saved = bool(solver.needs)
        memory = Memory(
            0, 0, max(_largest(header, changed, quick, saved, streamed), _tables(cfg, tables) if tables else 0)
        )
        solved, once = set(changed) - set(quick), {*quick, *rows}
        works = (tensor_work(info, name in solved, name in once) for name, info in header.tensors.items())
        costs += [_Block(0, 0, 0, Work(), work) for work in works]
        costs += [_Block(0, 0, 0, Work(), saved_work(header.tensors[name])) for name in changed if saved]
    return Expected(
        out, len(changed), out.bytes, memory, total(cost.work for cost in costs), total(cost.tasks for cost in costs)
    )


def _tables(cfg: ModelConfig, changed: Mapping[str, Rtn]) -> int:
    """Bytes of the embedding or the head in 16 bits; of one that changes its codes, packed ones, and what solves it."""
    elements, hidden = cfg.vocab_size * cfg.hidden_size, cfg.hidden_size
    solving = 4 * (COPIES + 5) * min(PIECE, elements) + 4 * (HESSIANS + 12) * hidden**2
    return 2 * elements + (3 * elements + solving if changed else 0)


class _Block(NamedTuple):
    """Of one block: bytes as in `Memory`, and work."""

    alone: int
    resident: int
    task: int
    work: Work
    tasks: Work


def tensor_work(info: TensorInfo, solved: bool, packed: bool) -> Work:
    """Return the work of a tensor where no text is read: decoded and solved, packed in one pass, or copied."""
    return Work(packed=SLOW * info.elements if solved else info.elements if packed else info.bytes / 2)


def saved_work(weight: TensorInfo) -> Work:
    """Return what saved statistics add to it: a factor of its own for each weight, and its solve."""
    rows, k = weight.shape
    return Work(float(k) ** 3 / 3 + float(rows) * k**2, 40.0 * rows * k, float(rows) * k)


def _largest(
    header: Header, changed: Collection[str], quick: Collection[str], saved: bool, streamed: Collection[str]
) -> int:
    """Bytes that the largest tensor takes in a data-free task, with the shard that waits to be written.

    `streamed`: tensors that pass piece by piece.
    """
    kernel, solved, found = set(quick), set(changed), [0]
    for name, info in header.tensors.items():
        if name in streamed:
            found.append(min(4 * ROW_PIECE, 4 * info.elements))
        elif name in solved:
            hessians = 4 * (HESSIANS + 1) * info.shape[1] ** 2 if saved else 0
            here = info.bytes + info.elements if name in kernel else 4 * (COPIES + 1) * info.elements + hessians
            found.append(here)
        elif info.encoding == "fp8_block":
            found.append(info.bytes + 2 * info.elements)
    return WAITING + max(found)


def calibrated_cost(
    cfg: ModelConfig, linears: list[Linear], wanted: list[Linear], samples: int, length: int, paired: bool
) -> _Block:
    """One block whose attention and dense MLPs are solved here, and each routed expert in a task."""
    tokens, models = samples * length, 2 if paired else 1
    experts = [linear for linear in linears if linear.role is Role.EXPERT]
    here = [linear for linear in linears if linear.role is not Role.EXPERT]
    attention = [linear for linear in here if linear.role in (Role.ATTENTION, Role.INDEXER, Role.ENGRAM)]
    scores = 10 * cfg.num_attention_heads * length  # numbers that softmax touches for a token
    alone = 0
    for part in (attention, [linear for linear in here if linear not in attention]):
        activations = 4 * BATCH_TOKENS * (sum(linear.rows for linear in part) + 8 * cfg.hidden_size)
        activations += 12 * min(BATCH_TOKENS * cfg.num_attention_heads * length, SCORES_AT_ONCE)
        alone = max(alone, _solved(part, models, activations * models))
    stores = 4 * min(RESIDENT, 4 * tokens * models * cfg.hidden_size)
    work = _solve_work(here, wanted, tokens, models)
    work = total([work, Work(0, 4.0 * tokens * models * (30 * cfg.hidden_size + scores))])
    if cfg.moe is None or not experts:
        return _Block(alone + stores, stores, 0, work, Work())
    share = tokens * cfg.moe.top_k / cfg.moe.experts
    first = experts[:3]
    activations = 4 * BATCH_TOKENS * models * 3 * (first[0].rows + cfg.hidden_size)
    task = int(KEPT * _solved(first, models, activations))
    results = 2 * sum(linear.rows * linear.columns for linear in first)  # of workers that are ahead, packed
    resident = stores + min(2 * WAITING, 2 * results * cfg.moe.experts) + results + 12 * tokens * models * cfg.moe.top_k
    return _Block(alone + stores, resident, task, work, _solve_work(experts, wanted, share, models))


def _solved(linears: list[Linear], models: int, activations: int) -> int:
    """Bytes while a part is collected on and solved; before its last linear is, the others are freed."""
    first, last = linears[:-1], linears[-1:]
    both = _loaded(linears, models) + max(_solving(first, models), activations)
    return max(both, _loaded(last, models) + _solving(last, models))


def _loaded(linears: list[Linear], models: int) -> int:
    return 4 * models * sum(linear.rows * linear.columns for linear in linears)


def _solving(linears: list[Linear], models: int) -> int:
    """Bytes on top of the weights while the linear that takes most is solved; towards a second model more."""
    crossed = models - 1
    sizes = [(HESSIANS + crossed) * x.columns**2 + crossed * x.rows * x.columns for x in linears]
    sizes += [(2 + crossed) * x.columns**2 + (COPIES + 2 * crossed) * x.rows * x.columns for x in linears]
    # the sums of both halves, a factor, and what a correction from one gives on the other: see `numerics.gptaq`
    sizes += [crossed * (10 * x.columns**2 + 6 * x.rows * x.columns) for x in linears]
    return 4 * max(sizes, default=0)


def _solve_work(linears: list[Linear], wanted: list[Linear], tokens: float, models: int) -> Work:
    """Return the forward, half a product for each Hessian, a factor, and a solve for each weight."""
    names = {linear.name for linear in wanted}
    products = touched = solved = 0.0
    for group in by_input(linears):
        k, rows = float(group[0].columns), sum(linear.rows for linear in group)
        products += 2.2 * tokens * models * k * rows
        touched += 4.0 * tokens * models * (3 * rows + k)
        ours = sum(linear.rows for linear in group if linear.name in names)
        if ours:
            products += (1.1 + 2 * (models - 1)) * tokens * k**2 + k**3 / 3 + ours * k**2
            touched += 40.0 * ours * k
            solved += ours * k
    return Work(products, touched, solved)

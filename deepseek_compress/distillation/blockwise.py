"""Recovery block by block: what may move of one block at a time, until its outputs are the original's again.

For block l with the changed model's stream h as input and the original's h*, what is trained lowers

    sum over tokens of |block_l(h) - block*_l(h*)|^2 / |block*_l(h*)|^2

so a block also makes up for what those before it lost. Each token counts by its error relative to its size, as the norm
of the next block sees it: plain squares would be those of the few tokens whose states are by far the largest. Of packed
weights that is the block-wise training of EfficientQAT (Chen et al. 2024, arXiv 2407.11062, section 3.2), of scales and
norms alone: codes and zero points stay. Of 2:4 weights the values that are left move and the zeros stay, as in EBFT
(Guo et al. 2024, arXiv 2402.12419). It needs neither the logits nor the other blocks: both streams lie in hidden
stores, what is found of a block is kept in the work directory, and an interrupted run goes on at the block where it
stopped. Within a block a packed weight is there only while it is multiplied, forward and again backward, so that a
block of many experts is never in memory either; the 2:4 weights of a block are, with their gradients and moments.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import write_arrays
from deepseek_compress.distillation.recovery import BETAS, Norm, Sparse, by_scale, moved, rate
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, Block, Role
from deepseek_compress.models.weights import Weights
from deepseek_compress.numerics import pattern
from deepseek_compress.numerics.grid import STORED
from deepseek_compress.numerics.types import Quantized
from deepseek_compress.planning.costs import Work
from deepseek_compress.streaming.batches import BATCH_TOKENS, Batches
from deepseek_compress.streaming.hidden_store import RESIDENT, HiddenStore
from deepseek_compress.streaming.loop import Facts, Loop, Progress, Stream, Visit

_Weight = tuple[Tensor, Quantized | None]  # float32 (rows, columns), and where it is packed that


class Schedule(NamedTuple):
    """Training schedule of a block: Adam, its rates what an early step of it changes."""

    passes: int  # over the text
    learning_rate: float  # of scales and norms, relative
    weight_rate: float  # of 2:4 weights, relative to the root mean square of what is kept
    batch_tokens: int | None  # of a step, whole samples; None: as many as a batch has elsewhere


class Models(NamedTuple):
    """The changed checkpoint, the one that it was made of, and what is known of both."""

    changed: Checkpoint
    original: Checkpoint
    work: Path  # hidden stores, and what is found of each block
    device: str = "cpu"

    def found(self, layer: int) -> Path:
        """Return what was trained of block `layer` by its names in the checkpoint."""
        return self.work / f"block-{layer:05d}.npz"


class Found(Mapping[str, Quantized | Tensor]):
    """Recovered tensors of the blocks by name, read on demand: packed weights, and norms as they are stored."""

    def __init__(self, models: Models) -> None:
        self.models = models
        files = sorted(models.work.glob("block-*.npz"))
        self.files = {name: file for file in files for name in np.load(file).files}

    def __getitem__(self, name: str) -> Quantized | Tensor:
        with np.load(self.files[name]) as saved:
            values = torch.from_numpy(saved[name])
        packed = self.models.changed.read_quantized(name)
        return values.to(STORED) if packed is None else packed._replace(scale=values)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def check_trainable(changed: Checkpoint) -> None:
    """Raise DscError where no linear of the first block is packed or 2:4."""
    first = Architecture.of(changed).blocks[0]
    for linear in first.linears:
        name = f"{first.prefix}{linear.name}.weight"
        if changed.header.tensors[name].encoding == "packed" or pattern.holds(changed.read(name)):
            return
    what = (
        f"{changed.path}: neither packed nor 2:4 weights in {first.prefix.rstrip('.')}, so recover has nothing to train"
    )
    raise DscError(what, "put a compress stage before it")


def recover_blocks(models: Models, tokens: Tensor, schedule: Schedule, *, seed: int, progress: Progress) -> list[Facts]:
    """Train every block on tokens int64 (samples, length); what is found lies in `models.found(layer)`.

    Returns for each block the relative squared error of its output for a token of one batch, before and after. The
    same arguments give the same bits. Raises DscError where the two do not embed text alike.
    """
    sides = {"ours": models.changed, "theirs": models.original}
    streams = tuple(Stream(Architecture.of(source, models.device), side) for side, source in sides.items())
    loop = Loop(streams, tokens, models.work, "block", "scales of block", last=True)
    seen: list[Tensor] = []

    def begin(stream: Stream, store: HiddenStore) -> None:
        loop.embed(stream, store)
        seen.append(store.read(0, tokens.shape[1]).clone())
        if len(seen) > 1 and not torch.allclose(seen[0], seen[1], rtol=0.02, atol=1e-3 * float(seen[1].abs().max())):
            what = f"{models.changed.path}: embeds text otherwise than {models.original.path}"
            raise DscError(f"{what}, so no hidden state compares", "leave by_block out, or the rotation")

    return loop.run(_Recover(models, schedule, seed), progress, begin=begin)


@dataclass(frozen=True)
class _Recover:
    """Trains each block of the first stream towards the second's."""

    models: Models
    schedule: Schedule
    seed: int

    def visit(self, at: Visit) -> Facts:
        """{"before", "after"}: relative squared errors."""
        order = torch.Generator().manual_seed(self.seed * 10_007 + at.layer)
        trained = _Block(self.models, at)
        facts = trained.train(self.schedule, order)
        trained.save(self.models.found(at.layer))
        return facts


def cost(header: Header, tokens: int, length: int, passes: int) -> tuple[int, Work]:
    """Bytes and work for `tokens` of text in samples of `length`: one block's codes that every token uses, what is
    trained of it, a weight and its gradient, and what a batch leaves for the backward pass. Where nothing is packed,
    all linears count as 2:4: values, gradients and two moments."""
    architecture = Architecture.of(header)
    packed = any(info.encoding == "packed" for info in header.tensors.values())
    cfg = architecture.cfg
    share = 1.0 if cfg.moe is None else cfg.moe.top_k / cfg.moe.experts
    batch = max(length, BATCH_TOKENS)
    most, products, touched = 2 * cfg.vocab_size * cfg.hidden_size, 0.0, 0.0
    for block in architecture.blocks:
        sizes = {linear: linear.rows * linear.columns for linear in block.linears}
        active = {linear: share if linear.expert is not None else 1.0 for linear in sizes}
        codes = sum(size for linear, size in sizes.items() if linear.expert is None)
        trained = 0 if packed else 16 * sum(sizes.values())
        groups = sum(_groups(header, f"{block.prefix}{linear.name}.weight") for linear in sizes)
        kept = 20 * cfg.hidden_size + sum(2 * (x.rows + x.columns) * part for x, part in active.items())
        scores = batch * cfg.num_attention_heads * length
        most = max(most, int(trained + codes + 24 * groups + 16 * max(sizes.values()) + 4 * batch * kept + 12 * scores))
        products += 2.2 * sum(size * active[linear] for linear, size in sizes.items())
        touched += 8 * kept + 40 * cfg.num_attention_heads * length
    runs = 2 + 3 * passes  # the original and the trained block once, and a pass forward and backward
    stores = 4 * min(RESIDENT, 4 * tokens * cfg.hidden_size)
    return most + stores, Work(products * runs * tokens, touched * runs * tokens)


def _groups(header: Header, name: str) -> int:
    place = header.tensors[name].parts.get("weight_scale")
    return 0 if place is None else math.prod(place.shape)


class _Block:
    """One block of both models and what is trained of it."""

    def __init__(self, models: Models, at: Visit) -> None:
        self.models, self.at, self.batches = models, at, at.batches
        self.block, self.original = at.blocks
        source, self.prefix = models.changed, self.block.prefix
        names = [self.prefix + name for name in self.block.tensors]
        apart = {f"{linear.name}.weight" for linear in self.block.linears if linear.expert is not None}
        self.scales: dict[str, Tensor] = {}
        self.resident: dict[str, Quantized] = {}  # what every token uses; an expert is read when it is used
        for name in names:
            if (packed := source.read_quantized(name)) is not None:
                packed = packed.to(models.device)
                self.scales[name] = packed.scale
                if name.removeprefix(self.prefix) not in apart:
                    self.resident[name] = packed
        self.changes = {name: torch.zeros_like(scale).requires_grad_() for name, scale in self.scales.items()}
        self.norms = {
            name: Norm(source.read(name, device=models.device))
            for name in names
            if self.block.family.role(name) is Role.NORM
        }
        plain = (f"{self.prefix}{linear.name}.weight" for linear in self.block.linears)
        read = ((name, source.read(name, device=models.device)) for name in plain if name not in self.scales)
        self.sparse = {name: Sparse(weight) for name, weight in read if pattern.holds(weight)}

    def train(self, schedule: Schedule, order: torch.Generator) -> Facts:
        """Fill the outputs with what the trained and the original block make of their inputs."""
        before, after = self.at.before, self.at.after
        self._advance(self.original, self.original.weights(), before[1], after[1])
        adam = self._adam(schedule)
        rates = [group["lr"] for group in adam.param_groups]
        batches = Batches(self.batches.tokens, device=self.batches.device, size=schedule.batch_tokens)
        steps = [i for _ in range(schedule.passes) for i in torch.randperm(len(batches), generator=order).tolist()]
        weights, first = _Trained(self), math.nan
        for step, batch in enumerate(steps):
            target = batches.read(after[1], batch)
            error = self.block.run(weights, batches.read(before[0], batch), batches.ids(batch)) - target
            error.backward(error.detach() / _size(target))  # type: ignore[no-untyped-call]
            first = _relative(error.detach(), target) if step == 0 else first
            for group, most in zip(adam.param_groups, rates, strict=True):
                group["lr"] = most * rate(step, len(steps))
            adam.step()
            adam.zero_grad()
            for norm in self.norms.values():
                norm.refresh()
        for weight in self.sparse.values():
            weight.settle()
        self._advance(self.block, weights, before[0], after[0])
        target = batches.read(after[1], steps[0])
        return {"before": first, "after": _relative(batches.read(after[0], steps[0]) - target, target)}

    def _adam(self, schedule: Schedule) -> torch.optim.Adam:
        """Over what is trained, each group at its rate."""
        relative = [*self.changes.values(), *(norm.change for norm in self.norms.values())]
        groups = [{"params": relative, "lr": schedule.learning_rate}]
        sparse = self.sparse.values()
        groups += [{"params": [part.weight], "lr": schedule.weight_rate * part.size} for part in sparse]
        return torch.optim.Adam(groups, betas=BETAS)

    def save(self, path: Path) -> None:
        """Write the values that will be stored."""
        found = {name: moved(scale, self.changes[name]) for name, scale in self.scales.items()}
        found |= {name: norm.result().float() for name, norm in self.norms.items()}
        found |= {name: part.weight.detach() for name, part in self.sparse.items()}
        write_arrays(path, {name: values.cpu() for name, values in found.items()})

    def packed(self, name: str) -> Quantized | None:
        """Return a packed weight with its scales as they are now; None for any other."""
        found = self.resident.get(name)
        if found is None and (read := self.models.changed.read_quantized(name)) is not None:
            found = read.to(self.models.device)
        return found and found._replace(scale=moved(self.scales[name], self.changes[name]))

    @torch.no_grad()
    def _advance(self, block: Block, weights: Weights, before: HiddenStore, after: HiddenStore) -> None:
        self.batches.advance(block, weights, before, after)


def _size(target: Tensor) -> Tensor:
    """Mean square of each token's state: (n, length, ...) -> (n, length, 1, ...), above zero."""
    size = target.square().mean(tuple(range(2, target.dim())), keepdim=True)
    return size + 1e-6 * size.mean()


def _relative(error: Tensor, target: Tensor) -> float:
    """Of the mean token."""
    return float((error.square() / _size(target)).mean())


class _Trained:
    """The tensors of a block under training, as `Weights`."""

    def __init__(self, block: _Block) -> None:
        self.block = block
        self.source = block.models.changed

    def __getitem__(self, name: str) -> Tensor:
        """Return a norm that is trained, or a tensor that is not."""
        full = self.block.prefix + name
        if full in self.block.sparse:
            return self.block.sparse[full].weight
        if full in self.block.norms:
            return self.block.norms[full].weight
        return self.source.read(full, device=self.block.models.device)

    def __contains__(self, name: str) -> bool:
        return self.block.prefix + name in self.source.header.tensors

    def rows(self, name: str, places: Tensor) -> Tensor:
        """Return the rows `places` (n,) of a tensor: (n, columns)."""
        return self.source.read_rows(self.block.prefix + name, places, torch.float32, self.block.models.device)

    def linear(self, name: str, x: Tensor) -> Tensor:
        """x (..., columns) -> (..., rows)."""
        full = f"{self.block.prefix}{name}.weight"
        change, start = self.block.changes.get(full), self.block.scales.get(full)
        out: Tensor
        if full in self.block.sparse:
            out = functional.linear(x, self.block.sparse[full].weight)
        else:
            out = _Linear.apply(x, change, start, partial(self._weight, full))  # type: ignore[no-untyped-call]
        return out + self[name + ".bias"] if name + ".bias" in self else out

    def _weight(self, full: str) -> _Weight:
        packed = self.block.packed(full)
        if packed is None:
            return self.source.read(full, device=self.block.models.device), None
        return packed.dequantize(), packed


class _Linear(torch.autograd.Function):
    """x W^T; W is made when it is multiplied, and again for the gradients."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, change: Tensor | None, start: Tensor | None, weight: Callable[[], _Weight]
    ) -> Tensor:
        """x (..., columns), change and start (rows, groups) -> (..., rows)."""
        ctx.save_for_backward(x, start)
        ctx.weight = weight
        return functional.linear(x, weight()[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        """By x and by change."""
        (x, start), (gradient,) = ctx.saved_tensors, gradients
        weight, packed = ctx.weight()
        onward = gradient @ weight if ctx.needs_input_grad[0] else None
        del weight
        if packed is None:
            return onward, None, None, None
        return onward, by_scale(gradient.flatten(0, -2).t() @ x.flatten(0, -2), packed, start), None, None

"""Divergence of next-token distributions from the reference's, and perplexity of both on a text.

With p the reference's and q the model's distribution after the same tokens, per predicted position:

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      nats
    top-1      = [argmax p = argmax q]
    perplexity = exp(mean of -log q(token that follows))

Distributions are computed in float64 from float32 logits, a few thousand rows at a time, so that the largest
vocabulary fits. The reference runs once: what enters its head is spooled to a folder, its head stays in memory, and
its logits are computed again with each model's. From the same pass comes the error by layer, ||h - h'|| / ||h||
over all tokens of the batches that were kept, h the hidden state after a block.

Left out: nothing is sampled and no position is skipped; padding is at the right, where causal attention never sees it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import read_bytes
from deepseek_compress.checkpoint.reader import check_finite
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.statistics import safe_exp
from deepseek_compress.evaluation.trace import Trace
from deepseek_compress.models import moe
from deepseek_compress.models.tap import tapped
from deepseek_compress.models.two_level import shared
from deepseek_compress.models.weights import Weights
from deepseek_compress.numerics.channel_error import ChannelError, Outliers
from deepseek_compress.numerics.expert_choice import Choices, ExpertChoice
from deepseek_compress.streaming.head import HeadInput, Scores, scores

if TYPE_CHECKING:
    from deepseek_compress.models.runtime import Model
    from deepseek_compress.models.tokenizer import Tokenizer

Number = TypeVar("Number", int, float)

BATCH_TOKENS = 4096  # tokens in a forward pass: bounds the hidden states of all blocks
ROWS = 64  # positions whose whole distributions are in memory
LAYER_TOKENS = 4096  # the error by layer needs every block's output; this many tokens tell it well


class Sample(NamedTuple):
    """A stretch of tokens; those from index `start` on are predicted from the ones before."""

    tokens: list[int]
    start: int

    @property
    def predicted(self) -> int:
        """Number of predicted tokens."""
        return len(self.tokens) - self.start


class Positions(NamedTuple):
    """Every predicted position by itself, in the order in which batches were run."""

    kl: list[float]  # nats
    entropy: list[float]  # of the reference's prediction, nats
    sample: list[int]
    place: list[int]  # of the predicted token in its sample


@dataclass(frozen=True)
class Divergence:
    """Sums per sample, in the order of the samples; the reference's parts are None without a reference."""

    tokens: list[int]  # predicted
    nll: list[float]  # negative log-likelihood, nats
    kl: list[float] | None = None
    agreed: list[int] | None = None  # positions with the reference's most likely token
    error_by_layer: list[float] | None = None
    positions: Positions | None = None
    choice_by_layer: list[float | None] | None = None  # share of the reference's chosen entries; None: none are chosen
    outliers_by_layer: list[Outliers | None] | None = None
    experts_by_layer: list[Choices | None] | None = None  # None: a block without experts, another number of them

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per predicted token; infinite where it overflows."""
        return safe_exp(math.fsum(self.nll) / sum(self.tokens))

    @property
    def kl_divergence(self) -> float | None:
        """Nats per predicted token."""
        return None if self.kl is None else math.fsum(self.kl) / sum(self.tokens)

    @property
    def top1_agreement(self) -> float | None:
        """A fraction."""
        return None if self.agreed is None else sum(self.agreed) / sum(self.tokens)


def text_windows(path: Path, tokenizer: Tokenizer, windows: int, length: int) -> list[Sample]:
    """Window i of a text is its tokens [i * length, (i + 1) * length).

    The text is tokenised once, without special tokens. Raises `DscError` for an unreadable file and for a text that
    is too short.
    """
    if windows < 1 or length < 2:
        raise DscError(f"{windows} windows of {length} tokens", "ask for at least 1 window of at least 2 tokens")
    try:
        text = read_bytes(path, limits.TEXT_BYTES).decode("utf-8")
    except UnicodeDecodeError:
        raise DscError(f"{path}: not UTF-8 text", "give a text file") from None
    ids: list[int] = []
    for piece in tokenizer.encoded(text, limits.WINDOW_PIECE):
        ids += piece
        if len(ids) >= windows * length:
            break
    if len(ids) < windows * length:
        raise DscError(
            f"{path}: {len(ids)} tokens make {len(ids) // length} windows of {length}, {windows} are asked for",
            "give a longer text, fewer windows or a smaller length",
        )
    return [Sample(ids[i * length : (i + 1) * length], 1) for i in range(windows)]


def batches(samples: Sequence[Sample], limit: int = BATCH_TOKENS) -> list[list[int]]:
    """Return indices of samples that run together: of similar length, at most `limit` tokens with their padding."""
    found: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i)):
        width = len(samples[index].tokens)
        if found and (len(found[-1]) + 1) * width <= limit:
            found[-1].append(index)
        else:
            found.append([index])
    return found


@torch.no_grad()
def record(model: Model, samples: Sequence[Sample], folder: Path) -> tuple[Trace, Divergence]:
    """Run the reference once: its trace, and its own perplexity (its KL to itself is 0 and its agreement 1).

    Disk: 4 bytes x predicted tokens x hidden size, and the blocks' outputs for the first `LAYER_TOKENS` tokens.
    """
    check(samples, len(model.head))
    trace = Trace(folder, model.head, batches(samples), (model.cfg.num_hidden_layers, model.cfg.hidden_size))
    nll, compared = [0.0] * len(samples), layered(samples)
    for number, chosen in enumerate(trace.batches):
        batch = _batch(samples, chosen, model.head.device)
        states, experts = _pass(model, batch, chosen[0] in compared)
        hidden = _head_input(model, states[-1], batch)
        np.save(folder / f"final-{number}.npy", _numpy(hidden))
        if chosen[0] in compared:
            trace.keep_experts(number, experts)
            np.save(folder / f"blocks-{number}.npy", _blocks(model, states, batch.valid))
            trace.layered = number + 1
            trace.keep_choices(number, choices(model, states, batch.valid))
        _add(nll, batch.owner, scores([HeadInput.of(hidden, model.head)], batch.following).nll[0].tolist())
    counts = [sample.predicted for sample in samples]
    return trace, Divergence(counts, nll, [0.0] * len(samples), counts)


@torch.no_grad()
def measure(model: Model, samples: Sequence[Sample], trace: Trace | None = None) -> Divergence:
    """Perplexity of `model` on `samples` and, with a reference's trace on the same samples, what lies between them.

    Raises `DscError` where reference and model have different vocabularies, or a sample predicts nothing.
    """
    check(samples, len(model.head), len(trace.head) if trace else None)
    nll, kl, agreed = [0.0] * len(samples), [0.0] * len(samples), [0] * len(samples)
    layers, positions = _LayerError(model, trace), Positions([], [], [], [])
    for number, chosen in enumerate(trace.batches if trace else batches(samples)):
        batch = _batch(samples, chosen, model.head.device)
        states, experts = _pass(model, batch, trace is not None and number < trace.layered)
        layers.add(number, states, batch.valid, experts)
        hidden = _head_input(model, states[-1], batch)
        heads = [HeadInput.of(trace.final(number), trace.head)] if trace else []
        found = scores([*heads, HeadInput.of(hidden, model.head)], batch.following)
        _add(nll, batch.owner, found.nll[-1].tolist())
        _add(kl, batch.owner, found.kl[-1].tolist())
        _add(agreed, batch.owner, (found.best[0] == found.best[-1]).long().tolist())
        _collect(positions, batch, found)
    counts = [sample.predicted for sample in samples]
    if trace is None:
        return Divergence(counts, nll)
    return Divergence(
        counts, nll, kl, agreed, layers.result(), positions, layers.choices(), layers.outliers(), layers.experts()
    )


@torch.no_grad()
def measure_logits(predict: Callable[[Tensor], Tensor], samples: Sequence[Sample], trace: Trace) -> Divergence:
    """As `measure`, of something that gives logits alone: `predict` tokens (1, T) -> logits (1, T, vocabulary)."""
    nll, kl, agreed = [0.0] * len(samples), [0.0] * len(samples), [0] * len(samples)
    positions = Positions([], [], [], [])
    for number, chosen in enumerate(trace.batches):
        batch = _batch(samples, chosen, trace.head.device)
        rows = [
            predict(torch.tensor([tokens]))[0, start - 1 : len(tokens) - 1]
            for tokens, start in (samples[index] for index in chosen)
        ]
        check(samples, rows[0].shape[-1], len(trace.head))
        found = logit_scores(trace.final(number), trace.head, torch.cat(rows), batch.following)
        _add(nll, batch.owner, found.nll[-1].tolist())
        _add(kl, batch.owner, found.kl[-1].tolist())
        _add(agreed, batch.owner, (found.best[0] == found.best[-1]).long().tolist())
        _collect(positions, batch, found)
    return Divergence([sample.predicted for sample in samples], nll, kl, agreed, None, positions)


def logit_scores(hidden: Tensor, head: Tensor, logits: Tensor, following: Tensor) -> Scores:
    """`scores` of a reference, hidden (n, hidden) and head, and of a model whose logits (n, vocabulary) are there."""
    parts = []
    for start in range(0, len(logits), ROWS):
        piece = slice(start, start + ROWS)
        check_finite("logits of the model", logits[piece])
        p = torch.log_softmax(functional.linear(hidden[piece].float(), head.float()).double(), -1)
        q = torch.log_softmax(logits[piece].double(), -1)
        picked = following[piece].cpu()[:, None]
        nll = torch.stack([-p.gather(1, picked)[:, 0], -q.gather(1, picked)[:, 0]])
        kl = torch.stack([torch.zeros(len(p), dtype=torch.float64), (p.exp() * (p - q)).sum(1)])
        best = torch.stack([p.argmax(1), q.argmax(1)])
        parts.append(Scores(nll, kl, best, -(p.exp() * p).sum(1)))
    return Scores(
        torch.cat([part.nll for part in parts], 1),
        torch.cat([part.kl for part in parts], 1),
        torch.cat([part.best for part in parts], 1),
        torch.cat([part.entropy for part in parts]),
    )


def _collect(positions: Positions, batch: _Batch, found: Scores) -> None:
    positions.kl.extend(found.kl[-1].tolist())
    positions.entropy.extend(found.entropy.tolist())
    positions.sample.extend(batch.owner)
    positions.place.extend(batch.place)


class _Batch(NamedTuple):
    tokens: Tensor  # (B, T), padded at the right
    valid: Tensor  # (B, T), False on padding
    predicting: Tensor  # (B, T - 1), True where the next token counts
    following: Tensor  # (positions,), the tokens that are predicted
    owner: list[int]  # (positions,), the sample each belongs to
    place: list[int]  # (positions,), where in its sample the predicted token stands


def _batch(samples: Sequence[Sample], chosen: Sequence[int], device: torch.device) -> _Batch:
    picked = [samples[index] for index in chosen]
    width = max(len(sample.tokens) for sample in picked)
    rows = [sample.tokens + [0] * (width - len(sample.tokens)) for sample in picked]
    tokens = torch.tensor(rows).to(device)
    place = torch.arange(width, device=device)
    ends = torch.tensor([len(sample.tokens) for sample in picked]).to(device)[:, None]
    starts = torch.tensor([sample.start for sample in picked]).to(device)[:, None]
    predicting = (place[1:] >= starts) & (place[1:] < ends)
    owner = torch.tensor(chosen).to(device)[:, None].expand_as(predicting)[predicting].tolist()
    places = place[1:].expand_as(predicting)[predicting].tolist()
    return _Batch(tokens, place < ends, predicting, tokens[:, 1:][predicting], owner, places)


def _pass(model: Model, batch: _Batch, experts: bool) -> tuple[list[Tensor], dict[int, Tensor]]:
    """Run the model: states after each block and, with `experts`, those of the valid tokens by block."""
    if not experts or model.cfg.moe is None:
        return model.hidden_states(batch.tokens), {}
    found: dict[int, Tensor] = {}

    def tap(layer: int, weights: Weights, x: Tensor) -> None:
        if model.cfg.moe is not None and model.cfg.is_moe(layer):
            routing = moe.route(model.cfg.moe, weights, x.flatten(0, 1), batch.tokens.flatten())
            found[layer] = routing.experts[batch.valid.flatten()]

    watched = copy.copy(model)
    watched.family = tapped(model.family, tap)
    return watched.hidden_states(batch.tokens), found


def _head_input(model: Model, hidden: Tensor, batch: _Batch) -> Tensor:
    """Return what the last block gives (B, T, hidden) -> what enters the head at predicting places (positions,
    hidden)."""
    return model.family.final_hidden(model.cfg, model.top, hidden)[:, :-1][batch.predicting]


def layered(samples: Sequence[Sample]) -> set[int]:
    """Return the samples whose hidden states are compared after every block: about `LAYER_TOKENS` tokens."""
    found: set[int] = set()
    for chosen in batches(samples):
        found |= set(chosen)
        if sum(len(samples[index].tokens) for index in found) >= LAYER_TOKENS:
            break
    return found


class _LayerError:
    """Sums of squares of the difference and of the reference, per block and channel."""

    def __init__(self, model: Model, trace: Trace | None) -> None:
        self.model = model
        same = trace is not None and trace.shape == (model.cfg.num_hidden_layers, model.cfg.hidden_size)
        self.trace = trace if same else None  # blocks of another number or width have no counterpart
        self.blocks = [ChannelError(model.cfg.hidden_size) for _ in range(model.cfg.num_hidden_layers)]
        self.routed: dict[int, ExpertChoice] = {}
        self.chosen: dict[int, tuple[int, int]] = {}  # block -> chosen as the reference does, chosen by the reference

    def add(self, number: int, states: Sequence[Tensor], valid: Tensor, experts: Mapping[int, Tensor]) -> None:
        if self.trace is None or number >= self.trace.layered:
            return
        count = self.model.cfg.moe.experts if self.model.cfg.moe else 0
        for layer, expected in self.trace.experts(number).items():
            if layer in experts and int(expected.max()) < count:
                self.routed.setdefault(layer, ExpertChoice(count)).add(expected, experts[layer])
        ours, theirs = choices(self.model, states, valid), self.trace.choices(number)
        for layer, choice in theirs.items():
            if (mine := ours[layer]) is not None:
                before = self.chosen.get(layer, (0, 0))
                more = shared(choice, mine)
                self.chosen[layer] = (before[0] + more[0], before[1] + more[1])
        blocks = self.trace.blocks(number)
        for layer, state in enumerate(states[1:]):
            self.blocks[layer].add(blocks[layer], self.model.family.residual(self.model.cfg, state)[valid])

    def result(self) -> list[float] | None:
        if self.trace is None:
            return None
        errors = [error for block in self.blocks if (error := block.relative()) is not None]
        return errors if len(errors) == len(self.blocks) else None

    def outliers(self) -> list[Outliers | None] | None:
        return None if self.trace is None else [block.outliers() for block in self.blocks]

    def experts(self) -> list[Choices | None] | None:
        found = {layer: choice.result() for layer, choice in self.routed.items()}
        return [found.get(layer) for layer in range(len(self.blocks))] if found else None

    def choices(self) -> list[float | None] | None:
        """Of what the reference's queries see, the share that ours see too, by block."""
        found = {layer: same / total for layer, (same, total) in self.chosen.items() if total}
        return [found.get(layer) for layer in range(len(self.blocks))] if found else None


def check(samples: Sequence[Sample], vocabulary: int, reference: int | None = None) -> None:
    """Raise `DscError` for a sample that predicts nothing, a token that is unknown, and another vocabulary."""
    if not samples or any(sample.start < 1 or sample.predicted < 1 for sample in samples):
        raise DscError("a sample without a predicted token", "give samples of at least 2 tokens")
    highest = max(max(sample.tokens) for sample in samples)
    if highest >= vocabulary:
        raise DscError(f"token {highest} in a vocabulary of {vocabulary}", "tokenizer and model do not belong together")
    if reference is not None and reference != vocabulary:
        raise DscError(
            f"vocabularies of {reference} (reference) and {vocabulary} tokens",
            "choose a reference with the same tokenizer",
        )


def _add(sums: list[Number], owners: Sequence[int], values: Sequence[Number]) -> None:
    for owner, value in zip(owners, values, strict=True):
        sums[owner] += value


def choices(model: Model, states: Sequence[Tensor], valid: Tensor) -> list[Tensor | None]:
    """Return what each block chose for the valid tokens, (tokens, K)."""
    found = [model.family.choice(model.cfg, layer, state) for layer, state in enumerate(states[1:])]
    return [None if choice is None else choice[valid] for choice in found]


def _blocks(model: Model, states: Sequence[Tensor], valid: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    """Return the residual streams after every block, (blocks, tokens, ...)."""
    return np.stack([_numpy(model.family.residual(model.cfg, state)[valid]) for state in states[1:]])


def _numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return tensor.detach().float().cpu().numpy()

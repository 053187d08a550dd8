"""How far a model's next-token distribution is from its reference's, and how well both predict a text.

With p the reference's and q the model's distribution after the same tokens, per predicted position:

    KL(p || q) = sum_v p(v) (log p(v) - log q(v))      nats
    top-1      = [argmax p = argmax q]
    perplexity = exp(mean of -log q(token that follows))

Distributions are computed in float64 from float32 logits, a few thousand rows at a time, so that the largest
vocabulary fits. The reference runs once: what enters its head is spooled to a folder, its head stays in memory, and
its logits are computed again beside each model's. From the same pass comes the error by layer, ||h - h'|| / ||h||
over all tokens of the batches that were kept, h the hidden state after a block.

Left out: nothing is sampled and no position is skipped; padding is at the right, where causal attention never sees it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.errors import DscError

if TYPE_CHECKING:
    from deepseek_compress.models.runtime import Model
    from deepseek_compress.models.tokenizer import Tokenizer

BATCH_TOKENS = 4096  # tokens in a forward pass: bounds the hidden states of all blocks
CHUNK_ELEMENTS = 1 << 22  # rows x vocabulary in one float64 tensor: 32 MB
LAYER_TOKENS = 4096  # the error by layer needs every block's output; this many tokens tell it well


class Sample(NamedTuple):
    """A stretch of tokens; those from index `start` on are predicted from the ones before."""

    tokens: list[int]
    start: int

    @property
    def predicted(self) -> int:
        """How many tokens are predicted."""
        return len(self.tokens) - self.start


@dataclass(frozen=True)
class Divergence:
    """Sums per sample, in the order of the samples; the reference's parts are None without a reference."""

    tokens: list[int]  # predicted
    nll: list[float]  # negative log-likelihood, nats
    kl: list[float] | None = None
    agreed: list[int] | None = None  # positions with the reference's most likely token
    error_by_layer: list[float] | None = None

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-likelihood per predicted token; infinite where it overflows."""
        mean = math.fsum(self.nll) / sum(self.tokens)
        return math.exp(mean) if mean < 709.0 else math.inf

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
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DscError(f"{path}: {error.strerror}", "give a text file") from None
    except UnicodeDecodeError:
        raise DscError(f"{path}: not UTF-8 text", "give a text file") from None
    ids = tokenizer.encode(text)
    if len(ids) < windows * length:
        raise DscError(
            f"{path}: {len(ids)} tokens make {len(ids) // length} windows of {length}, {windows} are asked for",
            "give a longer text, fewer windows or a smaller length",
        )
    return [Sample(ids[i * length : (i + 1) * length], 1) for i in range(windows)]


def batches(samples: Sequence[Sample], limit: int = BATCH_TOKENS) -> list[list[int]]:
    """Indices of samples that run together: of similar length, at most `limit` tokens with their padding."""
    found: list[list[int]] = []
    for index in sorted(range(len(samples)), key=lambda i: (len(samples[i].tokens), i)):
        width = len(samples[index].tokens)
        if found and (len(found[-1]) + 1) * width <= limit:
            found[-1].append(index)
        else:
            found.append([index])
    return found


@dataclass
class Trace:
    """The reference's pass over the samples: inputs of its head, and outputs of its blocks, as files in `folder`."""

    folder: Path
    head: Tensor  # (vocabulary, hidden)
    batches: list[list[int]]
    samples: Sequence[Sample]
    layered: int = 0  # the first so many batches have every block's output too
    shape: tuple[int, int] = field(default=(0, 0))  # (blocks, hidden size)

    @classmethod
    def record(cls, model: Model, samples: Sequence[Sample], folder: Path) -> Trace:
        """Run the reference once. Disk: 4 bytes x tokens x hidden size, and more for the first `LAYER_TOKENS`."""
        trace = cls(folder, model.head, batches(samples), samples)
        trace.shape = (model.cfg.num_hidden_layers, model.cfg.hidden_size)
        seen = 0
        for number, chosen in enumerate(trace.batches):
            tokens, valid, _ = _pad([samples[i] for i in chosen], model.head.device)
            states = model_states(model, tokens)
            np.save(folder / f"final-{number}.npy", _numpy(final_hidden(model, states[-1])))
            if seen < LAYER_TOKENS:
                np.save(folder / f"blocks-{number}.npy", np.stack([_numpy(state[valid]) for state in states[1:]]))
                trace.layered = number + 1
            seen += int(valid.sum())
        return trace

    def final(self, number: int) -> Tensor:
        """(B, T, hidden): what entered the reference's head."""
        return torch.from_numpy(np.load(self.folder / f"final-{number}.npy")).to(self.head.device)

    def blocks(self, number: int) -> Tensor:
        """(blocks, valid tokens, hidden): what each block gave."""
        return torch.from_numpy(np.load(self.folder / f"blocks-{number}.npy")).to(self.head.device)


@torch.no_grad()
def measure(model: Model, samples: Sequence[Sample], trace: Trace | None = None) -> Divergence:
    """Perplexity of `model` on `samples` and, with a reference's trace on the same samples, what lies between them.

    Raises `DscError` where reference and model have different vocabularies, or a sample predicts nothing.
    """
    _check(model, samples, trace)
    nll = [0.0] * len(samples)
    kl, agreed = [0.0] * len(samples), [0] * len(samples)
    layers = _LayerError(model, trace)
    for number, chosen in enumerate(trace.batches if trace else batches(samples)):
        tokens, valid, predicting = _pad([samples[i] for i in chosen], model.head.device)
        states = model_states(model, tokens)
        layers.add(number, states, valid)
        hidden = final_hidden(model, states[-1])[:, :-1][predicting]  # (positions, hidden)
        following = tokens[:, 1:][predicting]
        owner = torch.tensor(chosen, device=tokens.device)[:, None].expand_as(predicting)[predicting].tolist()
        other = trace.final(number)[:, :-1][predicting] if trace else None
        for rows in _chunks(len(following), model.head.shape[0]):
            scores = _log_probabilities(hidden[rows], model.head)
            surprise = -scores.gather(1, following[rows, None])[:, 0]
            _add(nll, owner[rows], surprise.tolist())
            if trace is not None and other is not None:
                expected = _log_probabilities(other[rows], trace.head)
                _add(kl, owner[rows], _kl(expected, scores).tolist())
                for index, same in zip(owner[rows], (expected.argmax(1) == scores.argmax(1)).tolist(), strict=True):
                    agreed[index] += same
    counts = [sample.predicted for sample in samples]
    if trace is None:
        return Divergence(counts, nll)
    return Divergence(counts, nll, kl, agreed, layers.result())


def model_states(model: Model, tokens: Tensor) -> list[Tensor]:
    """tokens (B, T) -> the hidden states before, between and after the blocks."""
    with torch.no_grad():
        return model.hidden_states(tokens)


def final_hidden(model: Model, hidden: Tensor) -> Tensor:
    """What the last block gives -> what enters the head."""
    with torch.no_grad():
        return model.family.final_hidden(model.cfg, model.top, hidden)


class _LayerError:
    """Sums of squares of the difference and of the reference, per block."""

    def __init__(self, model: Model, trace: Trace | None) -> None:
        same = trace is not None and trace.shape == (model.cfg.num_hidden_layers, model.cfg.hidden_size)
        self.trace = trace if same else None  # blocks of another number or width have no counterpart
        self.apart = torch.zeros(model.cfg.num_hidden_layers, dtype=torch.float64)
        self.whole = torch.zeros_like(self.apart)

    def add(self, number: int, states: Sequence[Tensor], valid: Tensor) -> None:
        if self.trace is None or number >= self.trace.layered:
            return
        expected = self.trace.blocks(number)
        for layer, state in enumerate(states[1:]):
            difference = state[valid].double() - expected[layer].double()
            self.apart[layer] += difference.square().sum().cpu()
            self.whole[layer] += expected[layer].double().square().sum().cpu()

    def result(self) -> list[float] | None:
        if self.trace is None:
            return None
        errors: list[float] = (self.apart / self.whole).sqrt().tolist()
        return errors


def _check(model: Model, samples: Sequence[Sample], trace: Trace | None) -> None:
    if not samples or any(sample.start < 1 or sample.predicted < 1 for sample in samples):
        raise DscError("a sample without a predicted token", "give samples of at least 2 tokens")
    highest = max(max(sample.tokens) for sample in samples)
    if highest >= model.head.shape[0]:
        raise DscError(
            f"token {highest} in a vocabulary of {model.head.shape[0]}", "tokenizer and model do not belong together"
        )
    if trace is not None and trace.head.shape[0] != model.head.shape[0]:
        raise DscError(
            f"vocabularies of {trace.head.shape[0]} (reference) and {model.head.shape[0]} tokens",
            "choose a reference with the same tokenizer",
        )


def _pad(samples: Sequence[Sample], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens (B, T) padded at the right, valid (B, T), and which positions (B, T - 1) predict a token that counts."""
    width = max(len(sample.tokens) for sample in samples)
    rows = [sample.tokens + [0] * (width - len(sample.tokens)) for sample in samples]
    place = torch.arange(width, device=device)
    ends = torch.tensor([len(sample.tokens) for sample in samples], device=device)[:, None]
    starts = torch.tensor([sample.start for sample in samples], device=device)[:, None]
    target = place[1:]
    return torch.tensor(rows, device=device), place < ends, (target >= starts) & (target < ends)


def _log_probabilities(hidden: Tensor, head: Tensor) -> Tensor:
    """(rows, hidden) -> float64 (rows, vocabulary)."""
    return functional.linear(hidden.to(head.dtype), head).float().double().log_softmax(1)


def _kl(expected: Tensor, scores: Tensor) -> Tensor:
    """KL per row, both (rows, vocabulary) log-probabilities. 0 log 0 is 0."""
    return functional.kl_div(scores, expected, reduction="none", log_target=True).sum(1)


def _chunks(rows: int, vocabulary: int) -> Iterable[slice]:
    step = max(1, CHUNK_ELEMENTS // vocabulary)
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _add(sums: list[float], owners: Sequence[int], values: Sequence[float]) -> None:
    for owner, value in zip(owners, values, strict=True):
        sums[owner] += value


def _numpy(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.float32]]:
    return tensor.detach().float().cpu().numpy()

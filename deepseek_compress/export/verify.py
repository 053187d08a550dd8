"""Compare an exported ONNX file in onnxruntime with the runtime it was made from, on text where there is some.

Two questions, since rounding is not continuous (see `rounding`). p is the runtime without 8-bit activations, its tables
rounded as the file rounds them; KL is in nats a position.

1. Is the graph the model? The file without its rounding of activations must give p: the mean of KL(p || graph) at most
   `EXACT`, without the worst hundredth of the positions, where a router's k-th and (k+1)-th experts may tie, and the
   same greedy tokens wherever p's lead is clear.
2. Does it round as it should? The file as written, and the runtime that rounds the same inputs in the same way, must be
   about as far from p: the median of KL(p || file) within `ROUNDED` of that of KL(p || runtime with rounding). The
   median, since where rounding turns a router to another expert one position outweighs all others.

Where either fails, the block whose output differs most is named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.export.onnx import hidden_name, packed_table, rounded_to_8
from deepseek_compress.export.rounding import in_blocks, rounded_rows, without_rounding
from deepseek_compress.generation.backends.graph import GraphModel, Ints
from deepseek_compress.generation.backends.onnx import OnnxRunner
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.weights import QuantizedInputs
from deepseek_compress.numerics.grid import fit_group_size

EXACT = {"float32": 1e-6, "float16": 2e-3}  # nats a token, by the float type of the graph
CLEAR = {"float32": 1e-4, "float16": 2e-2}  # a lead over the largest |logit| beyond which a greedy token must be equal
ROUNDED = (0.25, 2.0)  # KL of the file over KL of the runtime, both with rounding
SHARE = 0.99  # of the positions, the best ones; and of the clear tokens
DECODED = 32
CHUNK = 1 << 22  # elements of a float64 tensor

Floats = NDArray[np.float32]
Call = tuple[Ints, Ints]  # tokens and mask of a call, (B, S)


@dataclass(frozen=True)
class Agreement:
    """Agreement of an ONNX file with the runtime."""

    positions: int
    bound: float  # of `kl`
    kl: float  # mean, of the graph without rounding
    worst: float  # largest |difference| of logits at any position over the largest |logit| there, without rounding
    decoded: int  # greedy tokens whose lead was clear enough to be judged
    agreed: int  # and those that were the same
    rounded_kl: float | None  # median, of the file as it is; None where it rounds no activations
    expected_kl: float | None  # median, of the runtime that rounds likewise
    differs: str | None = None  # where, if it does not hold
    streamed: bool = False  # block by block, the tokens given: see `verify_streamed`

    @property
    def exact(self) -> bool:
        """Whether the graph is the model."""
        return self.kl <= self.bound and self.agreed >= SHARE * self.decoded

    @property
    def holds(self) -> bool:
        """Whether the file may be called equal to the runtime."""
        if self.rounded_kl is None or self.expected_kl is None:
            return self.exact
        low, high = (factor * self.expected_kl for factor in ROUNDED)
        return self.exact and low - self.bound <= self.rounded_kl <= high + self.bound

    def facts(self) -> dict[str, Any]:
        """For a report."""
        return {**self.__dict__, "holds": self.holds}

    def __str__(self) -> str:
        text = f"KL {self.kl:.2g} from the runtime (bound {self.bound:g}), {self.agreed} of {self.decoded} clear tokens"
        count = f"{self.positions} positions{', block by block' if self.streamed else ''}"
        if self.rounded_kl is None:
            return f"{text} equal, {count}"
        return (
            f"{text} equal without 8-bit activations; with them KL {self.rounded_kl:.2g} (median), the runtime's "
            f"{self.expected_kl:.2g}, {count}"
        )


class OnnxModel(GraphModel):
    """An exported file in onnxruntime, with the cache carried along."""

    def __init__(self, file: Path | bytes, threads: int = 0, folder: Path | None = None) -> None:
        super().__init__(OnnxRunner(file, threads or torch.get_num_threads(), folder))


Rounding = Callable[[Tensor], Tensor]  # rows (n, hidden) of a table -> the same, each on its own grid


class Tables(NamedTuple):
    """Rounding of embedding and head in a file; None: not rounded."""

    embedding: Rounding | None = None
    head: Rounding | None = None


class Rounded(Model):
    """The runtime with the tables of a file, and with the inputs that it rounds; none are without `inputs`."""

    def __init__(self, model: Model, tables: Tables, inputs: Mapping[str, Any] | None) -> None:
        weights, device = dict(model.weights), model.head.device
        if tables.embedding is not None:
            name = model.cfg.names.embedding
            weights[name] = tables.embedding(weights[name]).to(device)
        super().__init__(model.family, model.cfg, weights)
        self.rounded_head = model.head if tables.head is None else tables.head(model.head).to(device)
        self.rounds_head = (inputs or {}).get(modules(model.cfg)[1])
        self.int8 = model.int8 and inputs is not None
        for layer, block in enumerate(model.blocks):
            prefix = f"{model.cfg.names.block.format(layer)}."
            found = {
                name.removeprefix(prefix): each for name, each in (inputs or {}).items() if name.startswith(prefix)
            }
            if inputs is not None and isinstance(block, QuantizedInputs):
                found = {**block.roundings, **found}  # what MatMulNBits rounds, it rounds in its own way
            self.blocks[layer] = QuantizedInputs(self.blocks[layer], found)

    def logits(self, hidden: Tensor) -> Tensor:
        """As the runtime's."""
        hidden = self.family.final_hidden(self.cfg, self.top, hidden)
        hidden = self.rounds_head(hidden) if self.rounds_head else hidden
        return functional.linear(hidden, self.rounded_head)


def verify(
    path: Path,
    source: Checkpoint,
    prompts: Sequence[Sequence[int]],
    *,
    model: Model | None = None,
    dtype: str = "float32",
    decoded: int = DECODED,
    device: str = "cpu",
) -> Agreement:
    """Prefill `prompts` as one batch, padded at the left, then decode the runtime's greedy tokens in all of them.

    `dtype` is the float type of the graph; `model`: of `source`, where it is loaded already, else on `device`.
    """
    model = model or Model.load(source, device=device)
    graph = onnx.load(str(path), load_external_data=False)
    plain = without_rounding(graph)
    blocks, tables = in_blocks(graph), tables_of(graph, source, model.cfg)
    exact, rounded = Rounded(model, tables, None), Rounded(model, tables, blocks)
    prompts = comparable(prompts, model.cfg)
    calls, want = _generate(exact, prompts, decoded)
    file = path if plain is None else plain.SerializeToString()
    have, mask = _replay(OnnxModel(file, folder=path.parent), calls)
    want = [logits[:, -got.shape[1] :] for logits, got in zip(want, have, strict=True)]
    steps = clear_tokens(want[1:], have[1:], CLEAR[dtype])
    p, q = _joined(want, mask), _joined(have, mask)
    each = kl_of(p, q)
    kl, other, expected = float(each[: max(1, int(SHARE * len(each)))].mean()), None, None
    if plain is not None:
        files, _ = _replay(OnnxModel(path), calls)
        both = (kl_of(p, _joined(found, mask)) for found in (files, _runtime(rounded, calls, have)))
        other, expected = (float(found.median()) for found in both)
    worst = float((np.abs(p - q).max(1) / np.maximum(np.abs(p).max(1), 1e-30)).max())
    found = Agreement(len(p), EXACT[dtype], kl, worst, *steps, other, expected)
    if found.holds:
        return found
    where = _differs(
        graph if plain is None or found.exact else plain, path, exact, rounded if found.exact else exact, calls[0]
    )
    return replace(found, differs=where)


def modules(cfg: ModelConfig) -> tuple[str, str]:
    """Names of embedding and head in a graph; of a tied head, the embedding's."""
    names = cfg.names
    return module_of(names.embedding)[0], module_of(names.embedding if cfg.tie_word_embeddings else names.head)[0]


def tables_of(graph: onnx.ModelProto, source: Checkpoint, cfg: ModelConfig) -> Tables:
    """Embedding and head as the file rounds them: 8 bits in the file, or a head that becomes 8 bits at load."""
    nodes, (embedding, head) = graph.graph.node, modules(cfg)
    if any(node.op_type == "GatherBlockQuantized" for node in nodes):
        return Tables(*(None if packed_table(source, name) else rounded_to_8 for name in (embedding, head)))
    made = any(node.op_type == "MatMulNBits" and node.name.startswith(f"{head}/") for node in nodes)
    if not made or source.header.tensors[f"{head}.weight"].encoding == "packed":
        return Tables()
    return Tables(head=lambda rows: rounded_rows(rows, fit_group_size(rows.shape[1], None)))


def _generate(model: Model, prompts: Sequence[Sequence[int]], decoded: int) -> tuple[list[Call], list[Floats]]:
    """Generate the calls (the prompts, then a greedy token each) and the model's logits after each."""
    tokens, mask = left_padded(prompts)
    logits_of, calls, logits = _Calls(model, tokens.shape[1] + decoded, mask), [], []
    for _ in range(decoded + 1):
        calls.append((tokens, mask))
        logits.append(logits_of(tokens))
        tokens = logits[-1][:, -1].argmax(-1)[:, None].astype(np.int64)
        mask = np.ones_like(tokens)
    return calls, logits


def _replay(model: OnnxModel, calls: Sequence[Call]) -> tuple[list[Floats], list[Ints]]:
    """Run the file on each call; return its logits, which may be of the last token alone, and their masks."""
    model.start(len(calls[0][0]))
    logits = [model.step(tokens, mask) for tokens, mask in calls]
    return logits, [mask[:, -got.shape[1] :] for (_, mask), got in zip(calls, logits, strict=True)]


def _runtime(model: Model, calls: Sequence[Call], like: Sequence[Floats]) -> list[Floats]:
    logits_of = _Calls(model, sum(tokens.shape[1] for tokens, _ in calls), calls[0][1])
    return [logits_of(tokens)[:, -got.shape[1] :] for (tokens, _), got in zip(calls, like, strict=True)]


class _Calls:
    """The runtime, called with a text piece by piece: with its cache, or with the whole text again."""

    def __init__(self, model: Model, capacity: int, mask: Ints) -> None:
        self.model, self.padding = model, _padding(mask).to(model.head.device)
        self.cache = model.cache(capacity) if model.family.cached else None
        self.text: Ints = np.zeros((len(mask), 0), np.int64)

    @torch.no_grad()
    def __call__(self, tokens: Ints) -> Floats:
        """Tokens (B, S) after those of earlier calls -> logits (B, S, vocabulary)."""
        device, padding = self.model.head.device, self.padding
        if self.cache is not None:
            found = self.model.forward(torch.from_numpy(tokens).to(device), self.cache, padding)
        else:
            self.text = np.concatenate([self.text, tokens], axis=1)
            found = self.model.forward(torch.from_numpy(self.text).to(device))[:, -tokens.shape[1] :]
        logits: Floats = found.cpu().numpy()
        return logits


def comparable(prompts: Sequence[Sequence[int]], cfg: ModelConfig) -> list[list[int]]:
    """Return the prompts; of one length where a graph takes no padding."""
    most = min(map(len, prompts)) if cfg.compressed is not None else None
    return [list(prompt[:most]) for prompt in prompts]


def _padding(mask: Ints) -> Tensor:
    """Return the padded places of each row."""
    return torch.from_numpy((mask == 0).sum(1))


def clear_tokens(want: Sequence[Floats], have: Sequence[Floats], bound: float) -> tuple[int, int]:
    """Count decoded tokens that have a clear lead in the runtime, and how many of those the file gives too.

    `want`, `have`: logits of each call, (B, S, vocabulary), whose last position counts.
    """
    judged = agreed = 0
    for left, right in zip(want, have, strict=True):
        best = np.sort(left[:, -1], axis=-1)
        clear = best[:, -1] - best[:, -2] > 2 * bound * np.abs(left[:, -1]).max(-1)
        same = left[:, -1].argmax(-1) == right[:, -1].argmax(-1)
        judged, agreed = judged + int(clear.sum()), agreed + int((clear & same).sum())
    return judged, agreed


def _joined(logits: Sequence[Floats], masks: Sequence[Ints]) -> Floats:
    """(positions, vocabulary) of what is no padding."""
    return np.concatenate([found[mask.astype(bool)] for found, mask in zip(logits, masks, strict=True)])


def kl_of(p: Floats, q: Floats) -> Tensor:
    """KL(p || q) of each position in nats, rising; NaN counts as infinitely far."""
    rows = max(1, CHUNK // p.shape[1])
    values = []
    for start in range(0, len(p), rows):
        a, b = (torch.from_numpy(x[start : start + rows]).double().log_softmax(1) for x in (p, q))
        values.append(functional.kl_div(b, a, reduction="none", log_target=True).sum(1))
    return torch.cat(values).nan_to_num(nan=float("inf")).clamp(min=0).sort().values


def _differs(graph: onnx.ModelProto, path: Path, exact: Model, model: Model, call: Call) -> str:
    """Find the part of the model where file and runtime diverge most.

    `exact`: what both are compared with where `model` rounds; there the file's distance counts over the model's.
    """
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    names = [hidden_name(layer) for layer in range(model.cfg.num_hidden_layers + 1)]
    copy.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    tokens, mask = call
    runner = OnnxRunner(copy.SerializeToString(), torch.get_num_threads(), path.parent)
    feed = {"input_ids": tokens, "attention_mask": mask, "position_ids": np.maximum(mask.cumsum(1) - 1, 0)}
    files = runner.session.run(names, {**feed, **runner.empty(len(tokens))})
    device, real = model.head.device, mask.astype(bool).reshape(-1)
    with torch.no_grad():
        ids, padding = torch.from_numpy(tokens).to(device), _padding(mask).to(device)
        padded = padding if model.family.cached else None  # no padding there
        want, other = (m.hidden_states(ids, None, padded) for m in (exact, model))
    errors = [0.0]
    for left, right, file in zip(want, other, files, strict=True):
        sides = (left.cpu().numpy(), right.cpu().numpy(), np.asarray(file, np.float32))
        flat = [x.reshape(len(real), -1)[real] for x in sides]
        own = np.linalg.norm(flat[1] - flat[0]) if model is not exact else 0.0
        errors.append(abs(float(np.linalg.norm(flat[2] - flat[0]) - own)) / max(float(np.linalg.norm(flat[0])), 1e-30))
    return place_of(errors, model.cfg, model is exact)


def place_of(errors: Sequence[float], cfg: ModelConfig, exact: bool) -> str:
    """Name where relative errors rise most: 0, then that after the embedding and after each block."""
    rises = [after - before for before, after in pairwise(errors)]
    worst = int(np.argmax(rises))
    if max(errors) < 1e-2 and exact:
        return f"the head (before it {errors[-1]:.1e} relative)"
    place = "the embedding" if worst == 0 else cfg.names.block.format(worst - 1)
    return f"{place} ({errors[worst + 1]:.1e} relative after it, {errors[worst]:.1e} before)"


def left_padded(prompts: Sequence[Sequence[int]]) -> Call:
    """Token ids and mask, both int64 (B, longest), padding (id 0, mask 0) at the left."""
    width = max(len(prompt) for prompt in prompts)
    tokens = np.zeros((len(prompts), width), np.int64)
    mask = np.zeros_like(tokens)
    for row, prompt in enumerate(prompts):
        tokens[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return tokens, mask


def random_prompts(vocabulary: int, lengths: Iterable[int], seed: int = 0) -> list[list[int]]:
    """Uniform tokens, one prompt a length."""
    generator = np.random.default_rng(seed)
    return [generator.integers(0, vocabulary, length).tolist() for length in lengths]

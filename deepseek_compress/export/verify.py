"""Run an exported ONNX file in onnxruntime beside the runtime it was made from: same logits, same greedy tokens.

`BOUNDS` states how far logits may be apart (the largest |difference| at a position over the largest |logit| of the
runtime there) and the share of positions that must keep to it. It isn't all of them, because two steps of such a model
are not continuous: a router whose k-th and (k+1)-th experts are close, and an activation that lies near half an 8-bit
step. A difference of one FP16 rounding there becomes a whole step, which then moves others: FP16 graphs with 8-bit
activations are as far from the runtime as 8-bit activations themselves are from FP32. The worst position is always
reported.

onnxruntime's optimiser would replace DequantizeLinear + MatMul by 8-bit activations of its own; here it may not.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from deepseek_compress import machine
from deepseek_compress.errors import DscError
from deepseek_compress.export.onnx import empty_past
from deepseek_compress.models.cache import KvCache
from deepseek_compress.models.runtime import Model

BOUNDS = {  # (float type of the graph, 8-bit activations): (bound, share of positions)
    ("float32", False): (1e-4, 0.99),
    ("float32", True): (0.05, 0.95),
    ("float16", False): (0.02, 0.95),
    ("float16", True): (0.1, 0.9),
}
DECODED = 32

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]


@dataclass(frozen=True)
class Agreement:
    """How an ONNX file compares with the runtime."""

    bound: float  # stated
    share: float  # stated
    worst: float  # largest relative difference at any position
    within: float  # share of positions within the bound
    decoded: int  # greedy tokens whose lead was clear enough to be judged
    agreed: int  # and those that were the same
    positions: int

    @property
    def holds(self) -> bool:
        """Whether the file may be called equal to the runtime."""
        return self.within >= self.share and self.agreed >= self.share * self.decoded

    def facts(self) -> dict[str, Any]:
        """For a report."""
        return {**self.__dict__, "holds": self.holds}


class OnnxModel:
    """An exported file in onnxruntime, with the cache carried along."""

    def __init__(self, path: Path, cfg: Any, threads: int = 0) -> None:
        self.session = open_session(path, threads=threads)
        self.cfg = cfg
        self.names = [output.name for output in self.session.get_outputs()]
        kinds = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
        first = next(i for i in self.session.get_inputs() if i.name.startswith("past."))
        self.dtype = kinds[first.type]
        self.past: dict[str, Any] = {}
        self.mask: Ints = np.zeros((0, 0), np.int64)

    def start(self, batch: int) -> None:
        """Forget everything."""
        self.past = empty_past(self.cfg, batch, self.dtype)
        self.mask = np.zeros((batch, 0), np.int64)

    def step(self, tokens: Ints, mask: Ints | None = None) -> Floats:
        """tokens (B, S) after those seen so far -> logits (B, S, vocabulary). `mask` (B, S): 0 marks padding."""
        new = np.ones_like(tokens) if mask is None else mask
        self.mask = np.concatenate([self.mask, new], axis=1)
        positions = np.maximum(self.mask.cumsum(1) - 1, 0)[:, -tokens.shape[1] :]
        feed = {"input_ids": tokens, "attention_mask": self.mask, "position_ids": positions, **self.past}
        logits, *present = self.session.run(self.names, feed)
        self.past = {n.replace("present", "past"): v for n, v in zip(self.names[1:], present, strict=True)}
        result: Floats = logits
        return result


def open_session(path: Path, threads: int = 0, accuracy_level: int = 0) -> Any:
    """An onnxruntime session on the CPU that computes what the graph says."""
    try:
        import onnxruntime
    except ImportError:
        raise DscError("onnxruntime is not installed", "pip install onnxruntime-gpu") from None
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", str(accuracy_level))
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if not machine.exact_integer_products():
        # onnxruntime's u8 x s8 products saturate at 16 bits there; its other mode (x64quantprecision) breaks weights in
        # blocks (1.31). So Q and DQ are computed as they stand.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
    options.intra_op_num_threads = threads or torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def verify(
    path: Path,
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: str = "float32",
    rounded: bool = False,
    decoded: int = DECODED,
) -> Agreement:
    """Prefill `prompts` as one batch, padded at the left, then decode the runtime's greedy tokens in both.

    `dtype` is the float type of the graph; `rounded`: whether activations are 8-bit.
    """
    bound, share = BOUNDS[(dtype, rounded)]
    onnx_model = OnnxModel(path, model.cfg)
    onnx_model.start(len(prompts))
    tokens, mask = left_padded(prompts)
    capacity = tokens.shape[1] + decoded
    cache = KvCache(model.cfg.num_hidden_layers, capacity, int8=model.int8)  # the graph's is not rounded either
    padding = torch.from_numpy((mask == 0).sum(1))
    errors: list[NDArray[np.float64]] = []
    judged = agreed = 0
    for step in range(decoded + 1):
        with torch.no_grad():
            want = model.forward(torch.from_numpy(tokens), cache, padding).numpy()
        have = onnx_model.step(tokens, mask)
        want, judged_mask = want[:, -have.shape[1] :], mask[:, -have.shape[1] :]  # some files give the last logits only
        largest = np.abs(want).max(-1)
        error = np.abs(want.astype(np.float64) - have).max(-1) / np.maximum(largest, 1e-30)
        errors.append(error[judged_mask.astype(bool)])
        last = np.sort(want[:, -1], axis=-1)
        clear = last[:, -1] - last[:, -2] > 2 * bound * largest[:, -1]
        same = want[:, -1].argmax(-1) == have[:, -1].argmax(-1)
        if step:  # the first is the prefill's
            judged, agreed = judged + int(clear.sum()), agreed + int((clear & same).sum())
        tokens = want[:, -1].argmax(-1)[:, None].astype(np.int64)
        mask = np.ones_like(tokens)
    every = np.concatenate([e.reshape(-1) for e in errors])
    return Agreement(bound, share, float(every.max()), float((every <= bound).mean()), judged, agreed, every.size)


def left_padded(prompts: Sequence[Sequence[int]]) -> tuple[Ints, Ints]:
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

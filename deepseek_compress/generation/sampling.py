"""From logits to a token.

    p = softmax(l / temperature), over the `top_k` largest l, then over the fewest tokens whose p sum to `top_p`

Temperature 0 is greedy: the first of the largest. Source of top-p: nucleus sampling, arXiv 1904.09751, section 3.1.
The same seed and logits give the same tokens, whatever computed them.
"""

from __future__ import annotations

import numpy as np
from pydantic import BaseModel, Field

from deepseek_compress.generation.backends import Floats


class Sampling(BaseModel, frozen=True, extra="forbid"):
    """Rule for choosing the next token."""

    temperature: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # 0: greedy
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)  # 0: all
    seed: int = Field(default=0, ge=0)

    def __str__(self) -> str:
        if not self.temperature:
            return "greedy"
        parts = [f"temperature {self.temperature:g}"]
        parts += [f"top-p {self.top_p:g}"] if self.top_p < 1 else []
        parts += [f"top-k {self.top_k}"] if self.top_k else []
        return ", ".join([*parts, f"seed {self.seed}"])


class Sampler:
    """Chooses token after token."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.default_rng(sampling.seed)

    def __call__(self, logits: Floats) -> int:
        """logits (vocabulary,) -> a token."""
        if not self.sampling.temperature:
            return int(logits.argmax())
        p = probabilities(logits, self.sampling)
        return int(np.searchsorted(p.cumsum(), self._random.random() * p.sum(), side="right").clip(0, len(p) - 1))


def probabilities(logits: Floats, sampling: Sampling) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return the distribution that is drawn from, (vocabulary,)."""
    scaled = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-scaled, kind="stable")
    kept = order[: sampling.top_k or None]
    p = np.exp(scaled[kept] - scaled[kept[0]])
    p /= p.sum()
    count = int(np.searchsorted(p.cumsum(), sampling.top_p * (1 - 1e-12))) + 1
    out = np.zeros(len(logits))
    out[kept[:count]] = p[:count] / p[:count].sum()
    return out

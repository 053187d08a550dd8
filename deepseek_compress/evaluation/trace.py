"""The reference's pass over the samples, kept as files: every other model is measured against it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass
class Trace:
    """The reference's pass over the samples: inputs of its head, and outputs of its blocks, as files in `folder`."""

    folder: Path
    head: Tensor  # (vocabulary, hidden)
    batches: list[list[int]]
    shape: tuple[int, int]  # (blocks, hidden size)
    layered: int = 0  # the first so many batches have every block's output too

    def final(self, number: int) -> Tensor:
        """(positions, hidden): what entered the reference's head where a token is predicted."""
        return torch.from_numpy(np.load(self.folder / f"final-{number}.npy")).to(self.head.device)

    def blocks(self, number: int) -> Tensor:
        """(blocks, valid tokens, hidden): what each block gave."""
        return torch.from_numpy(np.load(self.folder / f"blocks-{number}.npy")).to(self.head.device)

    def keep_choices(self, number: int, choices: Sequence[Tensor | None]) -> None:
        """Store what each block chose, (valid tokens, K); None where it does not choose."""
        chosen = {str(layer): choice.cpu().numpy() for layer, choice in enumerate(choices) if choice is not None}
        np.savez(self.folder / f"choices-{number}.npz", **chosen)  # type: ignore[arg-type]

    def choices(self, number: int) -> dict[int, Tensor]:
        """Return what blocks chose, by their number."""
        return self._by_layer(f"choices-{number}.npz")

    def keep_experts(self, number: int, experts: Mapping[int, Tensor]) -> None:
        """Store the experts of the valid tokens by block, (valid tokens, K)."""
        found = {str(layer): chosen.int().cpu().numpy() for layer, chosen in experts.items()}
        np.savez(self.folder / f"experts-{number}.npz", **found)  # type: ignore[arg-type]

    def experts(self, number: int) -> dict[int, Tensor]:
        """Return the experts of the valid tokens by block."""
        return self._by_layer(f"experts-{number}.npz")

    def _by_layer(self, name: str) -> dict[int, Tensor]:
        with np.load(self.folder / name) as found:
            return {int(layer): torch.from_numpy(found[layer]).to(self.head.device) for layer in found}

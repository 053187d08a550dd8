"""Attention over a cache that keeps some tokens: the newest, the first, and those that got most attention so far.

At every EVERY-th token of a text the kept tokens before its window are ranked by the attention that all queries up to
it gave them, summed over the heads that share a cache entry; `important` of them stay. What is no longer kept is hidden
from all later queries, or read from its first layer of bits, and never comes back: its bytes are gone. The decision
depends on places in the text alone, so that a text at once and token by token give the same.

B batch, H heads, G heads of the cache (of latent attention: 1), T new tokens, S tokens seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from deepseek_compress.models.attend import causal_mask, grouped_product, softmax
from deepseek_compress.numerics.kv_cache import EVERY, KvRounding

Pairs = Sequence[tuple[Tensor, Tensor]]  # (q (B, H, T, D), k (B, G, S, D)), whose scores add up


class KeptTokens:
    """Of one block: which tokens are kept, and the attention that each has got."""

    def __init__(self, knobs: KvRounding, batch: int, groups: int) -> None:
        self.knobs = knobs
        self.positions = torch.zeros(batch, 0, dtype=torch.long)  # (B, S): places in the texts
        self.kept = torch.zeros(batch, groups, 0, dtype=torch.bool)  # (B, G, S)
        self.mass = torch.zeros(batch, groups, 0)  # (B, G, S)

    def keep_rows(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.positions, self.kept, self.mass = self.positions[rows], self.kept[rows], self.mass[rows]

    def attend(
        self,
        positions: Tensor,
        pairs: Pairs,
        values: Tensor,
        scale: float,
        mask: Tensor | None,
        rest: tuple[Pairs, Tensor] | None,
    ) -> Tensor:
        """Return what `layers.attend` gives for the new tokens at `positions` (B, T), over what is kept.

        rest: the keys, with their queries, and the values of tokens that are not kept; None: those are hidden.
        """
        new, seen = positions.shape[1], values.shape[2]
        self._append(positions)
        parts = []
        for first, last in self._pieces(seen - new):
            self._decide(first)
            rows = slice(first - seen + new, last - seen + new)
            weights, kept = self._weights(pairs, rest, scale, mask, rows, last)
            self.mass[:, :, :last] += weights.view(*self.mass.shape[:2], -1, last).sum(2)
            if rest is None:
                parts.append(grouped_product(weights.to(values.dtype), values[:, :, :last]))
                continue
            whole, coarse = (weights * kept, values), (weights * ~kept, rest[1])
            both = [grouped_product(part.to(v.dtype), v[:, :, :last]) for part, v in (whole, coarse)]
            parts.append(both[0] + both[1])
        return torch.cat(parts, dim=2)

    def _append(self, positions: Tensor) -> None:
        """Take up new tokens, all of them kept."""
        device, count = positions.device, positions.shape[1]
        shape = (*self.kept.shape[:2], count)
        self.positions = torch.cat((self.positions.to(device), positions), dim=1)
        self.kept = torch.cat((self.kept.to(device), torch.ones(shape, dtype=torch.bool, device=device)), dim=2)
        self.mass = torch.cat((self.mass.to(device), torch.zeros(shape, device=device)), dim=2)

    def _pieces(self, start: int) -> Iterator[tuple[int, int]]:
        """Yield runs of new tokens (first, after the last) within which nothing is decided in any row."""
        place = self.positions[:, start:]
        cuts = ((place % EVERY == 0) & (place > 0)).any(0).nonzero()[:, 0].tolist()
        ends = sorted({start, *(start + cut for cut in cuts), self.positions.shape[1]})
        yield from pairwise(ends)

    def _decide(self, first: int) -> None:
        """Before the token in place `first` of the cache, in rows where it is an EVERY-th of its text."""
        here, knobs = self.positions[:, first], self.knobs
        due = (here % EVERY == 0) & (here > 0)  # (B,)
        assert knobs.window is not None
        if not bool(due.any()):
            return
        before = self.positions[:, :first]
        padding = torch.zeros_like(before, dtype=torch.bool)
        padding[:, :-1] = (before[:, :-1] == 0) & (before[:, 1:] == 0)
        old = (before < here[:, None] - knobs.window) & (before >= knobs.sinks) & ~padding
        candidates = self.kept[:, :, :first] & (old & due[:, None])[:, None]
        ranked = self.mass[:, :, :first].masked_fill(~candidates, -1.0)
        best = ranked.topk(min(knobs.important, first), dim=2).indices
        stays = torch.zeros_like(candidates).scatter(2, best, True)
        self.kept[:, :, :first] &= ~candidates | stays

    def _weights(
        self, pairs: Pairs, rest: tuple[Pairs, Tensor] | None, scale: float, mask: Tensor | None, rows: slice, last: int
    ) -> tuple[Tensor, Tensor]:
        """Softmax of the queries `rows`, float32 (B, H, rows, last), and which tokens are kept (B, H, 1, last)."""
        heads = pairs[0][0].shape[1]
        kept = self.kept[:, :, :last].repeat_interleave(heads // self.kept.shape[1], dim=1).unsqueeze(2)
        scores = _scores(pairs, scale, rows, last)
        if rest is None:
            scores = scores.masked_fill(~kept, float("-inf"))
        else:
            scores = torch.where(kept, scores, _scores(rest[0], scale, rows, last))
        if mask is not None:
            scores = scores + mask[:, :, rows, :last]
        else:
            own = rows.stop - rows.start
            scores[..., last - own :] += causal_mask(own, own, scores)
        return softmax(scores, None), kept


def _scores(pairs: Pairs, scale: float, rows: slice, last: int) -> Tensor:
    parts = [grouped_product(q[:, :, rows] * scale, k[:, :, :last].mT) for q, k in pairs]
    return sum(parts[1:], parts[0])

"""A whole model in memory: logits, hidden states, generation with a cache. The runtime that evaluates."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import Checkpoint, Header, open_checkpoint
from deepseek_compress.checkpoint.reader import check_finite
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.models.activations import InputScheme, input_scheme
from deepseek_compress.models.architecture import Architecture
from deepseek_compress.models.attend import causal_mask
from deepseek_compress.models.cache import KvCache, cache_problems, kv_rounding
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.family import Family
from deepseek_compress.models.rope import known, places
from deepseek_compress.models.weights import ResidentWeights, Rows, Weights
from deepseek_compress.numerics.kv_cache import KvRounding

Choose = Callable[[Tensor, Sequence[int]], Tensor]  # logits (B, vocabulary), whose rows -> next tokens, int64 (B,)
COMPACT_BELOW = 0.75  # share of a batch still generating below which finished rows are dropped from the cache


class Model:
    """Weights by checkpoint name, and what they compute. Training may replace the tensors of `weights` in place."""

    def __init__(
        self,
        family: Family,
        cfg: ModelConfig,
        weights: Mapping[str, Tensor],
        scheme: InputScheme | None = None,
        kv_cache: KvRounding | None = None,
        tables: Mapping[str, Rows] = {},
    ) -> None:
        self.family = family
        self.cfg = cfg
        if kv_cache is not None:
            raise_problems(cache_problems(cfg, kv_cache))
        self.kv_cache = kv_cache
        self.int8 = scheme is not None and scheme.attention
        if self.int8 and kv_cache is not None and kv_cache.window is not None:
            raise DscError("kv_cache.window with attention in 8 bits", "leave window, or attention, out")
        if self.int8 and cfg.compressed is not None:
            what = f"attention: {cfg.model_type} has sinks and entries of many tokens, whose products stay 16-bit here"
            raise DscError(what, "leave attention out of the activations")
        self.weights = weights
        self.top = ResidentWeights(weights)
        blocks = Architecture(Header(Path(), {}, {}), family, cfg).blocks  # of weights that lie on no disk
        self.blocks: list[Weights] = [ResidentWeights(weights, block.prefix, tables) for block in blocks]
        if scheme is not None:
            self.blocks = [scheme.applied(*pair) for pair in zip(blocks, self.blocks, strict=True)]

    @classmethod
    def load(
        cls,
        source: Path | str | Checkpoint,
        dtype: torch.dtype = torch.float32,
        kv_cache: KvRounding | None = None,
        device: torch.device | str = "cpu",
    ) -> Model:
        """Read a checkpoint whole, decoded to `dtype` on `device`.

        Its manifest's schemes for activations and cache apply, the latter unless `kv_cache` gives another.

        Raises Problems with every missing, unknown or misshaped tensor.
        """
        checkpoint = source if isinstance(source, Checkpoint) else open_checkpoint(Path(source))
        architecture = Architecture.of(checkpoint)
        raise_problems(architecture.problems())
        family, unused = architecture.family, {**architecture.mtp, **architecture.vision}
        names = [name for name in architecture.tensors if name not in unused]
        large = {name for name in names if name.endswith(tuple(family.gathered))}
        weights = {name: checkpoint.read(name, dtype, device) for name in names if name not in large}
        tables = {name: partial(checkpoint.read_rows, name, dtype=dtype, device=device) for name in large}
        scheme, kv_cache = input_scheme(checkpoint.activations), kv_cache or kv_rounding(checkpoint.kv_cache)
        return cls(family, architecture.cfg, weights, scheme, kv_cache, tables)

    def cache(self, capacity: int | None) -> KvCache:
        """Return an empty cache for `capacity` tokens, which stores them as the model's scheme says."""
        return KvCache(self.cfg.num_hidden_layers, capacity, self.kv_cache, self.int8)

    def forward(
        self,
        tokens: Tensor,
        cache: KvCache | None = None,
        left_padding: Tensor | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """tokens (B, T) -> logits, float32 (B, T, vocab), or (B, 1, vocab) with `last_only`.

        With a cache, `tokens` follow those it holds. `left_padding` (B,): how many tokens at the start of each row
        (of the cache, where there is one) are padding. Padding at the right needs no mask: attention is causal.
        """
        hidden = self.hidden_states(tokens, cache, left_padding)[-1]
        return self.logits(hidden[:, -1:] if last_only else hidden)

    __call__ = forward

    def logits(self, hidden: Tensor) -> Tensor:
        """Return what the last block gives (B, T, *row_shape) -> float32 (B, T, vocab)."""
        return functional.linear(self.family.final_hidden(self.cfg, self.top, hidden), self.head).float()

    @property
    def head(self) -> Tensor:
        """(vocab, hidden): the output embedding."""
        names = self.cfg.names
        return self.weights[names.embedding if self.cfg.tie_word_embeddings else names.head]

    def hidden_states(
        self, tokens: Tensor, cache: KvCache | None = None, left_padding: Tensor | None = None
    ) -> list[Tensor]:
        """Return the input of each block, and what the last one gives: num_hidden_layers + 1 tensors (B, T, hidden)."""
        batch, new = tokens.shape
        past = 0 if cache is None else cache.length
        positions = places(batch, past, new, tokens.device)
        hidden = self.family.embed(self.cfg, self.weights[self.cfg.names.embedding], tokens)
        mask = None
        if cache is None and (self.int8 or self.kv_cache is not None):
            cache = self.cache(None)  # attention reads what a cache would give back
        if left_padding is not None:
            mask = padding_mask(left_padding, new, past + new, hidden)
            positions = known((positions - left_padding[:, None]).clamp(min=0), past + new)
        states = [hidden]
        for layer, weights in enumerate(self.blocks):
            states.append(self.family.run_block(self.cfg, layer, weights, states[-1], positions, mask, cache, tokens))
        if cache is not None:
            cache.length += new
        return states

    @torch.no_grad()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        eos: int | Collection[int] | None = None,
        batch_size: int = 256,
        choose: Choose | None = None,
        ended: Callable[[Sequence[int]], bool] = lambda ids: False,
    ) -> list[list[int]]:
        """Continuation of each prompt: up to `max_new_tokens` ids, the end token not among them.

        Prompts of similar length share a batch, padded at the left; finished rows leave it. `eos` None: the model's.
        `choose(logits (B, vocab), indices of the prompts)` gives the next tokens (B,), the likeliest by default;
        `ended` says after each token of a row whether what it wrote is enough.
        """
        choose = choose or greedy
        ends = self.cfg.eos_token_ids if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)
        if not self.family.cached:
            return [self._without_cache(i, p, max_new_tokens, ends, choose, ended) for i, p in enumerate(prompts)]
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        out: list[list[int]] = [[] for _ in prompts]
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            found = self._batch([prompts[i] for i in chosen], chosen, max_new_tokens, ends, choose, ended)
            for index, ids in zip(chosen, found, strict=True):
                out[index] = ids
        return out

    def _without_cache(
        self,
        index: int,
        prompt: Sequence[int],
        limit: int,
        ends: Collection[int],
        choose: Choose,
        ended: Callable[[Sequence[int]], bool],
    ) -> list[int]:
        """One prompt, the whole text again for each token."""
        tokens, device = list(prompt), self.head.device
        while len(tokens) < len(prompt) + limit:
            logits = self.forward(torch.tensor([tokens]).to(device), last_only=True)[:, -1]
            following = int(choose(logits, [index]))
            if following in ends:
                break
            tokens.append(following)
            if ended(tokens[len(prompt) :]):
                break
        return tokens[len(prompt) :]

    def _batch(
        self,
        prompts: Sequence[Sequence[int]],
        indices: Sequence[int],
        limit: int,
        ends: Collection[int],
        choose: Choose,
        ended: Callable[[Sequence[int]], bool],
    ) -> list[list[int]]:
        """Complete one batch; `indices`: what `choose` knows the prompts by."""
        device = self.head.device
        width = max(1, *(len(prompt) for prompt in prompts))
        padding = torch.tensor([width - len(prompt) for prompt in prompts]).to(device)
        tokens = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts]).to(device)
        left = padding if bool(padding.any()) else None
        cache = self.cache(width + limit)
        stop = torch.tensor(sorted(ends), dtype=torch.long).to(device)
        out: list[list[int]] = [[] for _ in prompts]
        rows = torch.arange(len(prompts), device=device)  # which prompt each row of the batch is
        alive = torch.ones(len(prompts), dtype=torch.bool, device=device)
        for step in range(limit):
            logits = self.forward(tokens, cache, left, last_only=True)[:, -1]
            following = choose(logits, [indices[row] for row in rows.tolist()])
            alive &= ~torch.isin(following, stop)
            for place, (row, token) in enumerate(zip(rows.tolist(), following.tolist(), strict=True)):
                if alive[place]:
                    out[row].append(token)
                    alive[place] = not ended(out[row])
            going_on = int(alive.sum())
            if not going_on or step + 1 == limit:
                break
            if going_on < COMPACT_BELOW * len(rows):
                kept = alive.nonzero()[:, 0]
                cache.keep_rows(kept)
                rows, following, alive = rows[kept], following[kept], alive[kept]
                left = None if left is None else left[kept]
            tokens = following[:, None]
        return out


def greedy(logits: Tensor, rows: Sequence[int] = ()) -> Tensor:
    """(B, vocab) -> the likeliest token of each row. Raises DscError for logits that are NaN or infinite."""
    check_finite("logits of the model", logits)
    return logits.argmax(-1)


def padding_mask(left_padding: Tensor, new: int, seen: int, like: Tensor) -> Tensor:
    """Additive (B, 1, new, seen): causal, and nothing looks at padding but padding itself (its own place)."""
    place = torch.arange(seen, device=like.device)
    padded = place < left_padding[:, None]  # (B, seen)
    mask = torch.zeros(len(left_padding), 1, new, seen, dtype=like.dtype, device=like.device)
    mask = mask.masked_fill(padded[:, None, None, :], float("-inf"))
    own = place == place[seen - new :, None]  # (new, seen)
    return (mask + causal_mask(new, seen, like)).masked_fill(own, 0.0)

"""Calibrate: run calibration text through the model, a block at a time, and tell what each linear sees.

For each linear: tokens that reached it, the largest and the mean magnitude of its input, and how far its largest
channel stands above the median one, which is what makes 8-bit activations hard. For each mixture-of-experts block: how
many tokens each expert got, which tells whether the text is enough to solve it. Nothing of the model is changed.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import write_json
from deepseek_compress.costs import Memory, Work
from deepseek_compress.models import Family, ModelConfig, family_of
from deepseek_compress.models.config import Linear
from deepseek_compress.models.weights import ObservingWeights, StreamedWeights
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.text import calibration_text

BATCH_TOKENS = 8192  # weights are read once for so many
FILE = "calibration.json"
WORK = ".dsc_text"


@dataclass
class _Seen:
    """What reached one linear: (columns,) each."""

    tokens: int = 0
    largest: Tensor = field(default_factory=lambda: torch.zeros(1))
    total: Tensor = field(default_factory=lambda: torch.zeros(1))

    def add(self, x: Tensor) -> None:
        """Take in x (..., columns)."""
        rows = x.reshape(-1, x.shape[-1]).abs()
        if len(rows):
            self.tokens += len(rows)
            self.largest = torch.maximum(self.largest, rows.amax(0))
            self.total = self.total + rows.sum(0)


class Calibrate(Stage, frozen=True):
    """Input ranges of each linear and tokens of each expert, as a JSON file."""

    writes: ClassVar[str] = "artifact"

    def reads_text(self, header: Header) -> bool:
        """Yes."""
        return True

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Two operations a weight and token; the text is held at the width of the model."""
        cfg = family_of(header.config).parse(header.config)
        tokens = samples * length
        active = sum(info.elements for name, info in header.tensors.items() if ".experts." not in name)
        return Forecast(header, bytes=0, memory=Memory(8 * tokens * cfg.hidden_size), work=Work(2.0 * active * tokens))

    @torch.no_grad()
    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write `calibration.json`."""
        family = family_of(source.config)
        cfg = family.parse(source.config)
        text = calibration_text(source, context, context.out / WORK)
        shutil.rmtree(context.out / WORK, ignore_errors=True)
        tokens = text.tokens
        hidden = family.embed(cfg, source.read("model.embed_tokens.weight"), tokens)
        blocks = []
        for layer in range(cfg.num_hidden_layers):
            context.progress(layer, cfg.num_hidden_layers, f"block {layer}")
            hidden, seen = _block(source, family, cfg, layer, hidden, tokens)
            blocks.append(_facts(family, cfg, layer, seen))
        context.progress(cfg.num_hidden_layers, cfg.num_hidden_layers, "blocks done")
        manifest = provenance.build_manifest(
            stage="calibrate",
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            extra={"calibration": text.facts},
        )
        path = context.out / FILE
        write_json(path, {"schema": 1, "tokens": tokens.numel(), "blocks": blocks})
        write_json(context.out / "dsc_manifest.json", manifest)
        return Output("artifact", path, _summary(blocks, tokens.numel()))


def _block(
    source: Checkpoint, family: Family, cfg: ModelConfig, layer: int, hidden: Tensor, tokens: Tensor
) -> tuple[Tensor, dict[str, _Seen]]:
    """hidden (samples, length, ...) of tokens (samples, length) through one block; what its linears saw."""
    seen = {linear.name: _Seen() for linear in family.linears(cfg, layer)}

    def look(name: str, x: Tensor) -> None:
        if name in seen:
            seen[name].add(x)

    weights = ObservingWeights(StreamedWeights(source, family.prefix(layer) + "."), look)
    samples, length = hidden.shape[:2]
    positions = torch.arange(length)
    step = max(1, BATCH_TOKENS // length)
    parts = [
        family.run_block(cfg, layer, weights, part, positions.expand(len(part), -1), tokens=ids)
        for part, ids in zip(torch.split(hidden, step), torch.split(tokens, step), strict=True)
    ]
    return torch.cat(parts).view(samples, length, *hidden.shape[2:]), seen


def _facts(family: Family, cfg: ModelConfig, layer: int, seen: Mapping[str, _Seen]) -> dict[str, Any]:
    linears = family.linears(cfg, layer)
    facts: dict[str, Any] = {"layer": layer, "linears": [_linear(linear, seen[linear.name]) for linear in linears]}
    experts = [
        row["tokens"] for row in facts["linears"] if row["role"] == "expert" and row["name"].endswith("gate_proj")
    ]
    if experts:
        facts["experts"] = {"tokens": experts, "unreached": experts.count(0)}
    return facts


def _linear(linear: Linear, seen: _Seen) -> dict[str, Any]:
    median = float(seen.largest.median())
    return {
        "name": linear.name,
        "role": str(linear.role),
        "tokens": seen.tokens,
        "absmax": float(seen.largest.max()) if seen.tokens else None,
        "absmean": float(seen.total.mean()) / seen.tokens if seen.tokens else None,
        "outlier": float(seen.largest.max()) / median if median else None,
    }


def _summary(blocks: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
    rows = [row for block in blocks for row in block["linears"] if row["absmax"] is not None]
    experts = [count for block in blocks for count in block.get("experts", {}).get("tokens", [])]
    return {
        "tokens": tokens,
        "largest input": max((row["absmax"] for row in rows), default=None),
        "largest outlier": max((row["outlier"] for row in rows if row["outlier"] is not None), default=None),
        "experts without a token": experts.count(0) if experts else None,
        "fewest tokens of an expert": min(experts, default=None),
    }

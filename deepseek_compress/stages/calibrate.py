"""Calibrate: run calibration text through the model, a block at a time, and keep what each linear sees.

Kept in `statistics-*.safetensors`, for `dsc quantize --statistics`: of each input that linears share the Hessian (the
sum over tokens of x x^T), the largest and the mean magnitude of each channel; with `statistics: ranges` the magnitudes
alone. Told in `calibration.json`: for each linear tokens that reached it, the largest and the mean magnitude of its
input, and how far its largest channel stands above the median one, which is what makes 8-bit activations hard; for each
mixture-of-experts block how many tokens each expert got, which tells whether the text is enough to solve it.

The inputs are those of the model as it is. A run that calibrates itself shows each linear what the changed ones before
it give, which saved statistics cannot. An interrupted run goes on after its last finished block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Literal

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove_tree, write_json, write_sealed
from deepseek_compress.checkpoint.owned import PARTIAL, announce
from deepseek_compress.checkpoint.statistics import FIELDS, STAGE, StatisticsWriter
from deepseek_compress.checkpoint.verified import MANIFEST
from deepseek_compress.compress.collection import collecting, expected
from deepseek_compress.compress.convert import clean, convert_with_text
from deepseek_compress.compress.passes import collecting_passes
from deepseek_compress.models import Architecture
from deepseek_compress.stages.base import Context, Forecast, Output, Stage
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.stages.saved import tokenizer_hash
from deepseek_compress.stages.text import calibration_text
from deepseek_compress.streaming.hidden_store import scratch
from deepseek_compress.workers import open_pool

FILE = "calibration.json"
WORK = ".dsc_blocks"


class Calibrate(Stage, frozen=True):
    """Statistics of each linear's input to quantise with, and what they tell of the text."""

    writes: ClassVar[str] = "artifact"
    shares: ClassVar[bool] = True
    statistics: Literal["hessian", "ranges"] = "hessian"  # what is kept of an input; ranges are small

    @property
    def fields(self) -> Sequence[str]:
        """Statistics that are collected of each input."""
        return FIELDS if self.statistics == "hessian" else [field for field in FIELDS if field != "hessian"]

    def reads_text(self, header: Header) -> bool:
        """Return True, whatever the model."""
        return True

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Sizes, memory and work from shapes."""
        architecture = Architecture.of(header)
        size, memory, work, tasks = expected(architecture, self.fields, samples, length)
        read = header.bytes
        return Forecast(
            header,
            bytes=size,
            memory=memory,
            work=work,
            tasks=tasks,
            read=read,
            scratch=scratch(architecture, samples * length),
        )

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the statistics and `calibration.json`."""
        architecture, work = context.architecture(source), context.out / WORK
        text = calibration_text(source, context, work)
        Resumable.of(source, self.model_dump(mode="json"), text.tokens, device=context.device).claim(context.out, work)
        forecast = self.forecast(source.header, *text.tokens.shape)
        workers, memory = context.count(forecast), forecast.memory
        job = collecting(architecture, self.fields, work)
        writer = StatisticsWriter(context.out, [[b.prefix + name for name in b.tensors] for b in architecture.blocks])
        passes = collecting_passes(context.progress, architecture, self.fields, text.tokens.shape, workers)
        with open_pool(job, workers, context.ray, memory.task if memory else 0, context.places) as pool:
            done = convert_with_text(job, writer, pool, text.tokens, passes.of("collect"))
        blocks = [_facts(layer, block) for layer, block in enumerate(done.blocks)]
        announce(context.out, [FILE])
        write_json(context.out / FILE, {"schema": 1, "tokens": text.tokens.numel(), "blocks": blocks})
        saved = {"fields": sorted(self.fields), "files": writer.finish(), "tokenizer": tokenizer_hash(source)}
        manifest = provenance.build_manifest(
            stage=STAGE,
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            knobs=self.model_dump(mode="json"),
            hashes=done.hashes,
            extra={"calibration": text.facts, "statistics": saved},
        )
        write_sealed(context.out / MANIFEST, manifest)
        remove_tree(context.out / PARTIAL)
        clean(job)
        return Output("artifact", context.out, _summary(blocks, text.tokens.numel()))


def _facts(layer: int, block: dict[str, Any]) -> dict[str, Any]:
    facts: dict[str, Any] = {"layer": layer, "linears": block["linears"]}
    if "experts" in block:
        tokens = block["experts"]["tokens"]
        facts["experts"] = {"tokens": tokens, "unreached": tokens.count(0)}
    return facts


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

"""Compress: 2:4 sparsity, low-bit weights, 8-bit activations and a low-bit cache, in one pass over the blocks.

With `migration` the text runs through the model once before that, to find scales that move from inputs into weights;
`rotation` turns the model first, without any text.
Each linear is made sparse first and quantised after it with the same statistics; the quantiser keeps the zeros. Without
`weights` the output is a plain 16-bit checkpoint; without a part that needs statistics, no block is run.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, SerializeAsAny
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter, Header
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.compress import loss, moved_scales, ranges, rotation, row_tables, selection, summary, tables
from deepseek_compress.compress.convert import clean, convert
from deepseek_compress.compress.forecast import TEXT, expect
from deepseek_compress.compress.job import Job
from deepseek_compress.compress.overrides import Override, build_all, counted
from deepseek_compress.compress.passes import foreseen
from deepseek_compress.compress.solver import LinearSolver
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture, ModelConfig, Role
from deepseek_compress.models.activations import InputScheme
from deepseek_compress.models.cache import cache_note, cache_problems
from deepseek_compress.numerics import ACTIVATIONS, MIGRATION, ROTATION, SPARSITY, WEIGHTS
from deepseek_compress.numerics.activations import Activations, Dynamic, InputGrid, Static
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.numerics.migration import Migration
from deepseek_compress.numerics.rotation import Hadamard
from deepseek_compress.numerics.types import Sparsifier, WeightQuantizer
from deepseek_compress.planning.costs import Memory, total
from deepseek_compress.planning.passes import Passes
from deepseek_compress.stages.base import Context, Forecast, Output, Stage, picked
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.stages.saved import Saved, saved_problems, saved_statistics
from deepseek_compress.stages.text import Text, calibration_text
from deepseek_compress.streaming import collect
from deepseek_compress.streaming.hidden_store import scratch
from deepseek_compress.workers import open_pool

PARTS = ("rotation", "migration", "sparsity", "weights", "embedding", "head", "engram", "activations", "kv_cache")
WORK = ".dsc_blocks"  # in the output directory, while a run is unfinished
KEPT = (Role.ROUTER, Role.NORM, Role.EMBEDDING, Role.HEAD, Role.MTP, Role.INDEXER, Role.ENGRAM)


class Compress(Stage, frozen=True):
    """Make the linears of every block smaller, and embedding and head; routers, norms and MTP blocks stay 16-bit."""

    takes_statistics: ClassVar[bool] = True
    shares: ClassVar[bool] = True
    sparsity: Annotated[SerializeAsAny[Sparsifier] | None, picked(SPARSITY, "sparsity")] = None
    rotation: Annotated[Hadamard | None, picked(ROTATION, "rotation")] = None
    migration: Annotated[SerializeAsAny[Migration] | None, picked(MIGRATION, "migration")] = None
    weights: Annotated[SerializeAsAny[WeightQuantizer] | None, picked(WEIGHTS, "weights")] = None
    activations: Annotated[SerializeAsAny[Activations] | None, picked(ACTIVATIONS, "activations")] = None
    embedding: tables.Embedding | None = None  # a tied head with it; None: 16 bits
    head: tables.Head | None = None  # of its own; None: 16 bits
    engram: row_tables.Engram | None = None  # how Engram tables are stored; None: byte for byte, as servers read them
    kv_cache: KvRounding | None = None  # how keys and values are stored where the output is evaluated
    overrides: Annotated[tuple[Override, ...], BeforeValidator(build_all)] = ()  # the last that matches decides
    every_token_bits: int | None = Field(None, ge=2, le=8)  # of what every token of a mixture of experts goes through
    attention_bits: int | None = Field(None, ge=2, le=8)  # of the linears of attention, of any model
    keep: tuple[Role, ...] = KEPT  # roles whose linears stay 16-bit; embedding and head have parts of their own
    mtp: Literal["keep", "drop"] = "keep"  # multi-token prediction blocks: kept in 16 bits, or left out
    vision: Literal["keep", "drop"] = "keep"  # what only images need: kept byte for byte, or left out
    requantize: bool = False  # change experts that are published in MXFP4 too: few bits to gain, accuracy to lose
    min_tokens: int = Field(64, ge=0)  # a linear whose input fewer tokens reach is solved without statistics

    @property
    def roles(self) -> frozenset[Role]:
        """Roles whose linears change, and whose inputs are rounded."""
        return frozenset(selection.CHANGEABLE) - frozenset(self.keep)

    def _changed(self, header: Header) -> frozenset[Role]:
        """Roles whose weights change: experts in MXFP4 stay as they are unless the recipe asks."""
        return self.roles if self.requantize or not header.mxfp4 else self.roles - {Role.EXPERT}

    def _manifest_scheme(self, inputs: Mapping[str, InputGrid]) -> dict[str, Any] | None:
        """Return the activation scheme as manifests carry it; `inputs`: the grids of a static one."""
        if self.activations is None:
            return None
        method = next(name for name, kind in ACTIVATIONS.items() if isinstance(self.activations, kind))
        knobs = self.activations.model_dump(mode="json")
        scheme = {"method": method, **knobs, "roles": sorted(str(role) for role in self.roles)}
        grids = {name: [grid.scale, grid.zero_point] for name, grid in inputs.items()}
        return {**scheme, "inputs": grids} if grids else scheme

    def problems(self, header: Header) -> list[DscError]:
        """Report a group size or pattern that does not fit, weights that are packed already, nothing to do."""
        if all(getattr(self, part) is None for part in PARTS):
            return [DscError("compress: nothing to do", f"give one of {', '.join(PARTS)}")]
        architecture = Architecture.of(header)
        found = architecture.problems()
        if found:
            return found
        cfg, roles = architecture.cfg, self._changed(header)
        found = selection.problems(architecture, roles, self.weights, self.sparsity, self._overrides(architecture))
        found += [] if self.rotation is None else rotation.problems(architecture, self.mtp == "keep")
        found += [] if self.migration is None else selection.packed_problems(header, "migration")
        found += tables.problems(architecture, self.embedding, self.head)
        found += row_tables.problems(architecture, self.engram)
        return [*found, *([] if self.kv_cache is None else cache_problems(cfg, self.kv_cache))]

    def reads_text(self, header: Header) -> bool:
        """Whether a part needs statistics."""
        return bool(self._needs(header))

    def statistics_problems(self, source: Checkpoint, wanted: Calibration) -> list[DscError]:
        """Fields that are not there, another model, other text."""
        needs = self._needs_saved(source.header)
        return saved_problems(source, wanted, needs) if needs else []

    def _needs_saved(self, header: Header) -> frozenset[str]:
        """Likewise of saved statistics: GPTAQ that decides its strength then corrects nothing."""
        decides = isinstance(self.weights, Gptaq) and self.weights.strength is None
        return self._needs(header) - ({"cross_covariance"} if decides else set())

    def _needs(self, header: Header) -> frozenset[str]:
        """Return which statistics of inputs are needed; "text" where that alone serves."""
        architecture = Architecture.of(header)
        moving = self._moving(architecture.cfg)
        needs = self._solver(architecture).needs | (moving.needs if moving else set())
        own = isinstance(self.activations, Static) or (
            self.rotation is not None and needs
        )  # no statistics of others fit
        return needs | {"text"} if own else needs

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Sizes, memory and work from shapes."""
        architecture = Architecture.of(header)
        decisions = tuple(self._decisions(architecture))
        dropped = set(architecture.mtp if self.mtp == "drop" else ())
        dropped |= set(architecture.vision if self.vision == "drop" else ())
        if dropped:
            header = replace(header, tensors={name: i for name, i in header.tensors.items() if name not in dropped})
            architecture = Architecture.of(header)
        if self.rotation is not None:
            header = rotation.rotated_header(architecture)
            architecture = Architecture.of(header)
        solver, samples = self._solver(architecture), self._used(samples, max(1, length), architecture)
        tabled = tables.changed(architecture, self.embedding, self.head)
        rows = row_tables.changed(architecture, self.engram)
        expected = expect(architecture, solver, samples if solver.needs else 0, length, tabled, rows)
        moving = self._moving(architecture.cfg)
        looked_at = min(samples, (moving and moving.samples) or samples)
        before = collect.cost(architecture, looked_at, length) if moving else collect.NOTHING
        looked = self._range_cost(architecture, samples, length)
        rotating, memory = 0 if self.rotation is None else rotation.cost(header), expected.memory
        judging = TEXT + loss.cost(architecture.cfg) if self.sparsity is not None and samples and solver.needs else 0
        alone = max(memory.alone, before.memory, looked.memory, rotating, judging)
        task = max(memory.task, rotating if memory.task else 0)
        loads = max((part.loads for part in (self.weights, self.migration) if part), default=0)
        return Forecast(
            expected.header,
            expected.changed,
            expected.bytes,
            Memory(alone + loads, memory.resident + loads, task and task + loads),
            total((before.work, looked.work, expected.work)),
            expected.tasks,
            read=header.bytes,
            scratch=scratch(architecture, samples * length) if solver.needs else 0,
            decisions=decisions,
        )

    def _moving(self, cfg: ModelConfig) -> Migration | None:
        """`migration`, where the family has a place for scales."""
        return None if cfg.compressed is not None else self.migration

    def _range_cost(self, architecture: Architecture, samples: int, length: int) -> collect.Cost:
        """Of the run that finds the grids of static activations."""
        if not isinstance(self.activations, Static):
            return collect.NOTHING
        found = collect.cost(architecture, samples, length)
        return found._replace(memory=found.memory + ranges.cost(architecture))

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write the compressed checkpoint to `context.out`; goes on where an interrupted run stopped."""
        architecture, work = context.architecture(source), context.out / WORK
        decisions = self._decisions(architecture)
        context.tell_all(decisions)
        text, saved = self._data(source, context, work)
        tokens, cut = (None, []) if text is None else self._enough(text.tokens, architecture)
        context.tell_all(cut)
        memory, workers = self._share(source, tokens, context)
        digest = saved.digest if saved else tokens
        Resumable.of(source, self.model_dump(mode="json"), digest, device=context.device).claim(context.out, work)
        passes = self._passes(architecture, tokens, workers, context)
        job, noted = self._job(architecture, work, tokens, saved, passes)
        context.tell_all(noted)
        activations = self._manifest_scheme(job.scheme.inputs if job.scheme else {})
        with (
            CheckpointWriter(context.out, job.source, activations=activations, resume=True) as writer,
            open_pool(job, workers, context.ray, memory.task, context.places) as pool,
        ):
            read = tokens if job.solver.needs else None
            done = convert(job, writer, pool, read, passes.of("solve"), passes.of("judge"))
            if job.solver.needs and tokens is not None:
                writer.join()  # a shard a block
            corrected = summary.corrections(done.blocks) + summary.starved(done.blocks, self.min_tokens)
            corrected += done.loss.notes() if done.loss else self._not_judged()
            context.tell_all(corrected)
            facts = {**summary.summarize(done.blocks), "decisions": decisions + cut + noted + corrected}
            facts |= {"tables": done.tables} if done.tables else {}
            facts |= {"loss": done.loss._asdict()} if done.loss else {}
            card = done.loss.card() if done.loss else ""
            summary.write(context.out, done.blocks)
            manifest = self._manifest(source, context, saved or text, facts, done.hashes)
            notes = writer.finish(self._config_changes(architecture), manifest, _ignore(architecture, job.rows), card)
        clean(job)
        context.tell_all(notes)
        return Output("checkpoint", context.out, {**facts, "notes": notes})

    def _data(self, source: Checkpoint, context: Context, work: Path) -> tuple[Text | None, Saved | None]:
        """Read the text, or the statistics that were collected before; neither where nothing needs them."""
        needs = self._needs(source.header)
        saved = saved_statistics(source, context, self._needs_saved(source.header)) if needs else None
        return calibration_text(source, context, work) if needs and saved is None else None, saved

    def _used(self, samples: int, length: int, architecture: Architecture) -> int:
        """Return how many of the samples of calibration text the method needs."""
        weights, moe = self._solver(architecture).weights, architecture.cfg.moe
        enough = weights.enough if isinstance(weights, Gptaq) else None
        each = 1.0 if moe is None else moe.top_k / moe.experts  # share of the tokens that reach a linear
        return samples if enough is None else min(samples, math.ceil(enough / each / length))

    def _enough(self, tokens: Tensor, architecture: Architecture) -> tuple[Tensor, list[str]]:
        """Cut tokens (samples, length) to the samples that are used; return a note where some are not."""
        samples, length = tokens.shape
        count = self._used(samples, length, architecture)
        line = f"{count} of {samples} samples used, which is enough for each linear (weights.gptaq.enough=null: all)"
        return tokens[:count], [line] if count < samples else []

    def _job(
        self, architecture: Architecture, work: Path, tokens: Tensor | None, saved: Saved | None, passes: Passes
    ) -> tuple[Job, list[str]]:
        """Build the job of the block loop, with notes; scales and ranges are found here."""
        statistics = saved and saved.statistics
        solver, judged = self._solver(architecture), self.sparsity is not None and tokens is not None
        job = Job(architecture, solver, work, None, self.mtp == "keep", statistics=statistics, judged=judged)
        if self.rotation is not None:
            job = rotation.rotate(job, self.rotation)
        job = replace(
            job,
            tables=tables.changed(job.architecture, self.embedding, self.head),
            rows=row_tables.changed(job.architecture, self.engram),
            keep_vision=self.vision == "keep",
        )
        if (moving := self._moving(job.cfg)) is not None:
            job = moved_scales.migrate(job, tokens, moving, passes.of("scales"))
        if isinstance(self.activations, Static) and tokens is not None:
            found = ranges.find(job, tokens, self.activations, self.roles, passes.of("ranges"))
            return replace(job, scheme=InputScheme(None, self.roles, inputs=found.inputs)), found.notes()
        scheme = InputScheme(self.activations, self.roles) if isinstance(self.activations, Dynamic) else None
        return replace(job, scheme=scheme), []

    def _passes(self, architecture: Architecture, tokens: Tensor | None, workers: int, context: Context) -> Passes:
        samples, length = (0, 1) if tokens is None else tokens.shape
        moving = self._moving(architecture.cfg)
        before = {} if moving is None else {"scales": moving.samples or samples}
        before |= {"ranges": samples} if isinstance(self.activations, Static) else {}
        return foreseen(context.progress, architecture, self._solver(architecture), (samples, length), before, workers)

    def _not_judged(self) -> list[str]:
        """Say that nobody knows yet what the zeros cost."""
        line = "no text was read, so what the zeros cost was not measured: dsc evaluate OUT --reference MODEL"
        return [line] if self.sparsity is not None else []

    def _share(self, source: Checkpoint, tokens: Tensor | None, context: Context) -> tuple[Memory, int]:
        """Return the memory that is needed, and how many workers fit."""
        samples, length = (0, 0) if tokens is None else tokens.shape
        forecast = self.forecast(source.header, samples, length)
        assert forecast.memory is not None
        workers = context.count(forecast)
        if context.workers is not None and workers < context.workers:
            context.tell(f"{workers} workers, not {context.workers}: --memory has no room for more")
        return forecast.memory, workers

    def _solver(self, architecture: Architecture) -> LinearSolver:
        roles = self._changed(architecture.header)
        weights = self.weights
        if isinstance(weights, Gptaq) and _too_large(weights, architecture.header):
            weights = weights.uncorrected()
        chosen = selection.select(architecture, roles, weights, self._overrides(architecture))
        return LinearSolver(chosen, self.sparsity, weights, self.min_tokens)

    def _overrides(self, architecture: Architecture) -> tuple[Override, ...]:
        """Those of the recipe, after those for whole roles."""
        bits = () if self.weights is None else self._bits_of_roles(architecture.cfg)
        return (*selection.of_roles(architecture, self._changed(architecture.header), bits), *self.overrides)

    def _bits_of_roles(self, cfg: ModelConfig) -> tuple[tuple[int, frozenset[Role]], ...]:
        every_token = None if cfg.moe is None else self.every_token_bits
        both = ((every_token, selection.EVERY_TOKEN), (self.attention_bits, frozenset({Role.ATTENTION})))
        return tuple((bits, roles) for bits, roles in both if bits is not None)

    def _decisions(self, architecture: Architecture) -> list[str]:
        """Say what was decided, and why, one line each."""
        lines, cfg, header = [], architecture.cfg, architecture.header
        chosen = self._solver(architecture).selection
        if isinstance(self.weights, Gptaq) and _too_large(self.weights, architecture.header):
            lines.append(
                f"gptq: no correction of more than {self.weights.largest} weights (weights.gptaq.largest=null)"
            )
        if self.weights is not None and self.weights.group_size is None:
            size = "one scale a row" if chosen.group_size is None else f"group_size {chosen.group_size}"
            lines.append(f"{size} (chosen: the largest that fits)")
        lines += counted(chosen.own, self.weights)
        if self.migration is not None and self._moving(cfg) is None:
            lines.append(f"no scales moved: {cfg.model_type} mixes its streams before each norm")
        if chosen.left:
            lines.append(f"kept in 16 bits, since the group size does not fit: {', '.join(sorted(chosen.left))}")
        if header.mxfp4 and not self.requantize and (self.weights or self.sparsity):
            lines.append("routed experts keep their MXFP4 values (requantize: true changes them)")
        if architecture.family.kept and (self.weights or self.sparsity):
            lines.append(f"kept in 16 bits: {architecture.family.kept}")
        if architecture.has_mtp:
            lines.append(_mtp_note(architecture) if self.mtp == "keep" else "MTP block left out")
        if self.rotation is not None and cfg.tie_word_embeddings:
            lines.append("the head is a tensor of its own now: a rotation parts it from the embedding")
        lines += row_tables.decisions(architecture, self.engram)
        if architecture.has_vision:
            lines.append("image encoder kept byte for byte" if self.vision == "keep" else "image encoder left out")
        lines += tables.decisions(cfg.tie_word_embeddings and self.rotation is None, self.embedding, self.head)
        if self.activations is not None:
            lines.append(self._inputs_note(cfg, chosen.group_size is None))
        if self.kv_cache is not None:
            lines.append(cache_note(cfg, self.kv_cache))
        return lines

    def _inputs_note(self, cfg: ModelConfig, channels: bool) -> str:
        """Who rounds inputs as the scheme says. `channels`: weights have one scale a row."""
        assert self.activations is not None
        bits, symmetric = self.activations.num_bits, self.activations.symmetric
        weights, mixed = self.weights, self.overrides or self._bits_of_roles(cfg)
        served = weights is not None and weights.symmetric and not mixed
        anywhere = symmetric and isinstance(self.activations, Dynamic)
        if served and (anywhere or (channels and cfg.moe is None)):
            return f"{bits}-bit activations stand in config.json, as compressed-tensors and vLLM read them"
        return f"{bits}-bit activations stand in the manifest, for evaluation and ONNX; servers run with 16-bit ones"

    def _manifest(
        self,
        source: Checkpoint,
        context: Context,
        text: Text | Saved | None,
        facts: Mapping[str, Any],
        hashes: Mapping[str, str],
    ) -> dict[str, Any]:
        cache = {} if self.kv_cache is None else {"kv_cache": self.kv_cache.document()}
        threads = torch.get_num_threads() if isinstance(text, Text) else None  # sums over text depend on it
        return provenance.build_manifest(
            stage="compress",
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            knobs=self.model_dump(mode="json"),
            hashes=hashes,
            extra={**cache, "calibration": text and text.facts, "threads": threads, "facts": dict(facts)},
        )

    def _config_changes(self, architecture: Architecture) -> dict[str, Any]:
        """num_nextn_predict_layers is 0 where the MTP block is not there: engines break when it is announced."""
        family, found = architecture.family, dict[str, Any]()
        stays = architecture.has_mtp and self.mtp == "keep"
        if architecture.cfg.num_nextn_predict_layers and not stays:
            found |= family.without_drafts(architecture.header.config)
        return found if architecture.has_vision and self.vision == "keep" else {**found, **family.without_vision()}


def _too_large(weights: Gptaq, header: Header) -> bool:
    """Whether a model has more weights than are corrected."""
    return weights.largest is not None and sum(info.elements for info in header.tensors.values()) > weights.largest


def _mtp_note(architecture: Architecture) -> str:
    if any(architecture.family.untouched(name) for name in architecture.mtp):
        return "MTP block kept byte for byte"
    given = architecture.header.tensors
    experts = any(given[name].encoding == "mxfp4" for name in architecture.mtp if name in given)
    return "MTP block kept: its experts in MXFP4, the rest in 16 bits" if experts else "MTP block kept in 16 bits"


def _ignore(architecture: Architecture, rows: Collection[str]) -> list[str]:
    """Modules that stay plain; those of `rows` do not."""
    own = [pattern for pattern in architecture.family.ignored() if not (rows and "engram" in pattern)]
    router = re.escape(module_of(architecture.cfg.names.ffn.router)[0])
    return ["lm_head", *([f"re:.*{router}$"] if architecture.cfg.moe else []), *own]

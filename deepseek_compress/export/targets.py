"""The targets of `dsc export`, one function each: `target(source, out, settings) -> Exported`.

| target | writes | run by |
|---|---|---|
| `onnx` | model.onnx, standard operators only | any run-time that knows opset 21 |
| `onnxruntime` | model.onnx with MatMulNBits | onnxruntime |
| `tensorrt-rtx`, `tensorrt` | model.onnx in TensorRT's types, and model.engine | TensorRT-RTX, TensorRT |
| `compressed-tensors` | the packed checkpoint, every byte checked | vLLM, transformers |
| `bf16` | the checkpoint as plain BF16 | everything that loads safetensors |
| `triton` | a model repository with model.onnx, a Kubernetes manifest | Triton Inference Server |
| `gguf` | model.gguf, for Llama and Qwen2 | llama.cpp and what is built on it |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepseek_compress.checkpoint import Checkpoint, CheckpointWriter
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export import BATCH, COMPUTE_CAPABILITIES, NEW, PAST, Range

ONNX, ENGINE, GGUF = "model.onnx", "model.engine", "model.gguf"
VERIFIED_BYTES = 2 << 30  # an export streams; comparing needs the whole model in memory
RAN, BUILT = "ran in onnxruntime", "built, not run"


@dataclass(frozen=True)
class Settings:
    """Knobs of the targets. `manifest` is what the output's dsc_manifest.json says about its origin."""

    target: str = "onnx"
    precision: str = "auto"
    compute_capabilities: tuple[str, ...] = COMPUTE_CAPABILITIES
    batch: Range = BATCH
    new: Range = NEW
    past: Range = PAST
    accuracy_level: int = 4
    embedding_bits: int = 16
    last_only: bool = False
    verify: bool | None = None  # None: where the model in FP32 fits into VERIFIED_BYTES
    prompts: Sequence[Sequence[int]] = ()  # calibration tokens to verify with, besides random ones
    manifest: Mapping[str, Any] = field(default_factory=dict)
    tell: Callable[[str], None] = print


@dataclass(frozen=True)
class Exported:
    """What a target left behind: `kind` as in `stages.base.Output`."""

    kind: str
    path: Path
    facts: dict[str, Any]


Target = Callable[[Checkpoint, Path, Settings], Exported]


def export(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """Write `source` for `settings.target` below the directory `out`."""
    out.mkdir(parents=True, exist_ok=True)
    return target(settings.target)(source, out, settings)


def target(name: str) -> Target:
    """The function of a target. Raises `DscError` with the valid names."""
    if name not in TARGETS:
        raise DscError(f"unknown target {name!r}", f"valid names: {', '.join(TARGETS)}")
    return TARGETS[name]


def precision(settings: Settings) -> str:
    """The float type of the graph: TensorRT's is FP16 and a CPU's FP32 where none is asked for."""
    if settings.precision != "auto":
        return settings.precision
    return "float16" if settings.target.startswith("tensorrt") else "float32"


def onnx_standard(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """Standard operators only: UINT4 weights with zero points in DequantizeLinear."""
    facts = _graph(source, out / ONNX, "standard", settings)
    return Exported("artifact", out / ONNX, facts)


def onnxruntime(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """onnxruntime's own operators: MatMulNBits, routed experts, 8-bit embedding."""
    facts = _graph(source, out / ONNX, "matmulnbits", settings)
    return Exported("artifact", out / ONNX, facts)


def tensorrt(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """The graph in TensorRT's types, its engine, and what the engine's plan says."""
    import onnx

    from deepseek_compress.export import plan
    from deepseek_compress.export.tensorrt import build_engine, load_builder

    load_builder(settings.target)
    facts = _graph(source, out / ONNX, "tensorrt", settings)
    settings.tell(f"building an engine for {', '.join(settings.compute_capabilities)}")
    built = build_engine(
        out / ONNX,
        out / ENGINE,
        target=settings.target,
        compute_capabilities=settings.compute_capabilities,
        batch=settings.batch,
        new=settings.new,
        past=settings.past,
        timing_cache=out / "timing.cache" if settings.target == "tensorrt" else None,
    )
    facts |= {"onnx_bytes": facts["bytes"], **built, "status": BUILT}
    if settings.target == "tensorrt-rtx":
        found = plan.read_plan(out / ENGINE)
        raise_problems(plan.check_plan(found, plan.expected(onnx.load(str(out / ONNX), load_external_data=False))))
        facts["plan"] = found.facts()
    return Exported("artifact", out / ENGINE, facts)


def _graph(source: Checkpoint, path: Path, lowering: str, settings: Settings) -> dict[str, Any]:
    """Write the ONNX file, and run it beside the runtime where that is asked for."""
    from deepseek_compress.export.onnx import export_onnx

    kind = precision(settings)
    facts: dict[str, Any] = {"target": settings.target, "lowering": lowering, "precision": kind}
    facts |= export_onnx(
        source,
        path,
        lowering,
        dtype=kind,
        accuracy_level=settings.accuracy_level,
        embedding_bits=settings.embedding_bits,
        last_only=settings.last_only,
    )
    facts |= {"status": "written, not run", "sparsity": _sparsity(source)}
    if kind != "bfloat16" and _to_verify(source, settings):
        facts["verification"] = _verified(source, path, kind, settings)
        facts["status"] = RAN
    return facts


def _to_verify(source: Checkpoint, settings: Settings) -> bool:
    if settings.verify is not None:
        return settings.verify
    size = 4 * sum(math.prod(info.shape) for info in source.header.tensors.values())
    if size > VERIFIED_BYTES:
        settings.tell(f"not compared with the runtime: that takes {size / 1e9:.1f} GB (verify: true does it)")
    return size <= VERIFIED_BYTES


def _verified(source: Checkpoint, path: Path, kind: str, settings: Settings) -> dict[str, Any]:
    """Compare with the runtime; raise `DscError` where the file is not what the checkpoint computes."""
    from deepseek_compress.export.verify import random_prompts, verify
    from deepseek_compress.models.runtime import Model

    model = Model.load(source)
    prompts = [*random_prompts(model.cfg.vocab_size, (7, 32)), *settings.prompts]
    rough = settings.embedding_bits < 16 or _nbits(source, settings)
    found = verify(path, model, prompts, dtype=kind, rounded=bool(source.activations) or rough)
    settings.tell(
        f"{path.name} in onnxruntime: logits within {found.bound:g} of the runtime at {100 * found.within:.1f} % of "
        f"{found.positions} positions, {found.agreed} of {found.decoded} clear greedy tokens equal"
    )
    if not found.holds:
        fix = "report it with the model's configuration; `verify: false` writes the file all the same"
        raise DscError(f"{path.name} differs from the runtime: {found.facts()}", fix)
    return found.facts()


def _nbits(source: Checkpoint, settings: Settings) -> bool:
    """Whether onnxruntime rounds activations by itself."""
    packed = any(info.encoding == "packed" for info in source.header.tensors.values())
    return settings.target == "onnxruntime" and settings.accuracy_level == 4 and packed


def _sparsity(source: Checkpoint) -> str | None:
    """What the lineage says about 2:4 zeros. TensorRT-RTX 1.7.1 builds the same engine with and without them."""
    steps = (source.manifest or {}).get("lineage") or []
    masks = [step.get("knobs", {}).get("sparsity") for step in steps if step.get("knobs", {}).get("sparsity")]
    return "2:4 zeros in the weights; engines of TensorRT-RTX do not use them" if masks else None


def compressed_tensors(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """The packed checkpoint as it is: every tensor read, checked and copied."""
    packed = [name for name, info in source.header.tensors.items() if info.encoding == "packed"]
    if not packed:
        raise DscError(f"{source.path}: holds no packed weights", "run `dsc quantize` first, and export its output")
    with CheckpointWriter(out, source, activations=source.activations) as writer:
        for name in source.header.tensors:
            writer.copy(name)
        notes = writer.finish({}, _manifest(source, settings), _ignored(source))
    return _checkpoint(out, settings, notes, {"packed_tensors": len(packed)})


def bf16(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """Every weight decoded to plain BF16. Vectors and tensors that are wider on purpose keep their stored type."""
    import torch

    notes = []
    if source.activations:
        notes.append("8-bit activations are not part of a BF16 checkpoint: what loads it computes with 16-bit ones")
    with CheckpointWriter(out, source) as writer:
        for name, info in source.header.tensors.items():
            narrow = info.encoding != "plain" or (len(info.shape) > 1 and info.dtype in (torch.float32, torch.float16))
            writer.add(name, source.read(name, torch.bfloat16 if narrow else None))
        notes += writer.finish({}, _manifest(source, settings), [])
    return _checkpoint(out, settings, notes, {})


def _manifest(source: Checkpoint, settings: Settings) -> Mapping[str, Any]:
    from deepseek_compress.provenance import build_manifest

    knobs = {"target": settings.target}
    return settings.manifest or build_manifest(stage="export", source=source, knobs=knobs)


def _ignored(source: Checkpoint) -> list[str]:
    ignore = (source.config.get("quantization_config") or {}).get("ignore") or []
    return [str(name) for name in ignore]


def _checkpoint(out: Path, settings: Settings, notes: Sequence[str], facts: dict[str, Any]) -> Exported:
    for note in notes:
        settings.tell(note)
    size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    return Exported("checkpoint", out, {"target": settings.target, "bytes": size, "status": "checked", **facts})


def triton(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """A model repository for Triton Inference Server around the `onnxruntime` graph, and a Kubernetes manifest."""
    from deepseek_compress.export.triton import write_repository

    version = out / "model_repository" / "model" / "1"
    version.mkdir(parents=True, exist_ok=True)
    facts = _graph(source, version / ONNX, "matmulnbits", settings)
    write_repository(version / ONNX, out, batch=settings.batch, past=settings.past, new=settings.new)
    return Exported("artifact", version / ONNX, facts)


def gguf(source: Checkpoint, out: Path, settings: Settings) -> Exported:
    """One file for llama.cpp: 4-bit codes as they are, scales and minima in FP16."""
    from deepseek_compress.export.gguf import export_gguf

    if _sparsity(source):
        fix = "export compressed-tensors, or compress without sparsity"
        raise DscError("GGUF has no 2:4 weights, and its zeros would not be exact", fix)
    if source.activations:
        settings.tell("8-bit activations are not part of a GGUF file: llama.cpp rounds inputs in its own way")
    facts = export_gguf(source, out / GGUF)
    return Exported("artifact", out / GGUF, {"target": settings.target, "status": "read back", **facts})


TARGETS: dict[str, Target] = {
    "onnx": onnx_standard,
    "onnxruntime": onnxruntime,
    "tensorrt-rtx": tensorrt,
    "tensorrt": tensorrt,
    "compressed-tensors": compressed_tensors,
    "bf16": bf16,
    "triton": triton,
    "gguf": gguf,
}

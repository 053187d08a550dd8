"""An ONNX file as a TensorRT engine, by TensorRT-RTX or the full TensorRT: one builder, two modules.

TensorRT-RTX builds without a GPU and for several compute capabilities at once; kernels are finished where the engine is
first loaded. The full TensorRT builds on, and for, the GPU that is present. Graphs are strongly typed: the types in
the ONNX file are the types of the engine. 2:4 weights need nothing here: `SPARSE_WEIGHTS` does not change an engine of
TensorRT-RTX 1.7.1 by a byte.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx

from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.export import BATCH, COMPUTE_CAPABILITIES, NEW, PAST, Range, hazards
from deepseek_compress.export.target import BUILT
from deepseek_compress.generation.backends.engine import MODULES

REFUSED = {"sm75": "Turing has no BF16 and the builder refuses its FP32 products"}


def build_engine(
    model: Path,
    out: Path,
    *,
    target: str = "tensorrt-rtx",
    compute_capabilities: Sequence[str] = COMPUTE_CAPABILITIES,
    batch: Range = BATCH,
    new: Range = NEW,
    past: Range = PAST,
    timing_cache: Path | None = None,
) -> dict[str, Any]:
    """Build `out` from the ONNX file `model`; returns facts: bytes, builder, version, compute_capabilities, profile.

    `batch`, `new` (tokens of a call) and `past` (tokens in the cache) bound the one optimisation profile; all
    other shapes follow from them. `timing_cache` is read if it is there and written back.

    Raises `DscError`: builder not installed, unknown compute capability, a graph that the builder refuses (with its
    words), or one that it would compile into wrong numbers.
    """
    trt, capabilities = check(target, compute_capabilities, batch=batch, new=new, past=past)
    raise_problems(hazards.find_in_model(onnx.load(str(model), load_external_data=False)))
    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(model)):
        raise_problems(_parse_problems(parser))
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # keeps the names of the ONNX nodes in the plan
    if target == "tensorrt-rtx":
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(getattr(trt.ComputeCapability, capability.upper()), index)
    config.add_optimization_profile(_profile(builder, network, batch, new, past))
    cache = _timing_cache(config, timing_cache)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DscError(
            f"{model}: {target} built no engine: {log.last()}", "see `dsc doctor`; the ONNX file is unharmed"
        )
    partial = out.with_name(out.name + ".partial")
    partial.write_bytes(bytes(engine))
    partial.replace(out)
    if cache is not None and timing_cache is not None:
        timing_cache.write_bytes(bytes(config.get_timing_cache().serialize()))
    return {
        "bytes": out.stat().st_size,
        "builder": target,
        "version": trt.__version__,
        "compute_capabilities": list(capabilities),
        "profile": {"batch": list(batch), "new": list(new), "past": list(past)},
        "status": BUILT,
    }


def check(target: str, compute_capabilities: Sequence[str], **ranges: Sequence[int]) -> tuple[Any, list[str]]:
    """Return the builder's module and the capabilities in its spelling. Raises `DscError` for what a build would
    refuse."""
    trt = load_builder(target)
    raise_problems(_range_problems(ranges))
    return trt, _capabilities(trt, target, compute_capabilities)


def load_builder(target: str) -> Any:
    """Return the module of `target`. Raises `DscError` with the extra to install."""
    if target not in MODULES:
        raise DscError(f"unknown builder {target!r}", f"use one of {', '.join(MODULES)}")
    try:
        return importlib.import_module(MODULES[target])
    except ImportError as error:
        fix = f"pip install 'deepseek-compress[{target}]'"
        raise DscError(f"target {target} needs the package {MODULES[target]} ({error})", fix) from None


def _capabilities(trt: Any, target: str, asked: Sequence[str]) -> list[str]:
    if target != "tensorrt-rtx":
        return ["current"]
    known = sorted(n.lower() for n in dir(trt.ComputeCapability) if re.fullmatch(r"SM\d+", n))
    usable = [name for name in known if name not in REFUSED]
    wanted = [name.lower().replace("_", "") for name in asked]
    problems = [
        DscError(f"compute capability {name!r}: {REFUSED.get(name, 'unknown')}", f"use {', '.join(usable)}")
        for name in wanted
        if name not in usable
    ]
    if not wanted:
        problems = [DscError("no compute capability given", f"use one or more of {', '.join(usable)}")]
    raise_problems(problems)
    return wanted


def _range_problems(ranges: Mapping[str, Sequence[int]]) -> list[DscError]:
    return [
        DscError(f"range of {name}: {list(r)} does not rise from a least to a most", "give least <= usual <= most")
        for name, r in ranges.items()
        if not (0 if name == "past" else 1) <= r[0] <= r[1] <= r[2]
    ]


def _parse_problems(parser: Any) -> list[DscError]:
    errors = (parser.get_error(i) for i in range(parser.num_errors))
    fix = "export for target onnx or onnxruntime, or change the lowering"
    return [DscError(f"{e.node_name()} ({e.node_operator()}): {e.desc().splitlines()[0]}", fix) for e in errors]


def _profile(builder: Any, network: Any, batch: Range, new: Range, past: Range) -> Any:
    """Shapes that agree with one another: a mask of another length than past + new makes the build fail silently."""
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = []
        for b, n, p in zip(batch, new, past, strict=True):
            lengths = {"input_ids": n, "position_ids": n, "attention_mask": n + p}
            free = iter((b, lengths.get(tensor.name, p)))
            shapes.append([size if size >= 0 else next(free) for size in tensor.shape])
        profile.set_shape(tensor.name, *shapes)
    return profile


def _timing_cache(config: Any, path: Path | None) -> Any:
    if path is None:
        return None
    cache = config.create_timing_cache(path.read_bytes() if path.is_file() else b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


class _Log:
    """Keeps what the builder says, so that an error can repeat it."""

    def __init__(self, trt: Any) -> None:
        messages: list[str] = []

        class Logger(trt.ILogger):  # type: ignore[misc]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    messages.append(message)

        self.messages = messages
        self.logger = Logger()

    def last(self) -> str:
        """Return the last error, on one line."""
        return " ".join(self.messages[-1].split())[:300] if self.messages else "no reason given"

"""From the word TARGET on the command line to something that answers.

| TARGET | answered by |
|---|---|
| a checkpoint directory, builtin:nano | our runtime |
| a directory of target onnx or onnxruntime, or its model.onnx | onnxruntime |
| a directory of target genai | onnxruntime-genai; onnxruntime where that is not installed |
| a .gguf file, or a directory with one | llama.cpp |
| a directory of target tensorrt-rtx or tensorrt | the engine where a GPU is, else the graph in the same directory |
| http://HOST:PORT | that OpenAI-compatible server |
"""

from __future__ import annotations

from pathlib import Path

from deepseek_compress.checkpoint import is_checkpoint, verified
from deepseek_compress.errors import DscError
from deepseek_compress.generation.speaker import Local, Speaker
from deepseek_compress.models.resolve import BUILTIN, resolve_model
from deepseek_compress.models.tokenizer import Tokenizer, load_tokenizer

ONNX, ENGINE, GENAI = "model.onnx", "model.engine", "genai_config.json"
UNDERSTOOD = (
    "give a checkpoint, a directory of target onnx, onnxruntime, genai, gguf, tensorrt-rtx or tensorrt, or "
    "http://HOST:PORT"
)


def open_target(target: str, threads: int = 0, device: str = "cpu", quick: bool = False) -> Speaker:
    """Load it, once all of an output of ours is seen to be what was written; `quick`: of large files, their sizes.

    A checkpoint computes on `device`. Raises `DscError` for what is damaged, and with what is understood.
    """
    if target.startswith(("http://", "https://")):
        from deepseek_compress.generation.backends.server import Server

        return Server(target)
    path = resolve_model(target) if target.startswith(BUILTIN) else Path(target).expanduser()
    if not path.exists():
        raise DscError(f"{target}: no such file or directory", UNDERSTOOD)
    verified.check(path if path.is_dir() else path.parent, quick)
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        from deepseek_compress.generation.backends.llama_cpp import LlamaCpp

        return LlamaCpp(path if path.is_file() else min(path.glob("*.gguf")), threads)
    if path.is_dir() and written_for(path) == "edge-llm":
        what = f"{target}: written for TensorRT-Edge-LLM, which alone reads these weights"
        raise DscError(what, f"run `tensorrt-edgellm-export {target} OUT` in its environment")
    folder = path if path.is_dir() else path.parent
    named = path.name if path.is_file() else ""
    if named == ENGINE or (not named and (folder / ENGINE).is_file()):
        return _engine(folder, bool(named), threads)
    if not named and (folder / GENAI).is_file():
        return _genai(folder, threads)
    if path.suffix == ".onnx" or (not named and (folder / ONNX).is_file()):
        return _onnx(path if named else folder / ONNX, threads)
    if not named and is_checkpoint(folder):
        from deepseek_compress.generation.backends.runtime import RuntimeBackend

        tokenizer = _tokenizer(folder)
        return Local(RuntimeBackend(folder, device=device), tokenizer)
    raise DscError(f"{target}: nothing here that answers", UNDERSTOOD)


def written_for(folder: Path) -> str | None:
    """Return the target of `dsc export` that wrote a directory; None where none says so."""
    from deepseek_compress.generation.backends.engine import manifest_knobs

    knobs = manifest_knobs(folder)
    return str(knobs["target"]) if "target" in knobs else None


def _tokenizer(folder: Path) -> Tokenizer:
    if not (folder / "tokenizer.json").is_file():
        raise DscError(
            f"{folder}: no tokenizer.json next to the model", "export it again, or copy the checkpoint's there"
        )
    return load_tokenizer(folder)


def _context(tokenizer: Tokenizer) -> int | None:
    return int(tokenizer.document("config.json").get("max_position_embeddings") or 0) or None


def _onnx(file: Path, threads: int, note: str = "") -> Speaker:
    from deepseek_compress.generation.backends.graph import GraphBackend
    from deepseek_compress.generation.backends.onnx import OnnxRunner

    tokenizer = _tokenizer(file.parent)
    return Local(GraphBackend(OnnxRunner(file, threads), _context(tokenizer)), tokenizer, note)


def _genai(folder: Path, threads: int) -> Speaker:
    from deepseek_compress.generation.backends.genai import GenaiBackend, installed

    if not installed():
        return _onnx(folder / ONNX, threads, "onnxruntime-genai is not installed: its graph runs in onnxruntime")
    return Local(GenaiBackend(folder, threads), _tokenizer(folder))


def _engine(folder: Path, asked: bool, threads: int) -> Speaker:
    from deepseek_compress.generation.backends.engine import EngineRunner, unusable
    from deepseek_compress.generation.backends.graph import GraphBackend

    problem = unusable(folder)
    if problem is not None and (asked or not (folder / ONNX).is_file()):
        raise problem
    if problem is not None:
        return _onnx(folder / ONNX, threads, f"{problem.what}: the graph next to the engine runs in onnxruntime")
    runner, tokenizer = EngineRunner(folder / ENGINE), _tokenizer(folder)
    context = min(runner.most, _context(tokenizer) or runner.most)
    return Local(GraphBackend(runner, context, runner.chunk), tokenizer)

"""A folder of target `genai` in onnxruntime-genai, which keeps the cache itself."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import Backend, Floats

PACKAGE = "onnxruntime_genai"


def installed() -> bool:
    """Whether the package is here. It brings onnxruntime, which overwrites onnxruntime-gpu: keep them apart."""
    return importlib.util.find_spec(PACKAGE) is not None


class GenaiBackend(Backend):
    """One generator, whose tokens we choose."""

    name = "onnxruntime-genai"

    def __init__(self, folder: Path, threads: int = 0) -> None:
        super().__init__()
        if not installed():
            fix = "pip install onnxruntime-genai in an environment of its own (it replaces onnxruntime-gpu)"
            raise DscError("onnxruntime-genai is not installed", fix)
        self._og: Any = importlib.import_module(PACKAGE)
        config = self._og.Config(str(folder))
        if threads:
            overlay = {"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}
            config.overlay(json.dumps(overlay))
        self.context = int(json.loads((folder / "genai_config.json").read_text())["model"]["context_length"])
        self._model = self._og.Model(config)
        self._generator = self._new()

    def _new(self) -> Any:
        options = self._og.GeneratorParams(self._model)
        options.set_search_options(max_length=self.context, do_sample=False)
        return self._og.Generator(self._model, options)

    def feed(self, ids: Sequence[int]) -> Floats:
        """Logits (vocabulary,) after `ids`."""
        self._generator.append_tokens(np.array([ids], np.int32))
        logits = np.asarray(self._generator.get_logits(), np.float32)
        last: Floats = logits.reshape(-1, logits.shape[-1])[-1]
        return last

    def truncate(self, length: int) -> int:
        """Go back, or begin anew."""
        if length:
            self._generator.rewind_to(length)
        else:
            self._generator = self._new()
        return length

"""A GGUF file in llama.cpp, which has the tokenizer, the template and the loop: its own server, inside this process.

Package xllamacpp: llama.cpp with its server as one wheel, nothing to build. It listens on 127.0.0.1 alone, at a port
that it chooses, until this process ends.
"""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

from deepseek_compress import machine
from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends.server import Server

PACKAGE = "xllamacpp"
HEAD = 32 << 20  # bytes of a file among which its settings lie, before the weights
TEMPLATE = b"tokenizer.chat_template"
MAGIC = b"GGUF"


def installed() -> bool:
    """Whether the package is here."""
    return importlib.util.find_spec(PACKAGE) is not None


class LlamaCpp(Server):
    """One file. A prompt with its answer has as many tokens as the model's context at most."""

    def __init__(self, file: Path, threads: int = 0) -> None:
        with file.open("rb") as opened:
            head = opened.read(HEAD)
        if not head.startswith(MAGIC):
            raise DscError(f"{file}: no GGUF file", "export it again with --target gguf")
        if not installed():
            fix = f"pip install 'deepseek-compress[llama-cpp]', or start `llama-server -m {file}` and give its address"
            raise DscError(f"{file}: a GGUF file is run by llama.cpp, which is not installed", fix)
        package: Any = importlib.import_module(PACKAGE)
        settings = package.CommonParams()
        settings.model.path, settings.verbosity, settings.n_parallel, settings.ui = str(file), -1, 1, False
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads or machine.cores()
        try:
            self._server = package.Server(settings)
        except RuntimeError:
            raise DscError(f"{file}: llama.cpp cannot load it", "export it again, or give another file") from None
        super().__init__(self._server.listening_address)
        self.name, self.has_chat = "llama.cpp", TEMPLATE in head  # llama.cpp would make one up

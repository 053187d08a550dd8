"""Make DeepSeek-family models smaller and faster, with proof that they still reason.

    import deepseek_compress as dsc

The functions below are those of `deepseek_compress.api`. Nothing is imported until one of them is named.
"""

from __future__ import annotations

import sys

from deepseek_compress import processes

if sys.argv[:1] == ["-m"]:
    processes.leave_directory()  # which `python -m` put first, and where a checkpoint's typing.py may lie

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from deepseek_compress.errors import DscError

if TYPE_CHECKING:
    from deepseek_compress.api import (
        Loaded,
        Plan,
        Recipe,
        compare,
        distill,
        evaluate,
        export,
        load,
        plan,
        prune,
        quantize,
        read_recipe,
        run,
    )

__version__ = "0.1.0"
__all__ = [
    "DscError", "Loaded", "Plan", "Recipe",
    "compare", "distill", "evaluate", "export", "load", "plan", "prune", "quantize", "read_recipe", "run",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module(f"{__name__}.api"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `dsc.export` the function: importing the package of that name below would replace it."""

    @property
    def export(self) -> Any:
        return __getattr__("export")

    @export.setter
    def export(self, module: ModuleType) -> None:
        """`from deepseek_compress.export import NAME` finds the package in `sys.modules`."""


sys.modules[__name__].__class__ = _Package

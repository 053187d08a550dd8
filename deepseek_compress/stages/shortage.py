"""Memory that a machine lacks for what a recipe's stages need."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from deepseek_compress.console import size
from deepseek_compress.errors import DscError
from deepseek_compress.planning import device
from deepseek_compress.stages.base import Forecast


def memory_problems(forecasts: Mapping[str, Forecast], limit: int | None) -> list[DscError]:
    """Stages that need more than `--memory`, `limit` bytes, even with one worker."""
    needs = {name: forecast.peak(1) for name, forecast in forecasts.items()}
    return [
        DscError(f"{name}: needs {size(need)} at least, --memory is {size(limit)}", f"give --memory {_gib(need)}")
        for name, need in needs.items()
        if limit is not None and need is not None and need > limit
    ]


def gpu_problems(forecasts: Mapping[str, Forecast], devices: Sequence[str], limit: int | None) -> list[DscError]:
    """Stages that need more than each of the GPUs has, or may give: `--gpu-memory`, `limit` bytes."""
    return [problem for each in devices for problem in _of_one(forecasts, each, limit)]


def _of_one(forecasts: Mapping[str, Forecast], where: str, asked: int | None) -> list[DscError]:
    free = device.memory(where)
    if free is None:
        return []
    limit = min(free, asked or free)
    needs = {name: its.memory.on_device() for name, its in forecasts.items() if its.memory}

    def fix(need: int) -> str:
        more = f"give --gpu-memory {_gib(need)}" if need <= free else f"free {size(need - free)} of it, or take another"
        return f"{more}, or use --device cpu"

    return [
        DscError(f"{name}: needs {size(need)} of {where}, which has {size(limit)} for it", fix(need))
        for name, need in needs.items()
        if need > limit
    ]


def _gib(need: int) -> str:
    return f"{-(-need * 10 // (1 << 30)) / 10:.1f}GiB"

"""Inputs and bounds shared by the tests of the CUDA kernels, on the emulation and on a GPU."""

from __future__ import annotations

import torch
from torch import Tensor

from cuda_ops import harness, reference

IN = [torch.int32, torch.float16, torch.bfloat16, torch.float32]
OUT = [torch.float16, torch.bfloat16, torch.float32, torch.uint8]
MASKS = ["none", "full", "causal", "ranges"]


def logits(dtype: torch.dtype, *shape: int) -> Tensor:
    """Spiky logits, as in test_softmax."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator) * 4
    x[..., shape[-1] // 3] += 12
    x[..., -1] += 11
    return (x * 1000).to(torch.int32) if dtype == torch.int32 else x.to(dtype)


def scales(dtype: torch.dtype, *shape: int) -> tuple[Tensor, Tensor] | tuple[None, None]:
    """Row scales (..., rows) and column scales of each matrix for int32 products, none for the others."""
    if dtype != torch.int32:
        return None, None
    generator = torch.Generator().manual_seed(3)
    rows = 1e-3 * (0.5 + torch.rand(shape[:-1], generator=generator))
    return rows, 0.5 + torch.rand(*shape[:-2], shape[-1], generator=generator)


def mask(kind: str, *shape: int) -> Tensor | None:
    """A mask for (batch, rows, columns); all but "none" hide the first row of the first matrix."""
    generator = torch.Generator().manual_seed(5)
    batch, rows, columns = shape
    if kind == "none":
        return None
    if kind == "full":
        full = torch.rand(shape, generator=generator) > 0.4
        full[0, 0] = False
        return full
    if kind == "causal":
        causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
        causal[0] = False
        return causal
    begin = torch.randint(0, max(1, columns // 2), (batch, rows), dtype=torch.int32, generator=generator)
    end = columns - torch.randint(0, max(1, columns // 4), (batch, rows), dtype=torch.int32, generator=generator)
    ranges = torch.stack((begin, end), -1).contiguous()
    ranges[0, 0] = torch.tensor([columns, 0], dtype=torch.int32)
    return ranges


def check(call: harness.Call, row: Tensor | None, column: Tensor | None, visible: Tensor | None) -> None:
    """Compare what a kernel wrote with double precision, at the bound of each output type."""
    out, x = call.out.cpu(), call.logits.cpu()
    exact = reference.softmax(x, row, column, visible, torch.float64)[0]
    if out.dtype == torch.float32:
        assert ((out - exact).abs() <= 2e-5 * exact + 1e-30).all()
    elif out.dtype == torch.uint8:
        scale = call.out_scale.cpu().double()
        assert ((out * scale - exact).abs() <= 0.503 * scale).all()
        assert ((out.amax(-1) == 255) | (exact.amax(-1) == 0)).all()
    else:
        nearest = exact.to(out.dtype)
        assert (out.view(torch.int16).int() - nearest.view(torch.int16).int()).abs().max() <= 1
    assert (out[exact.amax(-1) == 0] == 0).all()

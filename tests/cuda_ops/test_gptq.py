"""Every build of the two loops of GPTQ against the slow references, bit for bit, and those by value."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference

SHRINK = torch.tensor([1 - 0.4 * step / 11 for step in range(12)])
# groups, size, rows: whole tiles, ragged rows, fewer than eight columns, a size no vector divides, one row
GROUPS = [(2, 128, 128), (3, 64, 77), (5, 5, 18), (1, 30, 200), (2, 32, 1)]
BLOCKS = [(128, 96, 1), (64, 200, 3), (5, 17, 2), (33, 3, 1)]  # columns, rows, groups


def groups(count: int, size: int, rows: int) -> tuple[Tensor, Tensor]:
    """Groups with outliers, one all zeros, one row all negative, and what their errors cost."""
    generator = torch.Generator().manual_seed(count)
    made = torch.randn(count, size, rows, generator=generator) ** 3
    made[0, :, 0] = 0
    made[-1, :, -1] = -made[-1, :, -1].abs() - 1
    return made, torch.rand(count, size, generator=generator)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_equals_the_reference(isa: str, bits: int, symmetric: bool) -> None:
    for shape in GROUPS:
        given, importance = groups(*shape)
        for share in (None, importance):
            scale, zero = cuda_ops.search_grid(given, share, SHRINK, bits, symmetric)
            expected = reference.search_grid(given, share, SHRINK, bits, symmetric)
            assert torch.equal(scale, expected[0]), shape
            assert torch.equal(zero, expected[1]), shape


def block(columns: int, rows: int, count: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(columns)
    base = torch.randn(columns, rows, generator=generator)
    return {
        "base": base,
        "target": base + 0.1 * torch.randn(columns, rows, generator=generator),
        "feedback": (0.3 * torch.randn(columns, columns, generator=generator)).tril(-1),
        "scale": (0.1 + 0.3 * torch.rand(count, rows, generator=generator)).bfloat16().float(),
        "zero_point": torch.randint(0, 16, (count, rows), generator=generator).float(),
        "group": torch.randint(0, count, (columns,), generator=generator),
        "fixed": torch.rand(columns, rows, generator=generator) < 0.5,
    }


@pytest.mark.parametrize("sparse", [False, True])
def test_rounding_equals_the_reference(isa: str, sparse: bool) -> None:
    for shape in BLOCKS:
        given = block(*shape)
        fixed = given["fixed"] if sparse else None
        before = given["base"].clone()
        codes, residual = torch.empty(given["base"].shape, dtype=torch.uint8), torch.empty_like(given["base"])
        grid = (given["scale"], given["zero_point"], 15)
        cuda_ops.round_columns(
            given["base"], given["target"], given["feedback"], grid, given["group"], fixed, codes, residual
        )
        expected = torch.empty_like(codes), torch.empty_like(residual)
        del given["fixed"]
        reference.round_columns(**given, fixed=fixed, top=15, codes=expected[0], residual=expected[1])
        assert torch.equal(given["base"], before), "inputs are not modified"
        assert torch.equal(codes, expected[0]), shape
        assert torch.equal(residual, expected[1]), shape


def test_unrounded_equals_the_reference(isa: str) -> None:
    for shape in BLOCKS:
        given = block(*shape)
        base, target, feedback = given["base"], given["target"], given["feedback"] / shape[0] ** 0.5
        values = cuda_ops.unrounded(base, target, feedback)
        assert torch.equal(values, reference.unrounded(base, target, feedback)), shape
        exact = values.double()
        assert torch.allclose(exact, base + feedback.double() @ (target - exact), atol=1e-4), shape


def test_reference_of_the_rounding_is_its_formula() -> None:
    """One weight at a time, in Python's own numbers."""
    given = block(7, 4, 2)
    codes, residual = torch.empty(7, 4, dtype=torch.uint8), torch.empty(7, 4)
    fixed = given.pop("fixed")
    reference.round_columns(**given, fixed=fixed, top=15, codes=codes, residual=residual)
    for row in range(4):
        off: list[float] = []
        for j in range(7):
            fed = float(given["base"][j, row])
            fed += sum(float(given["feedback"][j, i]) * off[i] for i in range(j))
            scale, zero = (float(given[name][given["group"][j], row]) for name in ("scale", "zero_point"))
            value = 0.0 if fixed[j, row] else min(max(round(fed / scale), -zero), 15 - zero)
            assert int(codes[j, row]) == value + zero
            off.append(float(given["target"][j, row]) - value * scale)
            assert float(residual[j, row]) == pytest.approx(off[-1], abs=1e-5)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    given, importance = groups(2, 32, 300)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = cuda_ops.search_grid(given, importance, SHRINK, 4, False)
        torch.set_num_threads(3)
        three = cuda_ops.search_grid(given, importance, SHRINK, 4, False)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(one[0], three[0])
    assert torch.equal(one[1], three[1])


def test_what_does_not_fit_is_refused() -> None:
    given = block(5, 17, 2)
    codes, residual = torch.empty(5, 17, dtype=torch.uint8), torch.empty(5, 17)
    grid = (given["scale"], given["zero_point"], 15)
    if cuda_ops.instructions() == "reference":
        pytest.skip("the kernels could not be built")
    with pytest.raises(RuntimeError, match="column 0 is of group 2, there are 2"):
        cuda_ops.round_columns(
            given["base"], given["target"], given["feedback"], grid, given["group"] * 0 + 2, None, codes, residual
        )
    with pytest.raises(RuntimeError, match="residual must be contiguous"):
        cuda_ops.round_columns(
            given["base"], given["target"], given["feedback"], grid, given["group"], None, codes, residual[:, :3]
        )

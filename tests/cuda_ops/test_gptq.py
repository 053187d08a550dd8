"""Every build of the two loops of GPTQ against the slow references, bit for bit, and those by value."""

from __future__ import annotations

import pytest
import torch

import cuda_ops
from cuda_ops import reference
from tests.cuda_ops.weight_cases import SHRINK, batch, block, groups

# groups, size, rows: whole tiles, ragged rows, fewer than eight columns, a size no vector divides, one row
GROUPS = [(2, 128, 128), (3, 64, 77), (5, 5, 18), (1, 30, 200), (2, 32, 1)]
BLOCKS = [(128, 96, 1), (64, 200, 3), (5, 17, 2), (33, 3, 1)]  # columns, rows, groups


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


def test_a_batch_is_its_matrices(isa: str) -> None:
    """As the solver passes them: blocks of columns, cut out of larger tensors; what lies around them stays."""
    for columns, rows, grids in [(40, 70, 3), (5, 17, 1)]:
        given = batch(3, columns, rows, grids)
        whole = {name: torch.cat((part, part, part), 1) for name, part in given.items() if name != "feedback"}
        inner = {name: part[:, part.shape[1] // 3 : part.shape[1] // 3 * 2] for name, part in whole.items()}
        codes = torch.full((3, 3 * columns, rows), 77, dtype=torch.uint8)
        residual = torch.full(codes.shape, torch.nan)
        own = slice(columns, 2 * columns)
        grid = (inner["scale"], inner["zero_point"], 15)
        cuda_ops.round_columns(
            inner["base"], inner["target"], given["feedback"], grid, inner["group"], inner["fixed"],
            codes[:, own], residual[:, own],
        )  # fmt: skip
        values = cuda_ops.unrounded(inner["base"], inner["target"], given["feedback"] / columns**0.5)
        for m in range(3):
            one = {name: part[m] for name, part in given.items()}
            expected = torch.empty(columns, rows, dtype=torch.uint8), torch.empty(columns, rows)
            reference.round_columns(**one, top=15, codes=expected[0], residual=expected[1])
            assert torch.equal(codes[m, own], expected[0]) and torch.equal(residual[m, own], expected[1])
            feedback = one["feedback"] / columns**0.5
            assert torch.equal(values[m], reference.unrounded(one["base"], one["target"], feedback))
        codes[:, own] = 77
        assert (codes == 77).all() and residual[:, : own.start].isnan().all() and residual[:, own.stop :].isnan().all()


def test_reference_of_a_batch_is_that_of_its_matrices() -> None:
    given = batch(2, 9, 4, 2)
    codes, residual = torch.empty(2, 9, 4, dtype=torch.uint8), torch.empty(2, 9, 4)
    reference.round_columns(**given, top=15, codes=codes, residual=residual)
    one, alone = {name: part[1] for name, part in given.items()}, torch.empty(9, 4)
    reference.round_columns(**one, top=15, codes=torch.empty(9, 4, dtype=torch.uint8), residual=alone)
    assert torch.equal(residual[1], alone)
    values = reference.unrounded(given["base"], given["target"], given["feedback"])
    assert torch.equal(values[1], reference.unrounded(one["base"], one["target"], one["feedback"]))


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
    made = batch(2, 5, 17, 2)
    with pytest.raises(RuntimeError, match=r"target must be contiguous float32 \(2, 5, 17\)"):
        cuda_ops.unrounded(made["base"], made["target"][0], made["feedback"])
    with pytest.raises(RuntimeError, match=r"importance must be contiguous float32 \(3, 4\)"):
        cuda_ops.search_grid(torch.ones(3, 4, 5), torch.ones(3, 5), SHRINK, 4, False)
    with pytest.raises(RuntimeError, match="residual must be contiguous"):
        cuda_ops.round_columns(
            given["base"], given["target"], given["feedback"], grid, given["group"], None, codes, residual[:, :3]
        )

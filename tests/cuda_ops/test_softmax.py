"""The softmax operator on the CPU against double precision, with every set of instructions."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import cuda_ops
from cuda_ops import reference

COLUMNS = [1, 7, 16, 128, 1000, 1024, 4096, 32768, 40001]
FLOATS = [torch.float16, torch.bfloat16, torch.float32]


def spiky(dtype: torch.dtype, *shape: int) -> Tensor:
    """Logits with a few far above the rest: a maximum or a sum that misses one element is plainly wrong."""
    generator = torch.Generator().manual_seed(shape[-1])
    x = torch.randn(shape, generator=generator) * 4
    x[..., shape[-1] // 3] += 12
    x[..., -1] += 11
    return (x * 1000).to(torch.int32) if dtype == torch.int32 else x.to(dtype)


def scales(*shape: int) -> tuple[Tensor, Tensor]:
    """Row and column scales that bring int32 products back to logits of a few units."""
    generator = torch.Generator().manual_seed(3)
    rows = 1e-3 * (0.5 + torch.rand(shape[:-1], generator=generator))
    return rows, 0.5 + torch.rand(*shape[:-2], shape[-1], generator=generator)


def ulps(a: Tensor, b: Tensor) -> int:
    """Largest distance in units in the last place, of 16-bit numbers that are not negative."""
    return int((a.view(torch.int16).int() - b.view(torch.int16).int()).abs().max())


@pytest.mark.parametrize("dtype", [*FLOATS, torch.int32])
def test_float16_within_one_unit_in_the_last_place(isa: str, dtype: torch.dtype) -> None:
    for columns in COLUMNS:
        x = spiky(dtype, 3, columns)
        row, column = scales(3, columns) if dtype == torch.int32 else (None, None)
        out, scale = cuda_ops.softmax(x, row, column)
        exact = reference.softmax(x, row, column, None, torch.float16)[0]
        assert ulps(out, exact) <= 1, columns
        assert scale.numel() == 0


@pytest.mark.parametrize("columns", COLUMNS)
def test_float32_and_bfloat16(isa: str, columns: int) -> None:
    """Relative error 1e-5 where the probability is above 1e-30 of the largest: what float32 logits of 30 allow."""
    x = spiky(torch.float32, 3, columns)
    exact = reference.softmax(x, None, None, None, torch.float64)[0]
    out = cuda_ops.softmax(x, out_dtype=torch.float32)[0]
    assert ((out - exact).abs() <= 1e-5 * exact + 1e-30).all()
    assert ulps(cuda_ops.softmax(x, out_dtype=torch.bfloat16)[0], exact.bfloat16()) <= 1


@pytest.mark.parametrize("dtype", [torch.int32, torch.float16])
def test_codes_are_within_half_a_step(isa: str, dtype: torch.dtype) -> None:
    for columns in COLUMNS:
        x = spiky(dtype, 2, columns)
        row, column = scales(2, columns) if dtype == torch.int32 else (None, None)
        codes, scale = cuda_ops.softmax(x, row, column, out_dtype=torch.uint8)
        exact = reference.softmax(x, row, column, None, torch.float64)[0]
        assert (scale.shape, scale.dtype) == ((2, 1), torch.float32)
        assert ((codes * scale.double() - exact).abs() <= 0.502 * scale).all(), columns
        assert (codes.amax(-1) == 255).all()


def masks(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Every kind of mask for logits of (batch, heads, rows, columns); each hides one whole row."""
    generator = torch.Generator().manual_seed(5)
    batch, heads, rows, columns = shape
    full = torch.rand(shape, generator=generator) > 0.4
    full[0, 0, 1] = False
    padding = (torch.rand(batch, 1, 1, columns, generator=generator) > 0.4).expand(batch, 1, rows, columns)
    causal = torch.ones(rows, columns, dtype=torch.bool).tril(columns - rows)
    causal[0] = False
    end = (torch.arange(rows, dtype=torch.int32) + columns - rows + 1).expand(batch, heads, rows)
    begin = torch.randint(0, columns // 2, (batch, heads, rows), dtype=torch.int32, generator=generator)
    ranges = torch.stack((begin, end), -1).contiguous()
    ranges[0, 0, 0] = torch.tensor([5, 5], dtype=torch.int32)
    ranges[0, 0, 1] = torch.tensor([-3, columns + 9], dtype=torch.int32)
    return {"full": full, "padding": padding & causal, "causal": causal, "ranges": ranges}


@pytest.mark.parametrize("kind", ["full", "padding", "causal", "ranges"])
@pytest.mark.parametrize("columns", [24, 133])
def test_masks_and_scales_of_attention(isa: str, kind: str, columns: int) -> None:
    """Masks broadcast over batch and heads, column scales of each matrix, rows that see nothing."""
    shape = (2, 3, 17, columns)
    x, mask = spiky(torch.int32, *shape), masks(shape)[kind]
    row, column = scales(*shape)
    out = cuda_ops.softmax(x, row, column, mask)[0]
    exact = reference.softmax(x, row, column, mask, torch.float16)[0]
    assert ulps(out, exact) <= 1
    hidden = exact.amax(-1) == 0
    assert hidden.any()
    assert (out[hidden] == 0).all()
    assert (out[~hidden].float().sum(-1) - 1).abs().max() < 0.02
    codes, scale = cuda_ops.softmax(x, row, column, mask, torch.uint8)
    assert (codes[hidden] == 0).all()
    assert (scale[hidden] == 0).all()
    unscaled = reference.softmax(x.half(), None, None, mask, torch.float16)[0]
    assert ulps(cuda_ops.softmax(x.half(), mask=mask)[0], unscaled) <= 1


def test_masked_columns_are_not_looked_at(isa: str) -> None:
    """NaN and infinity behind a mask do no harm; before it they make the row NaN."""
    x = spiky(torch.float32, 3, 40)
    mask = torch.ones(3, 40, dtype=torch.bool)
    mask[:, 35:] = False
    x[0, 37], x[1, 36], x[2, 2] = torch.nan, torch.inf, torch.nan
    out = cuda_ops.softmax(x, mask=mask, out_dtype=torch.float32)[0]
    assert out[:2].isfinite().all()
    assert out[2].isnan().any()
    assert (out[:2, 35:] == 0).all()


def test_masks_of_any_layout(isa: str) -> None:
    """A transposed mask, and one that says the same for every column of a row."""
    x = spiky(torch.float16, 6, 20)
    transposed = (torch.rand(20, 6, generator=torch.Generator().manual_seed(2)) > 0.5).T
    per_row = torch.tensor([[True], [False], [True], [True], [False], [True]])
    for mask in (transposed, per_row):
        out = cuda_ops.softmax(x, mask=mask)[0]
        assert ulps(out, reference.softmax(x, None, None, mask, torch.float16)[0]) <= 1


def test_rows_of_minus_infinity_are_zeros(isa: str) -> None:
    out = cuda_ops.softmax(torch.full((2, 19), -torch.inf), out_dtype=torch.float32)[0]
    assert (out == 0).all()


@pytest.mark.parametrize("columns", [5, 64, 1000])
def test_a_nan_or_infinity_makes_the_row_nan(isa: str, columns: int) -> None:
    for dtype in FLOATS:
        for value in (torch.nan, -torch.nan, torch.inf):
            x = spiky(dtype, 2, columns)
            x[1, columns // 2] = value
            out = cuda_ops.softmax(x, out_dtype=torch.float32)[0]
            assert out[0].isfinite().all()
            assert out[1].isnan().all(), (dtype, value)


def test_extreme_logits(isa: str) -> None:
    """The largest and smallest of each format: nothing overflows, ties share, far smaller ones vanish."""
    for dtype in FLOATS:
        big = torch.finfo(dtype).max
        x = torch.tensor([[big, big, -big, 0.0], [-big, -big, -big, -big]], dtype=dtype)
        out = cuda_ops.softmax(x, out_dtype=torch.float32)[0]
        assert torch.allclose(out, torch.tensor([[0.5, 0.5, 0, 0], [0.25] * 4]), atol=1e-6)


def test_threads_do_not_change_a_bit(isa: str) -> None:
    x = spiky(torch.float16, 300, 1024)
    before = torch.get_num_threads()
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        results.append(cuda_ops.softmax(x)[0])
    torch.set_num_threads(before)
    assert torch.equal(*results)


def test_meta_gives_shapes_and_types() -> None:
    cuda_ops.load()
    for out_dtype in (torch.uint8, *FLOATS):
        made = [
            torch.ops.deepseek_compress.softmax(x, None, None, None, out_dtype)
            for x in (torch.ones(2, 3, 8, dtype=torch.int32), torch.ones(2, 3, 8, dtype=torch.int32, device="meta"))
        ]
        for real, meta in zip(*made, strict=True):
            assert (real.shape, real.dtype, real.stride()) == (meta.shape, meta.dtype, meta.stride())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"logits": torch.zeros(2, 3, dtype=torch.float64)}, "logits must be int32, float16"),
        ({"logits": torch.zeros(2, 3), "out_dtype": torch.int8}, "out_dtype must be float16"),
        ({"logits": torch.zeros(2, 3), "row_scale": torch.ones(3)}, "row_scale must have 2 numbers"),
        ({"logits": torch.zeros(2, 3), "column_scale": torch.ones(2)}, "column_scale must have 3 numbers"),
        (
            {"logits": torch.zeros(2, 3), "mask": torch.ones(2, 2, dtype=torch.bool)},
            "expanded size of the tensor|last dimension",
        ),
        ({"logits": torch.zeros(2, 3), "mask": torch.ones(4, 3, dtype=torch.bool)}, "dimension 0 is 4, not 1 or 2"),
        ({"logits": torch.zeros(2, 3), "mask": torch.ones(2, 3)}, "mask must be bool"),
        ({"logits": torch.zeros(2, 3), "mask": torch.ones(3, 2, dtype=torch.int32)}, "an int32 mask"),
        (
            {"logits": torch.zeros(2, 3), "row_scale": torch.ones(2, dtype=torch.float64)},
            "row_scale must be contiguous",
        ),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Tensor], match: str) -> None:
    if cuda_ops.instructions() == "reference":
        pytest.skip("the reference does not check")
    with pytest.raises(RuntimeError, match=match):
        cuda_ops.softmax(**arguments)  # type: ignore[arg-type]

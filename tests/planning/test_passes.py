"""The time left: at the pace of this run, over passes of unequal cost."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.console import Pace, estimate
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.planning.passes import Passes
from tests.stages.test_static import context, stage


def test_neither_loading_nor_an_earlier_run_changes_the_pace() -> None:
    times = iter([100.0, 110.0, 120.0, 500.0, 501.0])
    pace = Pace(lambda: next(times))
    assert pace.left(50, 100) is None  # 100 s to load, 50 were there
    assert pace.left(60, 100) == pytest.approx(40.0)
    assert pace.left(75, 100) == pytest.approx(20.0)
    assert pace.left(0, 10) is None  # a pass of another kind
    assert pace.left(2, 10) == pytest.approx(4.0)


def test_passes_of_unequal_cost_are_one_count() -> None:
    seen: list[tuple[int, int, str]] = []
    passes = Passes(lambda *said: seen.append(said), {"scales": [10.0, 30.0], "solve": [20.0, 100.0, 40.0]})
    passes.of("scales")(1, 2, "a")
    passes.of("solve")(0, 3, "b")
    passes.of("solve")(2, 3, "c")
    passes.of("solve")(5, 10, "d")  # in other steps than were foreseen
    passes.of("judge")(1, 4, "e")  # not foreseen
    assert seen == [(50, 1000, "a"), (200, 1000, "b"), (800, 1000, "c"), (600, 1000, "d"), (1, 4, "e")]


def test_what_is_foreseen_is_said_no_finer_than_it_is_known() -> None:
    assert [estimate(s) for s in (None, 5.25, 45.2, 59.7, 445, 7500)] == [
        None, "5.2 s", "45 s", "1 min", "7 min", "2 h 05 min",
    ]  # fmt: skip


@pytest.mark.verify
@pytest.mark.parametrize("sparse", [False, True])
def test_after_a_tenth_of_the_work_the_time_left_is_right(sparse: bool, tmp_path: Path) -> None:
    """Of several passes over the built-in model, in time of this process, which others do not lengthen."""
    parts = {"sparsity": "sparsegpt"} if sparse else {"migration": "smoothquant"}
    source, pace = open_checkpoint(resolve_model("builtin:nano")), Pace(time.process_time)
    said: list[tuple[float, float | None]] = []
    began: list[float] = []

    def progress(done: int, total: int, note: str) -> None:
        left = pace.left(done, total)
        began.append(time.process_time())
        if 10 * done >= total > done:
            said.append((began[-1], left))

    weights = {"weights": {"gptq": {"group_size": 64}}}
    given = context(tmp_path / "out", Path("builtin"), progress=progress)
    given.calibration.update(samples=32, length=512)
    stage(None, **weights, **parts).run(source, given)
    assert len(said) >= 3
    for at, left in said:
        assert left is not None
        assert 1 / 1.5 < left / (began[-1] - at) < 1.5, [(b, n and n / (began[-1] - b)) for b, n in said]

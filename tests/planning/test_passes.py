"""The time left: at the pace of this run, over passes of unequal cost."""

from __future__ import annotations

import dataclasses
import itertools
import time
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.console import Pace, estimate
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.planning.passes import Passes, Steps
from deepseek_compress.stages.calibrate import Calibrate
from deepseek_compress.stages.compress import Compress
from tests.stages.test_static import context


def test_neither_loading_nor_an_earlier_run_changes_the_pace() -> None:
    times = iter([100.0, 110.0, 120.0, 500.0, 501.0])
    pace = Pace(lambda: next(times))
    assert pace.left(50, 100) is None  # 100 s to load, 50 were there
    assert pace.left(60, 100) == pytest.approx(40.0)
    assert pace.left(75, 100) == pytest.approx(20.0)
    assert pace.left(0, 10) is None  # a pass of another kind
    assert pace.left(2, 10) == pytest.approx(4.0)


def test_the_pace_is_that_of_the_second_half() -> None:
    times = iter([*range(0, 110, 10), *range(120, 520, 20)])  # other work begins after 100 s: half as fast from then on
    pace = Pace(lambda: next(times))
    left = [pace.left(done, 40) for done in range(31)]
    assert left[4] == pytest.approx(360.0)  # the first minute counts whole
    assert left[10] == pytest.approx(300.0)
    assert left[20] == pytest.approx(400.0)  # 300 s after the first, the second half is at the new pace
    assert left[30] == pytest.approx(200.0)


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
        None, "5.2 s", "45 s", "1 min", "7 min", "2.1 h",
    ]  # fmt: skip


def test_parts_of_a_step_count_before_it_is_done_and_the_step_counts_whole() -> None:
    seen: list[int] = []
    steps = Steps(lambda done, total, note: seen.append(done), [10.0, 30.0], "shards")
    steps.part(5.0)
    steps.done()  # whatever its parts came to
    steps.part(15.0)
    steps.done()
    assert seen == [0, 125, 250, 625, 1000]


def test_without_text_every_tensor_counts_and_most_what_takes_longest(tiny_v3: Path, tmp_path: Path) -> None:
    """From one shard, which is one task."""
    seen: list[int] = []
    given = context(tmp_path / "out", tiny_v3, progress=lambda done, total, note: seen.append(done))
    Compress.model_validate({"weights": {"hqq": {"group_size": 32}}}).run(open_checkpoint(tiny_v3), given)
    steps = [after - before for before, after in itertools.pairwise(seen)]
    assert seen[0] == 0
    assert seen[-1] == 1000
    assert min(steps) >= 0
    assert len(set(seen)) > 20
    assert max(steps) < 300


RUNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # parts of `compress` beside the weights, and text
    "scales first": ({"migration": "smoothquant"}, {"samples": 32, "length": 512}),
    "sparse": ({"sparsity": "sparsegpt"}, {"samples": 32, "length": 512}),
    "little text": ({}, {"samples": 2, "length": 8}),
    "statistics": ({}, {"statistics": "saved"}),
}


@pytest.mark.verify
@pytest.mark.parametrize("run", RUNS)
def test_after_a_tenth_of_the_work_the_time_left_is_right(run: str, tmp_path: Path) -> None:
    """On the built-in model, in time of this process, which others do not lengthen."""
    parts, text = RUNS[run]
    source, pace = open_checkpoint(resolve_model("builtin:nano")), Pace(time.process_time)
    said: list[tuple[float, float | None]] = []

    def progress(done: int, total: int, note: str) -> None:
        left = pace.left(done, total)
        if 10 * done >= total >= 2 * done:
            said.append((time.process_time(), left))

    given = context(tmp_path / "out", Path("builtin"))
    if "statistics" in text:
        text = {"statistics": str(tmp_path / "saved")}
        given.calibration.update(samples=2, length=64)
        Calibrate().run(source, dataclasses.replace(given, out=tmp_path / "saved"))
        given.calibration.clear()
    given.calibration.update(text)
    given = dataclasses.replace(given, progress=progress)
    Compress.model_validate({"weights": {"gptq": {"group_size": 64}}, **parts}).run(source, given)
    end = time.process_time()
    assert said
    for at, left in said:
        assert left is not None
        assert 1 / 1.5 < left / (end - at) < 1.5, [(b, n and n / (end - b)) for b, n in said]

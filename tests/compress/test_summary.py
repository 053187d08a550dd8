"""What an output says of the errors of its weights, read back for the report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from deepseek_compress.checkpoint.files import write_json
from deepseek_compress.compress.summary import LAYERS, WORST, starved, weight_errors, write


def linear(name: str, role: str, weights: int, weight: float, output: float | None) -> dict[str, Any]:
    return {"name": name, "role": role, "weights": weights, "bits": 4.5, "weight_error": weight, "output_error": output,
            "zeros": 0.0, "fallback": False}  # fmt: skip


def test_means_are_over_weights_and_the_worst_come_first(tmp_path: Path) -> None:
    few = [linear("a.q", "attention", 100, 0.01, 0.002), linear("a.o", "attention", 300, 0.03, 0.001)]
    many = [linear(f"b.{i}", "expert", 10, 0.01, i / 1000) for i in range(2, 20)] + [
        linear("b.x", "expert", 10, 0.5, None)
    ]
    write(tmp_path, [{"linears": few}, {"linears": many}])

    found = weight_errors(tmp_path)

    assert found is not None
    attention, expert = found["roles"]
    assert (attention["role"], attention["linears"]) == ("attention", 2)
    assert attention["weight_error"] == pytest.approx((100 * 0.01 + 300 * 0.03) / 400)
    assert attention["output_error"] == pytest.approx((100 * 0.002 + 300 * 0.001) / 400)
    assert expert["output_error"] == pytest.approx(sum(range(2, 20)) / 18 / 1000)  # of those that were measured
    assert [one["name"] for one in found["worst"]] == [f"b.{i}" for i in range(19, 19 - WORST, -1)]


def test_without_outputs_weights_decide(tmp_path: Path) -> None:
    write(tmp_path, [{"linears": [linear("a", "expert", 1, 0.1, None), linear("b", "expert", 1, 0.2, None)]}])

    found = weight_errors(tmp_path)

    assert found is not None
    assert [one["name"] for one in found["worst"]] == ["b", "a"]
    assert found["roles"][0]["output_error"] is None


@pytest.mark.parametrize("blocks", [None, 3, [], [4], [{"linears": 3}], [{"linears": [{"name": "a"}]}],
                                    [{"linears": [linear("a", "expert", 0, 0.1, None)]}],
                                    [{"linears": [linear("a", "expert", 1, -0.1, None)]}]])  # fmt: skip
def test_a_table_of_something_else_says_nothing(blocks: Any, tmp_path: Path) -> None:
    assert weight_errors(tmp_path) is None
    write_json(tmp_path / LAYERS, {"schema": 1, "blocks": blocks})

    assert weight_errors(tmp_path) is None


def test_too_little_text_is_said_with_what_to_do() -> None:
    solved = linear("a", "expert", 1, 0.1, 0.1)
    blocks = [{"linears": [solved, {**solved, "fallback": True}]}, {"linears": [solved]}]
    assert starved(blocks, 64) == [
        "1 of 3 linears saw fewer than 64 tokens, so that they were solved without statistics: "
        "give more text (--samples, --length)"
    ]
    assert starved([{"linears": [solved]}], 64) == []

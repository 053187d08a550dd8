"""Models that are never in memory against the same models in memory; stopped runs; what the report says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint, owned
from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import divergence, streamed
from deepseek_compress.evaluation.divergence import Divergence, Sample
from deepseek_compress.evaluation.streamed import NO_LIMITS, Limits, Subject
from deepseek_compress.models.cache import kv_rounding
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.evaluate import Evaluate
from tests.models.conftest import tiny_v4, tiny_v32  # noqa: F401 - fixtures

DRAW = torch.Generator().manual_seed(2)
IDS = torch.randint(3, 500, (9, 40), generator=DRAW).tolist()
SAMPLES = [Sample(ids[: 40 - 3 * number], 1 + number) for number, ids in enumerate(IDS)]


def silent(done: int, total: int, note: str) -> None:
    assert 0 <= done <= total


def made(source: Path, out: Path, **knobs: object) -> Path:
    """The model with 4-bit weights and what the knobs ask for."""
    stage = build(Compress, {"weights": {"rtn": {"group_size": 32}}, **knobs}, "compress")
    return stage.run(open_checkpoint(source), Context("out", out, "", 0, tell=lambda line: None)).path


def in_memory(reference: Path, other: Path, folder: Path, kv: KvRounding | None) -> list[Divergence]:
    trace, first = divergence.record(Model.load(reference), SAMPLES, folder)
    return [first, divergence.measure(Model.load(other, kv_cache=kv), SAMPLES, trace)]


def figures(found: Divergence) -> list[float]:
    return [found.perplexity, found.kl_divergence or 0.0, *found.nll, *(found.kl or [])]


@pytest.mark.parametrize(
    ("name", "knobs", "kv"),
    [
        ("tiny_v3", {"activations": {"dynamic": {"attention": True}}}, None),
        ("tiny_v2", {"activations": "dynamic"}, KvRounding(num_bits=4, delta=True)),
        ("tiny_v32", {}, None),
        ("tiny_v4", {}, None),
        ("tiny_qwen2", {"activations": "dynamic"}, None),
        ("tiny_llama", {}, KvRounding(num_bits=8)),
    ],
)
def test_streamed_is_in_memory(
    name: str, knobs: dict[str, object], kv: KvRounding | None, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    path: Path = request.getfixturevalue(name)
    other = made(path, tmp_path / "other", **knobs)
    (tmp_path / "trace").mkdir()
    expected = in_memory(path, other, tmp_path / "trace", kv)
    opened = open_checkpoint(other)
    subjects = {"a": Subject(open_checkpoint(path)), "b": Subject(opened, kv or kv_rounding(opened.kv_cache))}
    found = streamed.measure(subjects, SAMPLES, tmp_path / "work", NO_LIMITS, silent)
    # A value that lies between two 8-bit codes goes either way when a sum has another order
    bound = 0.05 if "activations" in knobs or kv else 1e-4
    for mine, theirs, near in zip(found.values(), expected, (1e-4, bound), strict=True):
        torch.testing.assert_close(torch.tensor(figures(mine)), torch.tensor(figures(theirs)), rtol=near, atol=near / 5)
        assert mine.tokens == theirs.tokens
    assert sum(found["b"].agreed or []) == pytest.approx(sum(expected[1].agreed or []), abs=3 if bound > 0.01 else 0)
    assert found["b"].kl_divergence == pytest.approx(expected[1].kl_divergence, rel=bound)
    assert found["b"].error_by_layer == pytest.approx(expected[1].error_by_layer, rel=bound)
    assert found["b"].outliers_by_layer is not None
    for mine, theirs in zip(found["b"].outliers_by_layer, expected[1].outliers_by_layer or [], strict=True):
        assert mine == pytest.approx(theirs, rel=bound, abs=bound / 5)
    routed, expected_routed = found["b"].experts_by_layer, expected[1].experts_by_layer
    assert (routed is None) == (expected_routed is None) == (name in ("tiny_qwen2", "tiny_llama"))
    for one, other in zip(routed or [], expected_routed or [], strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:  # a tie goes either way when a sum has another order
            assert one["changed"] == pytest.approx(other["changed"], abs=0.02)
            assert one["busiest"] == pytest.approx(other["busiest"], abs=0.02)


def test_a_shallower_model_runs_by_itself(tiny_llama: Path, tmp_path: Path) -> None:
    source, short = open_checkpoint(tiny_llama), tmp_path / "short"
    with CheckpointWriter(short, source) as writer:
        for name in source.header.tensors:
            if ".layers.1." not in name:
                writer.copy(name)
        writer.finish({"num_hidden_layers": 1}, {}, [])
    (tmp_path / "trace").mkdir()
    expected = in_memory(tiny_llama, short, tmp_path / "trace", None)
    subjects = {"a": Subject(source), "b": Subject(open_checkpoint(short))}
    found = streamed.measure(subjects, SAMPLES, tmp_path / "work", NO_LIMITS, silent)
    assert found["b"].kl_divergence == pytest.approx(expected[1].kl_divergence, rel=1e-5)
    assert found["b"].error_by_layer is None


def test_two_workers_and_stops_change_nothing(tiny_v3: Path, tmp_path: Path) -> None:
    subjects = {"a": Subject(open_checkpoint(tiny_v3)), "b": Subject(open_checkpoint(made(tiny_v3, tmp_path / "o")))}
    whole = streamed.measure(subjects, SAMPLES, tmp_path / "whole", NO_LIMITS, silent)
    assert streamed.measure(subjects, SAMPLES, tmp_path / "two", Limits(workers=2), silent) == whole

    def stopping(at: int) -> Callable[[int, int, str], None]:
        def stop(done: int, total: int, note: str) -> None:
            if done == at:
                raise KeyboardInterrupt

        return stop

    for at in (0, 1, 2):
        with pytest.raises(KeyboardInterrupt):
            streamed.measure(subjects, SAMPLES, tmp_path / "cut", NO_LIMITS, stopping(at))
    assert streamed.measure(subjects, SAMPLES, tmp_path / "cut", NO_LIMITS, silent) == whole


def evaluate(model: Path, out: Path, text: Path, **knobs: object) -> dict[str, object]:
    stage = Evaluate.model_validate(
        {"text": text, "windows": 4, "length": 32, "models": ["b"], "reference": "a", **knobs}
    )
    out.mkdir(parents=True, exist_ok=True)
    context = Context("evaluate", out, "stages: []\n", 0, outputs={"a": model, "b": model}, memory=None)
    found: dict[str, object] = json.loads(stage.run(open_checkpoint(model), context).path.read_text())
    return found


def test_the_report_says_that_nothing_was_generated(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    found = evaluate(tiny_qwen2, tmp_path / "out", text, streamed=True, problems=3)
    assert found["text"]["mode"] == "teacher-forced, streamed"  # type: ignore[index]
    assert any("teacher-forced" in note for note in found["notes"])  # type: ignore[attr-defined]
    for row in found["models"]:  # type: ignore[attr-defined]
        assert row["metrics"]["exact_match"] is None
        assert row["metrics"]["kl_divergence"] == pytest.approx(0, abs=1e-9)
    assert found["suite"] is None
    left = {file.name for file in (tmp_path / "out").glob(".dsc_*")}
    assert left <= set(owned.NAMES)  # which the pipeline forgets once its state lists the reports


def test_it_is_chosen_where_a_model_does_not_fit(tiny_qwen2: Path) -> None:
    header = open_checkpoint(tiny_qwen2).header
    assert streamed.fits(header, 1 << 40)
    assert not streamed.fits(header, 1 << 30)
    memory, work, tasks = streamed.cost(header, 4, 512)
    more, worked, _ = streamed.cost(header, 8, 512)
    assert 0 < memory.alone < more.alone
    assert 0 < work.products < worked.products
    assert tasks.products == 0


def test_another_vocabulary_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    source, cut = open_checkpoint(tiny_llama), tmp_path / "cut"
    with CheckpointWriter(cut, source) as writer:
        for name in source.header.tensors:
            tensor = source.read(name, None)
            writer.add(name, tensor[:505].clone() if tensor.shape[0] == 512 else tensor)
        writer.finish({"vocab_size": 505}, {}, [])
    subjects = {"a": Subject(source), "b": Subject(open_checkpoint(cut))}
    with pytest.raises(DscError, match="vocabularies of 512"):
        streamed.measure(subjects, SAMPLES, tmp_path / "work", NO_LIMITS, silent)
    with pytest.raises(DscError, match="token 600 in a vocabulary of 512"):
        streamed.measure({"a": Subject(source)}, [Sample([1, 600], 1)], tmp_path / "work", NO_LIMITS, silent)


def test_another_evaluation_does_not_go_on(tiny_qwen2: Path, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluate(tiny_qwen2, out, text, streamed=True)
    (out / ".dsc_evaluate").mkdir()
    write_sealed(out / ".dsc_evaluate" / "identity.json", {"text": "another"})
    with pytest.raises(DscError, match="unfinished run with other"):
        evaluate(tiny_qwen2, out, text, streamed=True)

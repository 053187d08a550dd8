"""The pool seen block by block is the pool as the whole model sees it; text chosen from it goes into the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.calibration.selection import Candidates
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.calibration.tokens import read_windows
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.compress import score_windows
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.stages import text as stage_text
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.streaming import head
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.workers import open_pool

TOKENS = torch.randint(2, 512, (40, 64), generator=torch.Generator().manual_seed(5))  # 2560: more than one batch


def scored(path: Path, work: Path, count: int = 1) -> Candidates:
    run = PlainRun(Architecture.of(open_checkpoint(path)), work)
    with open_pool(run, count) as pool:
        return score_windows.score_windows(run, TOKENS, pool, lambda done, total, note: None)


@pytest.mark.parametrize("model", ["tiny_v3_bf16", "tiny_qwen2", "tiny_llama"])
def test_in_blocks_as_in_memory(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = request.getfixturevalue(model)
    monkeypatch.setattr(head.pieces, "__defaults__", (100 * 700, 100 * 128))  # the head in six slices
    found = scored(path, tmp_path)
    whole = Model.load(path)
    asked: dict[str, Tensor] = {}
    for layer, weights in enumerate(whole.blocks):

        def look(name: str, x: Tensor, layer: int = layer) -> None:
            if ".experts." in name and name.endswith("gate_proj"):
                asked[f"{layer}.{name.split('.')[2]}"] = torch.tensor(len(x))

        whole.blocks[layer] = HookedWeights(weights, look)
    with torch.no_grad():
        scores = whole(TOKENS).double().log_softmax(-1)
        last = whole.hidden_states(TOKENS)[-1]
        states = whole.family.final_hidden(whole.cfg, whole.top, last).double().mean(1)
        entropy = -(scores.exp() * scores).sum(-1).mean(1)
    torch.testing.assert_close(found.entropy, entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.states, states, rtol=1e-3, atol=1e-4)
    if found.experts is None:
        assert whole.cfg.moe is None
    else:
        assert found.experts.shape == (40, 2, 8)
        assert found.experts.sum(-1).eq(64 * 2).all()  # each token asks two
        total = {f"{layer + 1}.{e}": n for layer, row in enumerate(found.experts.sum(0)) for e, n in enumerate(row)}
        assert {key: int(n) for key, n in total.items() if n} == {key: int(n) for key, n in asked.items()}


def test_workers_see_the_same(tiny_v3: Path, tmp_path: Path) -> None:
    for one, two in zip(scored(tiny_v3, tmp_path / "a"), scored(tiny_v3, tmp_path / "b", 2), strict=True):
        assert torch.equal(one, two)


def context(path: Path, out: Path, told: list[str], **select: object) -> Context:
    calibration = {"sources": [str(path)], "samples": 4, "length": 32, "select": {"from": 12, **select}}
    return Context("out", out, "", 0, calibration, tell=told.append)


def test_balanced_text_reaches_more(tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    source, told = open_checkpoint(tiny_v3), list[str]()
    found = stage_text.calibration_text(source, context(text, tmp_path, told, balance=True), tmp_path / "work").facts
    now, then = (found["selection"][key] for key in ("experts", "experts_in_order"))
    assert now["fewest"] > then["fewest"]
    assert f"fewest {now['fewest']} ({then['fewest']} in order)" in told[-1]


def test_a_run_calibrates_on_what_was_chosen(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    stage = Compress(weights=WEIGHTS["gptq"].model_validate({"group_size": 32}))
    wanted = context(text, tmp_path / "out", [])
    out = stage.run(open_checkpoint(tiny_llama), wanted).path
    told = json.loads((out / "dsc_manifest.json").read_text())["calibration"]
    chosen = told["selection"]["windows"]
    assert len(set(chosen)) == 4 and max(chosen) < 12
    assert told["selection"]["entropy"] != told["selection"]["entropy_in_order"]
    assert told["sources"][0]["tokens"] == 4 * 32
    everything = Calibration.model_validate({**wanted.calibration, "samples": 12})
    tokens = read_windows(everything, load_tokenizer(tiny_llama)).tokens[chosen]
    assert torch.equal(
        stage_text.calibration_text(open_checkpoint(tiny_llama), wanted, tmp_path / "again").tokens, tokens
    )


def test_an_interrupted_run_does_not_choose_again(
    tiny_llama: Path,
    text: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, wanted = open_checkpoint(tiny_llama), context(text, tmp_path, [])
    first = stage_text.calibration_text(source, wanted, tmp_path / "work")
    monkeypatch.setattr(score_windows, "score_windows", None)
    again = stage_text.calibration_text(source, wanted, tmp_path / "work")
    assert torch.equal(first.tokens, again.tokens)
    assert first.facts == again.facts
    with pytest.raises(TypeError):
        stage_text.calibration_text(source, context(text, tmp_path, [], alpha=1), tmp_path / "work")


def test_a_pool_that_is_too_small(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    with pytest.raises(DscError, match="40 samples cannot be chosen from 12 windows"):
        stage_text.calibration_text(open_checkpoint(tiny_llama), context(text, tmp_path, []), tmp_path, samples=40)


def test_shares_hold_in_what_is_chosen(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_bytes(text.read_bytes())
    sources = [{"path": str(text), "share": 3}, {"path": str(tmp_path / "b.jsonl"), "share": 1}]
    calibration = {"sources": sources, "samples": 8, "length": 32, "select": {"from": 13}}
    wanted = Context("out", tmp_path, "", 0, calibration, tell=lambda line: None)
    found = stage_text.calibration_text(open_checkpoint(tiny_llama), wanted, tmp_path / "work").facts
    assert [source["tokens"] for source in found["sources"]] == [6 * 32, 2 * 32]

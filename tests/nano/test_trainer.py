"""The trainer of the built-in model: balancing, taking experts out, uneven channels, resuming."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from deepseek_compress import tasks
from nano import data, publish, train
from nano import model as nano
from nano.optimizer import orthogonal


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    return nano.build(torch.device("cpu"), 0)


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    ids, weights = data.singles(tasks.mixture(5, 6, "train"))
    return torch.from_numpy(ids).long(), torch.from_numpy(weights).float()


def test_rows_hold_whole_problems_with_their_weights() -> None:
    problems = tasks.mixture(5, 30, "train")
    ids, weights = data.packed(problems)
    assert ids.shape[1] == data.PACKED
    assert [i for row in ids for i in row if i] == [i for p in problems for i in data.tokens_of(p)[0]]
    answers = sum(len(p.solution.split()) + 1 for p in problems)
    assert (weights == 1).sum() == answers and ((weights == 0) == ((ids == 0) | (ids == 1))).all()


def test_experts_are_those_of_transformers(model: torch.nn.Module, rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    with torch.no_grad():
        ours = model(input_ids=rows[0][:2], use_cache=False).logits
        for moe in nano.mixtures(model):
            del moe.experts.forward  # the class's own
        theirs = model(input_ids=rows[0][:2], use_cache=False).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_taken_out_experts_are_not_chosen_and_come_back(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = nano.build(torch.device("cpu"), 0)
    moe = nano.mixtures(model)[0]
    moe.gate.e_score_correction_bias.normal_(std=0.01)
    before = moe.gate.e_score_correction_bias.clone()
    with nano.missing_experts(model, torch.Generator().manual_seed(1)):
        out = moe.gate.e_score_correction_bias < nano.TAKEN_OUT / 2
        assert out.view(4, 4).sum(1).tolist() == [1, 1, 1, 1]
        train.loss_of(model, *rows)
        assert moe.experts.chosen[:, out].sum() == 0 and (moe.experts.chosen.sum(1) == 2).all()
        nano.balance(model, torch.ones(rows[0].numel()), 0.001)
    assert torch.equal(moe.gate.e_score_correction_bias[out], before[out])
    load = moe.experts.chosen.sum(0)[~out]
    change = (moe.gate.e_score_correction_bias - before)[~out]
    assert torch.equal(change.sign(), (load.mean() - load).sign())


def test_uneven_channels_change_no_logit(rows: tuple[torch.Tensor, torch.Tensor]) -> None:
    model = nano.build(torch.device("cpu"), 0)
    with torch.no_grad():
        before = model(input_ids=rows[0], use_cache=False).logits
        weight = model.model.layers[1].self_attn.q_a_proj.weight.clone()
        nano.spread(model, 0.4, 0)
        assert (model.model.layers[1].self_attn.q_a_proj.weight / weight).std() > 0.2
        torch.testing.assert_close(model(input_ids=rows[0], use_cache=False).logits, before, rtol=1e-3, atol=1e-4)


def test_orthogonal_has_singular_values_near_one() -> None:
    values = torch.linalg.svdvals(orthogonal(torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0))))
    assert values.min() > 0.6 and values.max() < 1.3


def test_published_tensors_are_decoded_to_the_weights(tmp_path: Path) -> None:
    from deepseek_compress.checkpoint import open_checkpoint

    model = nano.build(torch.device("cpu"), 0)
    (tmp_path / "config.json").write_bytes(nano.CONFIG.read_bytes())
    publish.publish(model.state_dict(), tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    for name, weight in publish.unfused(model.state_dict()).items():
        torch.testing.assert_close(checkpoint.read(name), weight, rtol=0.07, atol=1e-4)


def options(out: Path) -> argparse.Namespace:
    words = "--tokens 2048 --unique 100000 --batch 512 --optimizer adamw --tests 4 --every 2 --workers 1"
    return train.arguments(["--out", str(out), *words.split()])


def test_an_interrupted_training_ends_with_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "SAVE_EVERY", -1.0)
    whole = train.train(options(tmp_path / "whole")).state_dict()
    real, calls = train.loss_of, []

    def interrupted(*given: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*given)

    monkeypatch.setattr(train, "loss_of", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(options(tmp_path / "cut"))
    resumed = train.train(options(tmp_path / "cut")).state_dict()
    assert len(calls) == 5 and all(torch.equal(whole[name], resumed[name]) for name in whole)

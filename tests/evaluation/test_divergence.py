"""Perplexity, KL and top-1 agreement against brute force in float64 and against transformers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import divergence, where
from deepseek_compress.evaluation.divergence import Sample, batches, measure, record
from deepseek_compress.models.moe import route
from deepseek_compress.models.rope import places
from deepseek_compress.models.runtime import Model
from deepseek_compress.streaming import head


@pytest.fixture(scope="module")
def teacher(tiny_v3: Path) -> Model:
    return Model.load(tiny_v3)


@pytest.fixture(scope="module")
def noisy(teacher: Model) -> Model:
    """The teacher with every matrix moved a little: close, but another distribution."""
    generator = torch.Generator().manual_seed(1)
    weights = {
        name: w + 0.1 * w.std() * torch.randn(w.shape, generator=generator) if w.dim() == 2 else w
        for name, w in teacher.weights.items()
    }
    return Model(teacher.family, teacher.cfg, weights)


@pytest.fixture(scope="module")
def samples() -> list[Sample]:
    generator = torch.Generator().manual_seed(2)
    lengths, starts = (5, 12, 9, 12, 2, 30), (1, 4, 8, 1, 1, 20)
    return [
        Sample(torch.randint(512, (n,), generator=generator).tolist(), start)
        for n, start in zip(lengths, starts, strict=True)
    ]


def logits(model: Model, sample: Sample) -> Tensor:
    """One sample alone, no padding: float64 (predicted, vocabulary)."""
    with torch.no_grad():
        return model(torch.tensor([sample.tokens]))[0, sample.start - 1 : -1].double()


def test_equals_brute_force(
    teacher: Model, noisy: Model, samples: list[Sample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "BATCH_TOKENS", 24)  # several batches with padding
    monkeypatch.setattr(head.pieces, "__defaults__", (512 * 3, 100 * 128))  # few rows, parts of the vocabulary
    found = measure(noisy, samples, record(teacher, samples, tmp_path)[0])
    for i, sample in enumerate(samples):
        p, q = logits(teacher, sample).softmax(1), logits(noisy, sample).softmax(1)
        following = torch.tensor(sample.tokens[sample.start :])
        assert found.tokens[i] == len(following)
        assert found.nll[i] == pytest.approx(-q.gather(1, following[:, None]).log().sum().item(), rel=1e-5)
        assert found.kl is not None
        assert found.agreed is not None
        assert found.kl[i] == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-4)
        assert found.agreed[i] == (p.argmax(1) == q.argmax(1)).sum().item()
    total = sum(found.tokens)
    assert found.perplexity == pytest.approx(math.exp(sum(found.nll) / total))
    assert found.kl_divergence == pytest.approx(sum(found.kl or []) / total)
    assert (found.kl_divergence or 0) > 0.001
    assert 0 < (found.top1_agreement or 0) < 1


def test_a_model_does_not_differ_from_itself(teacher: Model, samples: list[Sample], tmp_path: Path) -> None:
    trace, alone = record(teacher, samples, tmp_path)
    found = measure(teacher, samples, trace)
    assert (found.tokens, found.nll, found.kl, found.agreed) == (alone.tokens, alone.nll, alone.kl, alone.agreed)
    assert found.kl_divergence == 0.0
    assert found.top1_agreement == 1.0
    assert found.error_by_layer == [0.0] * 3


def test_perplexity_is_the_loss_of_transformers(tiny_llama: Path) -> None:
    import transformers

    ids = torch.randint(512, (4, 24), generator=torch.Generator().manual_seed(3))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    with torch.no_grad():
        loss = theirs(ids, labels=ids).loss.item()
    found = measure(Model.load(tiny_llama), [Sample(row, 1) for row in ids.tolist()])
    assert found.perplexity == pytest.approx(math.exp(loss), rel=1e-5)
    assert found.kl is None
    assert found.top1_agreement is None


def test_error_by_layer_equals_the_definition(
    teacher: Model, noisy: Model, samples: list[Sample], tmp_path: Path
) -> None:
    found = measure(noisy, samples, record(teacher, samples, tmp_path)[0]).error_by_layer
    apart, whole = torch.zeros(3), torch.zeros(3)
    with torch.no_grad():
        for sample in samples:
            tokens = torch.tensor([sample.tokens])
            pairs = zip(noisy.hidden_states(tokens)[1:], teacher.hidden_states(tokens)[1:], strict=True)
            for layer, (mine, theirs) in enumerate(pairs):
                apart[layer] += (mine - theirs).square().sum()
                whole[layer] += theirs.square().sum()
    assert found == pytest.approx((apart / whole).sqrt().tolist(), rel=1e-4)
    assert found is not None
    assert found[0] > 0


@torch.no_grad()
def test_experts_equal_the_definition(teacher: Model, noisy: Model, samples: list[Sample], tmp_path: Path) -> None:
    found = measure(noisy, samples, record(teacher, samples, tmp_path)[0]).experts_by_layer
    assert found is not None
    moe = teacher.cfg.moe
    assert moe is not None
    for layer, one in enumerate(found):
        assert (one is not None) == teacher.cfg.is_moe(layer)
        if one is None:
            continue
        sets: list[list[set[int]]] = []
        for model in (teacher, noisy):
            block, its = model.blocks[layer], list[set[int]]()
            for sample in samples:
                hidden = model.hidden_states(torch.tensor([sample.tokens]))[layer]
                positions = places(1, 0, len(sample.tokens), hidden.device)
                attended = model.family.attention_part(model.cfg, layer, block, hidden, positions)
                x = model.family.ffn_input(model.cfg, layer, block, attended)
                its += [set(row) for row in route(moe, block, x.flatten(0, 1)).experts.tolist()]
            sets.append(its)
        same = sum(len(mine & theirs) for mine, theirs in zip(*sets, strict=True))
        assert one["changed"] == pytest.approx(1 - same / (moe.top_k * len(sets[0])))
        assert 0 < one["changed"] < 1


def test_blocks_of_another_number_have_no_error_by_layer(
    teacher: Model, tiny_llama: Path, samples: list[Sample], tmp_path: Path
) -> None:
    found = measure(Model.load(tiny_llama), samples, record(teacher, samples, tmp_path)[0])
    assert found.error_by_layer is None
    assert found.kl_divergence is not None


def test_batches_hold_every_sample_once_within_the_limit(samples: list[Sample]) -> None:
    found = batches(samples, limit=30)
    assert sorted(i for batch in found for i in batch) == list(range(len(samples)))
    assert all(len(batch) * max(len(samples[i].tokens) for i in batch) <= 30 for batch in found)


class Words:
    """A tokenizer of one word, one id."""

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def encoded(self, text: str, piece: int) -> Iterator[list[int]]:
        yield self.encode(text)


def test_windows_follow_each_other_without_overlap(tmp_path: Path) -> None:
    file = tmp_path / "text.txt"
    file.write_text(" ".join(map(str, range(23))))
    found = divergence.text_windows(file, Words(), windows=3, length=7)  # type: ignore[arg-type]
    assert [sample.tokens for sample in found] == [list(range(7)), list(range(7, 14)), list(range(14, 21))]
    assert all(sample.start == 1 and sample.predicted == 6 for sample in found)
    with pytest.raises(DscError, match="23 tokens make 3 windows of 7, 4 are asked for"):
        divergence.text_windows(file, Words(), windows=4, length=7)  # type: ignore[arg-type]


def test_what_the_user_can_mend_is_said(tmp_path: Path, teacher: Model) -> None:
    with pytest.raises(DscError, match="No such file"):
        divergence.text_windows(tmp_path / "none.txt", Words(), 1, 8)  # type: ignore[arg-type]
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DscError, match="not UTF-8"):
        divergence.text_windows(tmp_path / "bytes", Words(), 1, 8)  # type: ignore[arg-type]
    with pytest.raises(DscError, match="at least 2 tokens"):
        divergence.text_windows(tmp_path / "none.txt", Words(), 1, 1)  # type: ignore[arg-type]
    with pytest.raises(DscError, match="token 512 in a vocabulary of 512"):
        measure(teacher, [Sample([1, 512], 1)])


def test_logits_alone_give_the_same_numbers_and_llama_cpps_percentiles(
    teacher: Model, noisy: Model, samples: list[Sample], tmp_path: Path
) -> None:
    trace, _ = record(teacher, samples, tmp_path)
    whole, alone = measure(noisy, samples, trace), divergence.measure_logits(noisy, samples, trace)
    assert alone.kl == pytest.approx(whole.kl, rel=1e-5)
    assert alone.nll == pytest.approx(whole.nll, rel=1e-6)
    assert alone.agreed == whole.agreed
    assert whole.positions is not None
    assert alone.positions is not None
    assert alone.positions.kl == pytest.approx(whole.positions.kl, rel=1e-4, abs=1e-9)
    assert alone.positions.entropy == pytest.approx(whole.positions.entropy, rel=1e-5)
    every = []  # llama.cpp: of each position sum p (log p - log q), sorted, interpolated between neighbours
    for sample in samples:
        p, q = logits(teacher, sample).log_softmax(1), logits(noisy, sample).log_softmax(1)
        every += (p.exp() * (p - q)).sum(1).tolist()
    every.sort()
    found = where.spread(whole.positions, samples, lambda ids: str(list(ids)))
    for name, at in (("median", 0.5), ("p90", 0.9), ("p99", 0.99)):
        place = at * (len(every) - 1)
        low = int(place)
        expected = every[low] + (place - low) * (every[min(low + 1, len(every) - 1)] - every[low])
        assert found[name] == pytest.approx(expected, rel=1e-4)
    assert found["max"] == pytest.approx(every[-1], rel=1e-4)
    assert sum(band["share"] for band in found["by_entropy"]) == pytest.approx(1.0)
    assert sum(band["positions"] for band in found["by_entropy"]) == len(every)
    worst = found["worst"][0]
    index = whole.positions.kl.index(max(whole.positions.kl))
    sample, place_ = samples[whole.positions.sample[index]], whole.positions.place[index]
    assert worst["token"] == str([sample.tokens[place_]])

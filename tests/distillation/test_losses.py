"""The losses: by brute force, least at the teacher for every form, temperature and vocabulary, right in the mean."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from deepseek_compress.distillation import words
from deepseek_compress.distillation.losses import (
    LOSSES,
    Divergence,
    ForwardKl,
    JensenShannon,
    ReverseKl,
    Target,
    TotalVariation,
    entries,
    losses_of,
    total,
)
from deepseek_compress.errors import DscError

DIVERGENCES = {
    "forward_kl": ForwardKl(),
    "reverse_kl": ReverseKl(),
    "jensen_shannon": JensenShannon(beta=0.3),
    "total_variation": TotalVariation(),
}
FORMS = ("exact", "top_k", "sampled")


def target_of(logits: Tensor, form: str, count: int, temperature: float, seed: int = 0) -> Target:
    """What a teacher with these logits (N, vocabulary) says."""
    log_probs = functional.log_softmax(logits / temperature, -1)
    if form == "exact":
        return Target(log_probs)
    if form == "top_k":
        found = words.top_k(log_probs, count)
        return Target(found.log_probs, found.ids)
    draws = torch.rand(len(logits), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Target(*(words.sampled(log_probs, count, draws)[i] for i in (1, 0, 2)))


def loss_and_gradient(
    divergence: Divergence, student: Tensor, target: Target, temperature: float
) -> tuple[Tensor, Tensor]:
    student = student.clone().requires_grad_()
    loss = total(divergence, entries(student, target, temperature))
    loss.sum().backward()  # type: ignore[no-untyped-call]
    assert student.grad is not None
    return loss.detach(), student.grad


def brute_force(name: str, p: Tensor, q: Tensor) -> Tensor:
    """The divergence over a whole vocabulary, in float64."""
    if name == "forward_kl":
        return (p * (p / q).log()).sum(-1)
    if name == "reverse_kl":
        return (q * (q / p).log()).sum(-1)
    if name == "total_variation":
        return (p - q).abs().sum(-1) / 2
    m = 0.3 * p + 0.7 * q
    return 0.3 * (p * (p / m).log()).sum(-1) + 0.7 * (q * (q / m).log()).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_each_divergence_by_brute_force(name: str, temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, student = (3 * torch.randn(5, 12, generator=generator) for _ in range(2))
    p, q = (torch.softmax(logits.double() / temperature, -1) for logits in (teacher, student))
    for form in FORMS:  # with all tokens named, the three are one
        target = target_of(teacher, form, 12, temperature)
        found = total(DIVERGENCES[name], entries(student, target, temperature))
        assert torch.allclose(found.double(), brute_force(name, p, q), atol=1e-5), form


def test_a_bucket_and_a_sample_by_hand() -> None:
    teacher = torch.tensor([0.6, 0.2, 0.15, 0.05])
    student = torch.tensor([0.1, 0.3, 0.4, 0.2])
    target = Target(teacher[None, :2].log(), torch.tensor([[0, 1]]))
    p, q = torch.tensor([0.6, 0.2, 0.2]), torch.tensor([0.1, 0.3, 0.6])
    found = total(ForwardKl(), entries(student.log()[None], target, 1.0))
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    # 0.6 is certain; tokens 1 and 3 were drawn and stand for 0.2 each; the student shares 0.9 as 0.3/0.2 is to 0.2/0.05
    target = Target(teacher[None, [0, 1, 3]].log(), torch.tensor([[0, 1, 3]]), torch.tensor([1]))
    p, q = torch.tensor([0.6, 0.2, 0.2]), torch.tensor([0.1, 0.9 * 1.5 / 5.5, 0.9 * 4 / 5.5])
    found = total(ForwardKl(), entries(student.log()[None], target, 1.0))
    assert float(found) == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)


@given(
    seed=st.integers(0, 10_000),
    vocabulary=st.sampled_from([8, 100, 3000]),
    count=st.sampled_from([1, 4, 22]),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    spread=st.sampled_from([0.1, 1.0, 6.0]),
    form=st.sampled_from(FORMS),
    name=st.sampled_from(sorted(DIVERGENCES)),
)
def test_a_teacher_is_the_minimum_of_its_loss(
    seed: int, vocabulary: int, count: int, temperature: float, spread: float, form: str, name: str
) -> None:
    generator = torch.Generator().manual_seed(seed)
    teacher = spread * torch.randn(4, vocabulary, generator=generator)
    target = target_of(teacher, form, min(count, vocabulary - 1), temperature, seed)
    loss, gradient = loss_and_gradient(DIVERGENCES[name], teacher, target, temperature)
    other = teacher + 0.5 * torch.randn(teacher.shape, generator=generator)
    worse, away = loss_and_gradient(DIVERGENCES[name], other, target, temperature)
    assert float(loss.max()) < 1e-5
    if name != "total_variation":  # whose gradient has no length to lose
        assert float(gradient.norm()) < 1e-3 * float(away.norm()) + 1e-6
    assert bool((worse > -1e-6).all())
    if form == "exact":  # in float64: where one token is nearly certain, rounding would decide
        both = (teacher.double(), other.double())
        target = target_of(both[0], form, count, temperature, seed)
        loss, worse = (loss_and_gradient(DIVERGENCES[name], logits, target, temperature)[0] for logits in both)
        assert bool((worse > loss).all())


@pytest.mark.parametrize("name", sorted(DIVERGENCES))
def test_in_the_mean_over_draws_only_the_teacher_is_least(name: str) -> None:
    """1,000 draws: at the teacher no gradient beyond 3 standard errors; every student that differs is worse."""
    teacher = 2 * torch.randn(1, 200, generator=torch.Generator().manual_seed(1))
    others = teacher.repeat(3, 1)
    others[0] += 0.3 * torch.randn(200, generator=torch.Generator().manual_seed(2))
    others[1, teacher[0].argsort()[40]] += 5  # one token that is seldom drawn
    others[2, teacher[0].argsort()[100:140]] -= 1  # the middle of the tail
    many = torch.cat((teacher, others)).repeat_interleave(1000, 0)
    target = target_of(teacher.expand(4000, -1), "sampled", 12, 1.0)
    loss, gradient = loss_and_gradient(DIVERGENCES[name], many, target, 1.0)
    draws = gradient[:1000]
    assert bool((draws.mean(0).abs() <= 3 * draws.std(0) / 1000**0.5 + 1e-6).all())
    p, q = (torch.softmax(logits.double(), -1) for logits in (teacher.expand(3, -1), others))
    whole = brute_force(name, p, q)
    for row in range(3):
        mean = float(loss[1000 * (row + 1) : 1000 * (row + 2)].mean())
        assert 0.02 * float(whole[row]) < mean < (1.05 if name == "forward_kl" else 1.5) * float(whole[row])
        assert mean > 1e3 * float(loss[:1000].mean())


def test_draws_have_the_mass_of_their_tokens() -> None:
    """22 of 500 tokens, 4,000 even draws: certain ones in each, the others as often as p_i / tau says."""
    log_probs = functional.log_softmax(2.5 * torch.randn(1, 500, generator=torch.Generator().manual_seed(3)), -1)
    draws = (torch.arange(4000, dtype=torch.float64) + 0.5) / 4000
    found = words.sampled(log_probs.expand(4000, -1), 22, draws)
    assert torch.equal(found.log_probs, log_probs.expand(4000, -1).gather(1, found.ids))
    assert bool((found.log_probs.diff(dim=1) <= 0).all())
    assert bool((found.ids.sort(dim=1).values.diff(dim=1) > 0).all()), "no token twice"
    (certain,) = found.certain.unique().tolist()
    assert 2 < certain < 20
    p = log_probs[0].exp().double()
    tau = (1 - p.sort(descending=True).values[:certain].sum()) / (22 - certain)
    wanted = (p / tau).clamp(max=1)
    seen = torch.bincount(found.ids.flatten(), minlength=500) / 4000
    assert bool(((seen - wanted).abs() < 2 / 4000).all())


def test_the_loss_that_tempered_a_uniform_bucket_is_gone() -> None:
    """At T = 4 the old loss had its minimum elsewhere; this gradient at the teacher is rounding."""
    teacher = 3 * torch.randn(8, 5000, generator=torch.Generator().manual_seed(5))
    target = target_of(teacher, "top_k", 16, 4.0)
    _, gradient = loss_and_gradient(ForwardKl(), teacher, target, 4.0)
    assert float(gradient.abs().max()) < 1e-6


def test_losses_are_named_with_shares_and_mistakes_are_told() -> None:
    assert [type(loss) for loss in losses_of("reverse_kl")] == [ReverseKl]
    two = losses_of({"jensen_shannon": {"beta": 0.1, "share": 0.7}, "cross_entropy": 0.3})
    assert [loss.share for loss in two] == [0.7, 0.3]
    assert set(LOSSES) > {"forward_kl", "hidden_states", "router", "contrastive"}
    with pytest.raises(DscError, match="unknown loss 'kl'; valid names: forward_kl"):
        losses_of("kl")
    with pytest.raises(DscError, match=r"loss jensen_shannon\.beta"):
        losses_of({"jensen_shannon": {"beta": 2}})

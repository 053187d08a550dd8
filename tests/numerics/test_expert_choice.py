"""Changed choices and loads of experts, counted by hand."""

from __future__ import annotations

import torch

from deepseek_compress.numerics.expert_choice import ExpertChoice


def test_pairs_are_counted_whatever_their_order() -> None:
    found = ExpertChoice(5)
    found.add(torch.tensor([[0, 1], [2, 3]]), torch.tensor([[1, 0], [3, 0]]))  # all of the first, one of the second
    found.add(torch.tensor([[0, 1]]), torch.tensor([[2, 3]]))  # none

    assert found.result() == {"changed": 0.5, "busiest": [2 / 3, 2 / 3], "idle": [1, 1]}


def test_a_model_with_fewer_active_experts() -> None:
    found = ExpertChoice(3)
    found.add(torch.tensor([[0, 1], [1, 2]]), torch.tensor([[0], [0]]))

    assert found.result() == {"changed": 0.75, "busiest": [1.0, 1.0], "idle": [0, 2]}


def test_of_no_token_nothing_is_said() -> None:
    assert ExpertChoice(3).result() is None

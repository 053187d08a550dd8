"""Errors by channel against the definition, and channels that stand out."""

from __future__ import annotations

import pytest
import torch

from deepseek_compress.numerics.channel_error import ChannelError


def test_error_and_outliers_equal_the_definition() -> None:
    generator = torch.Generator().manual_seed(3)
    states = torch.randn(40, 16, generator=generator)
    states[:, 5] *= 9
    states[:, 11] *= 4  # above the others, below six times their median
    given = states + 0.1 * torch.randn(40, 16, generator=generator)
    given[:, 5] += 1
    found = ChannelError(16)
    for rows in (slice(0, 7), slice(7, 40)):
        found.add(states[rows], given[rows])

    apart = (given - states).double().square()
    assert found.relative() == pytest.approx(float((apart.sum() / states.double().square().sum()).sqrt()))
    assert found.outliers() == {
        "channels": 1,
        "size": pytest.approx(float(states[:, 5].double().square().sum() / states.double().square().sum())),
        "error": pytest.approx(float(apart[:, 5].sum() / apart.sum())),
    }


def test_several_streams_count_together() -> None:
    streams = torch.ones(3, 4, 8)
    found = ChannelError(8)
    found.add(streams, 2 * streams)

    assert found.relative() == 1.0
    assert found.outliers() == {"channels": 0, "size": 0.0, "error": 0.0}


def test_nothing_is_said_of_a_state_that_is_zero() -> None:
    found = ChannelError(4)
    found.add(torch.zeros(2, 4), torch.ones(2, 4))

    assert found.relative() is None
    assert found.outliers() is None

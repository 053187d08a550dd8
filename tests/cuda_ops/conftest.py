"""Every set of instructions that the CPU kernels are built for."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

import cuda_ops
from cuda_ops import ops


@pytest.fixture(scope="module", params=ops.ISA)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    with cuda_ops.limited_to(request.param) as available:
        if not available:
            pytest.skip(f"this processor (or this build) has no {request.param}")
        yield request.param

"""The multiple-choice knapsack (Sinha & Zoltners 1979): one option of each item, the least total loss within a budget.

    minimise    sum over i, j of loss[i][j] x[i][j],      x[i][j] 0 or 1
    subject to  sum over j of x[i][j] = 1 for each item i,   sum over i, j of cost[i][j] x[i][j] <= budget

solved to optimality by HiGHS (`scipy.optimize.milp`). The solver computes in floating point with a tolerance, so what
it gives is checked in integers, and where it is over the budget by a rounding, solved again with that much less.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise

import numpy as np

SCALE = 1e6  # budget and losses are brought to this size: what HiGHS tolerates, 1e-6 as it stands, is nothing of them


def assign(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int] | None:
    """Which option each item gets; None where even the cheapest ones cost more than `budget`.

    costs, losses: for each item the same number of options; costs not negative, losses finite.
    """
    least = sum(min(options) for options in costs)
    room = budget
    while room >= least:
        chosen = _solved(costs, losses, room)
        spent = sum(options[choice] for options, choice in zip(costs, chosen, strict=True))
        if spent <= budget:
            return chosen
        room -= spent - budget
    return None if least > budget else [min(range(len(o)), key=o.__getitem__) for o in costs]


def _solved(costs: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int) -> list[int]:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    sizes = [len(options) for options in costs]
    item = np.repeat(np.arange(len(sizes)), sizes)  # of each variable
    cost = np.concatenate([np.asarray(options, dtype=np.float64) for options in costs])
    loss = np.concatenate([np.asarray(options, dtype=np.float64) for options in losses])
    largest = float(np.abs(loss).max()) or 1.0
    one_each = csr_array((np.ones(len(item)), (item, np.arange(len(item)))), shape=(len(sizes), len(item)))
    within = LinearConstraint((cost * (SCALE / max(1, budget)))[None, :], -np.inf, SCALE)
    with _silence():
        found = milp(
            loss * (SCALE / largest),
            integrality=np.ones(len(item)),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), within],
            options={"mip_rel_gap": 0.0},
        )
    if found.x is None:
        raise ValueError(f"HiGHS: {found.message}")
    starts = np.concatenate(([0], np.cumsum(sizes)))
    return [int(np.argmax(found.x[low:high])) for low, high in pairwise(starts)]


@contextmanager
def _silence() -> Iterator[None]:
    """HiGHS prints now and then what it does, past Python; standard output is for results."""
    sys.stdout.flush()
    kept, nowhere = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nowhere)

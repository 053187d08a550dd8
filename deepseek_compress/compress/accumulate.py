"""Statistics of a linear's input over the calibration text, summed batch by batch in a fixed order."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import reduce

import torch
from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics.hessian import add_gram, mirror
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.streaming.block_run import Part
from deepseek_compress.streaming.experts import ROWS
from deepseek_compress.streaming.paired_forward import Split, rows


class Accumulator:
    """Sums the fields of `Statistics` that a solver needs, over inputs (..., columns)."""

    def __init__(self, needs: Iterable[str]) -> None:
        self.needs = frozenset(needs)
        self.tokens = 0
        self._hessian: Tensor | None = None
        self._absmax: Tensor | None = None
        self._abssum: Tensor | None = None
        self._cross_covariance: Tensor | None = None
        self._residual_covariance: Tensor | None = None
        self._half = Accumulator(self.needs - {"half"}) if "half" in self.needs else None
        self._marks: list[Tensor] = []  # one number a batch, see `_mark`

    def add(self, x: Tensor, split: Split | None = None) -> None:
        """Take in x (..., columns); of a `split` batch the compressed model's rows, and how the original's differ."""
        if split is None:
            parts: list[tuple[Tensor, ...]] = [(x,)]
        else:
            mine, partners = (rows(chosen, split, x) for chosen in (split.ours, split.partners))
            stream = () if split.stream is None else (split.stream[partners] - split.stream[mine],)
            parts = [(x[mine], x[partners] - x[mine], *stream)]
        for part in parts:
            flat = [tensor.reshape(-1, tensor.shape[-1]).float() for tensor in part]
            if self._half is not None:
                middle = len(flat[0]) // 2
                self._half._take([tensor[:middle] for tensor in flat])
                flat = [tensor[middle:] for tensor in flat]
            self._take(flat)
        self._mark()
        if self._half is not None:
            self._half._mark()

    def _take(self, part: Sequence[Tensor]) -> None:
        """Take in x (tokens, columns) and, where they are there, the two covariances' inputs."""
        for chunk in zip(*(torch.split(tensor, ROWS) for tensor in part), strict=True):
            self._rows(chunk[0])
            if len(chunk) > 1:
                self._cross_covariance = _more(self._cross_covariance, chunk[1].T @ chunk[0])
            if len(chunk) > 2:
                self._residual_covariance = _more(self._residual_covariance, chunk[2].T @ chunk[0])

    def merge(self, saved: Statistics) -> None:
        """Take in what was summed before."""
        self.tokens += saved.tokens
        if "hessian" in self.needs and saved.hessian is not None:
            self._hessian = _more(self._hessian, saved.hessian)
        if "input_absmax" in self.needs and saved.input_absmax is not None:
            self._absmax = _larger(self._absmax, saved.input_absmax)
        if "input_absmean" in self.needs and saved.input_absmean is not None:
            self._abssum = _more(self._abssum, saved.input_absmean * saved.tokens)
        self._mark()

    def _rows(self, x: Tensor) -> None:
        self.tokens += len(x)
        if "hessian" in self.needs:
            self._hessian = add_gram(self._hessian, x)
        if "input_absmax" in self.needs:
            self._absmax = _larger(self._absmax, x.abs().amax(0))
        if "input_absmean" in self.needs:
            self._abssum = _more(self._abssum, x.abs().sum(0))

    def _mark(self) -> None:
        """Keep a number that is finite if all inputs so far are. It is read at the end, since reading waits for it."""
        parts = [part for part in (self._absmax, self._abssum) if part is not None]
        if self._hessian is not None:
            parts.append(self._hessian.diagonal())
        products = (self._cross_covariance, self._residual_covariance)
        parts += [part[:, 0] for part in products if part is not None]  # where a row is not finite, all of it is not
        if parts:
            self._marks.append(reduce(torch.add, [part.sum() for part in parts]))

    def statistics(self, name: str) -> Statistics:
        """Return the sums so far of the input of the linear `name`. `DscError` where they are not finite."""
        finite = torch.stack(self._marks).isfinite().tolist() if self._marks else []
        failed = [batch for batch, good in enumerate(finite, 1) if not good]
        if failed:
            what = f"{name}: NaN, infinite or too large inputs from batch {failed[0]} of {len(self._marks)} on"
            raise DscError(what, "check the model for weights that are far too large, and the calibration text")
        mean = None if self._abssum is None else self._abssum / max(1, self.tokens)
        hessian = None if self._hessian is None else mirror(self._hessian)
        found = Statistics(self.tokens, hessian, self._absmax, mean, self._cross_covariance, self._residual_covariance)
        return found if self._half is None else _together(found, self._half.statistics(name))


def _together(rest: Statistics, half: Statistics) -> Statistics:
    """Return the sums over both halves of the tokens, with the first half's."""
    if half.hessian is None or rest.hessian is None:
        return rest if half.hessian is None else half
    both = {name: getattr(rest, name) for name in ("hessian", "cross_covariance", "residual_covariance")}
    both = {name: None if part is None else part + getattr(half, name) for name, part in both.items()}
    if rest.input_absmax is not None and half.input_absmax is not None:
        both["input_absmax"] = torch.maximum(rest.input_absmax, half.input_absmax)
    if rest.input_absmean is not None and half.input_absmean is not None:
        sums = rest.input_absmean * rest.tokens + half.input_absmean * half.tokens
        both["input_absmean"] = sums / (rest.tokens + half.tokens)
    return rest._replace(tokens=rest.tokens + half.tokens, half=half, **both)


def _more(total: Tensor | None, part: Tensor) -> Tensor:
    return part if total is None else total.add_(part)


def _larger(largest: Tensor | None, part: Tensor) -> Tensor:
    return part if largest is None else torch.maximum(largest, part)


class _Seen(Exception):
    """The input was seen; the rest of the forward is not needed."""


def collect(part: Part, names: frozenset[str], into: Accumulator, keep: Callable[[int, Tensor], None] | None) -> None:
    """Feed `into` with the input that the linears `names` share, over all batches.

    The forward is stopped at the first of them, so what comes after need not be there yet. `keep(batch, x)` is given
    the input of the part's last linear.
    """
    for batch in range(part.batches):

        def look(name: str, x: Tensor, batch: int = batch) -> None:
            if name in names:
                _seen(part, name, batch, x, into)
                if keep is not None and name == part.last:
                    keep(batch, x)
                raise _Seen

        try:
            part.forward(lambda weights: HookedWeights(weights, look), batch)
        except _Seen:
            continue
        raise ValueError(f"none of {sorted(names)} ran")


def _seen(part: Part, name: str, batch: int, x: Tensor, into: Accumulator) -> None:
    """Add the input of the linear `name` to the sums."""
    split = part.split(batch)
    if name == part.last and split is not None and part.stream is not None:
        split = split._replace(stream=part.stream(batch))
    into.add(x, split)

"""Two devices for tests without a GPU: they compute on the CPU, but refuse to mix with CPU tensors or each other's.

`torch.device("strict:0")` and `strict:1` behave as CUDA devices do where placement matters: a tensor gets there only
by `.to`, `device=` or `copy_`; an operation over tensors of two devices raises; `.numpy()` refuses it. Operations whose
result the host must wait for (`.item()`, `nonzero`, boolean indexing) work and are counted, as copies are. Scalars (0
dimensions) of the CPU mix with it, as they do with CUDA. A worker process has them where it imports `strict_worker`.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

import cuda_ops
from cuda_ops import ops

NAME = "strict"
WAITS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::item", "aten::equal", "aten::masked_select", "aten::is_nonzero"
}  # fmt: skip
COPIES = {"aten::_to_copy", "aten::copy_"}


class _Backend(_DummyBackendModule):
    def device_count(self) -> int:
        return 2

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """Autocast asks it of every device that is there, where a checkpointed block is computed again."""
        return [torch.bfloat16, torch.float16]

    def synchronize(self, device: object = None) -> None:
        """Everything is done when it was asked; counted."""
        SYNCHRONIZED[NAME] += 1


SYNCHRONIZED: Counter[str] = Counter()  # how often a clock's reader waited

# When imported: the first backward pass of a process counts the devices, and serves no other afterwards.
_setup_privateuseone_for_python_backend(NAME, _Backend())


class StrictTensor(torch.Tensor):
    """A tensor of the device: `inner` holds its values."""

    inner: torch.Tensor
    place: int  # which of the devices

    @staticmethod
    def __new__(cls, inner: torch.Tensor, place: int = 0) -> StrictTensor:
        made = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, place),
            requires_grad=inner.requires_grad,
        )
        made.inner, made.place = inner, place
        return made  # type: ignore[no-any-return]

    def tolist(self) -> Any:
        """As CUDA: the values come to the host."""
        return self.inner.tolist()

    def numpy(self, *_: Any, **__: Any) -> Any:
        """As CUDA: refused."""
        raise TypeError(f"can't convert a tensor on {NAME}:0 to numpy; copy it to the CPU first")

    def __repr__(self, **_: Any) -> str:
        return f"StrictTensor({self.inner!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, Counter())


def _run(func: Any, args: Any, kwargs: Any, counts: Counter[str]) -> Any:
    flat, spec = pytree.tree_flatten((args, kwargs))
    name = func._schema.name
    strict = [x for x in flat if isinstance(x, StrictTensor)]
    plain = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, StrictTensor)]
    target = kwargs.get("device")
    onto = target is not None and torch.device(target).type == NAME
    places = {x.place for x in strict}
    if len(places) > 1 and name not in COPIES:
        raise RuntimeError(f"{name}: tensors on {NAME}:0 and on {NAME}:1")
    place = torch.device(target).index or 0 if onto else strict[0].place if strict else 0
    if strict and name in WAITS:
        counts["waits"] += 1
    if name not in COPIES and strict and any(x.dim() for x in plain):
        shapes = [tuple(x.shape) for x in plain if x.dim()]
        raise RuntimeError(f"{name}: tensors on {NAME}:0 and on the CPU, the latter of shapes {shapes}")
    if name == "aten::_to_copy" and target is not None and (onto != bool(strict) or places - {place}):
        counts["copies"] += 1
    if name == "aten::copy_" and strict and any(x.dim() for x in plain):
        counts["copies"] += 1
    inner = [x.inner if isinstance(x, StrictTensor) else x for x in flat]
    inner = [torch.device("cpu") if isinstance(x, torch.device) and x.type == NAME else x for x in inner]
    own_args, own_kwargs = pytree.tree_unflatten(inner, spec)
    if onto:
        own_kwargs["device"] = torch.device("cpu")
    out = func(*own_args, **own_kwargs)
    if name == "aten::copy_":
        return args[0]
    if not (onto or (strict and not (name == "aten::_to_copy" and target is not None))):
        return out
    owners = {id(x.inner): x for x in strict}

    def wrap(x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, StrictTensor):
            return x
        found = owners.get(id(x))
        return StrictTensor(x, place) if found is None else found

    return pytree.tree_map(wrap, out)


class _Factories(TorchDispatchMode):
    """Sees what makes tensors from nothing, too."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {}, self.counts)


KERNELS = ("search_grid", "round_columns", "unrounded", "softmax")


def _on_device(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The CPU's kernel as one of the device: all of its tensors are there, and so is what it gives."""

    def run(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors = [x for x in flat if isinstance(x, torch.Tensor)]
        places = {x.place for x in tensors if isinstance(x, StrictTensor)}
        if not places:
            return kernel(*args, **kwargs)
        (place,) = places
        where = [tuple(x.shape) for x in tensors if not isinstance(x, StrictTensor) and x.dim() and x.numel() > LIMIT]
        if where:
            raise RuntimeError(f"{kernel.__name__}: tensors on {NAME}:0 and on the CPU, the latter of shapes {where}")
        inner = [x.inner if isinstance(x, StrictTensor) else x for x in flat]
        own_args, own_kwargs = pytree.tree_unflatten(inner, spec)
        out = kernel(*own_args, **own_kwargs)
        return pytree.tree_map(lambda x: StrictTensor(x, place) if isinstance(x, torch.Tensor) else x, out)

    return run


LIMIT = 256  # elements of a table of candidates, which a kernel takes from the host


@contextlib.contextmanager
def strict_device() -> Iterator[Counter[str]]:
    """Inside, `strict` is a device; yields the counts of `waits` and `copies`."""
    own = {name: getattr(ops, name) for name in KERNELS}
    try:
        for name, kernel in own.items():
            for module in (ops, cuda_ops):
                setattr(module, name, _on_device(kernel))
        with _Factories() as mode:
            yield mode.counts
    finally:
        for name, kernel in own.items():
            for module in (ops, cuda_ops):
                setattr(module, name, kernel)

"""The activation scheme of a checkpoint, as the runtime applies it: inputs of linears rounded to 8 bits per token.

The manifest's `activations` is `{"method": NAME, "roles": [...], knobs ...}`: an entry of `numerics.ACTIVATIONS` with
its knobs, and the roles whose linears see rounded inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, cast

from torch import Tensor

from deepseek_compress.models.config import ModelConfig, Role
from deepseek_compress.models.family import Family
from deepseek_compress.models.weights import QuantizedInputs, Weights
from deepseek_compress.numerics import ACTIVATIONS
from deepseek_compress.registry import pick

ROLES = (Role.ATTENTION, Role.MLP, Role.EXPERT, Role.SHARED_EXPERT)


class InputScheme(NamedTuple):
    """How the inputs of linears are rounded, and of which linears."""

    quantize: Callable[[Tensor], Tensor]  # x (..., features) -> x on its grid
    roles: frozenset[Role] = frozenset(ROLES)
    attention: bool = False  # whether the products of attention are in 8 bits too

    def applied(self, family: Family, cfg: ModelConfig, layer: int, weights: Weights) -> Weights:
        """`weights` of block `layer`, with the inputs of its linears rounded."""
        names = {linear.name for linear in family.linears(cfg, layer) if linear.role in self.roles}
        return QuantizedInputs(weights, names, self.quantize)


def input_scheme(manifest: Mapping[str, Any] | None) -> InputScheme | None:
    """The scheme that a manifest's `activations` describes; None stays None. Raises DscError for an unknown one."""
    if manifest is None:
        return None
    knobs = {key: value for key, value in manifest.items() if key not in ("method", "roles")}
    component = pick(ACTIVATIONS, {manifest.get("method", "dynamic"): knobs}, "activations")
    roles = frozenset(map(Role, manifest.get("roles", ROLES)))
    return InputScheme(cast(Callable[[Tensor], Tensor], component), roles, getattr(component, "attention", False))

"""The activation scheme of a checkpoint, as the runtime applies it: inputs of linears rounded to 8 bits.

The manifest's `activations` is `{"method": NAME, "roles": [...], knobs ...}`: an entry of `numerics.ACTIVATIONS` with
its knobs, and the roles whose linears see rounded inputs. A static one has `"inputs": {module: [scale, zero point]}`
besides, the grid of each of those linears.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from deepseek_compress.errors import DscError
from deepseek_compress.models.architecture import Block
from deepseek_compress.models.config import Role
from deepseek_compress.models.weights import QuantizedInputs, Weights
from deepseek_compress.numerics import ACTIVATIONS
from deepseek_compress.numerics.activations import Dynamic, InputGrid
from deepseek_compress.registry import pick

ROLES = (Role.ATTENTION, Role.MLP, Role.EXPERT, Role.SHARED_EXPERT)
Rounding = Callable[[Tensor], Tensor]  # x (..., features) -> x on its grid


class InputScheme(NamedTuple):
    """Rounding of linears' inputs, and the roles it applies to."""

    quantize: Rounding | None  # the same for all; None: each as `inputs` says
    roles: frozenset[Role] = frozenset(ROLES)
    attention: bool = False  # whether the products of attention are in 8 bits too
    inputs: Mapping[str, InputGrid] = {}  # module by checkpoint name -> its grid
    own: Mapping[str, Rounding] = {}  # module by checkpoint name -> what is done instead, whatever its role

    def roundings(self, block: Block) -> Mapping[str, Rounding]:
        """Give how the input of each linear of a block is rounded, by the linear's name in the block."""
        names = [linear.name for linear in block.linears if linear.role in self.roles]
        if self.quantize is not None:
            found: dict[str, Rounding] = dict.fromkeys(names, self.quantize)
        else:
            found = {name: self.inputs[block.prefix + name] for name in names if block.prefix + name in self.inputs}
        every = (linear.name for linear in block.linears) if self.own else ()
        return found | {name: self.own[block.prefix + name] for name in every if block.prefix + name in self.own}

    def applied(self, block: Block, weights: Weights) -> Weights:
        """`weights` of a block, with the inputs of its linears rounded."""
        return QuantizedInputs(weights, self.roundings(block))


def input_scheme(manifest: Mapping[str, Any] | None) -> InputScheme | None:
    """Return the scheme that a manifest's `activations` describes; None stays None. Raises DscError for an unknown
    one."""
    if manifest is None:
        return None
    knobs = {key: value for key, value in manifest.items() if key not in ("method", "roles", "inputs")}
    method = pick(ACTIVATIONS, {manifest.get("method", "dynamic"): knobs}, "activations")
    try:
        roles = frozenset(map(Role, manifest.get("roles", ROLES)))
        stored = dict(manifest.get("inputs") or {})
        given = {str(name): (float(scale), int(zero)) for name, (scale, zero) in stored.items()}
    except (TypeError, ValueError) as error:
        raise DscError(f"dsc_manifest.json: activations: {str(error)[:200]}", "compress the model again") from None
    if isinstance(method, Dynamic):
        return InputScheme(method, roles, method.attention)
    if "inputs" not in manifest:
        raise DscError("dsc_manifest.json: static activations without the grids of inputs", "compress the model again")
    grids = {name: InputGrid(scale, zero, method.num_bits) for name, (scale, zero) in given.items()}
    return InputScheme(None, roles, inputs=grids)

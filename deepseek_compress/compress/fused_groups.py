"""Groups of linears that serving engines fuse, which must share one scheme: q, k and v; gate and up; q_a with kv_a;
all experts of a layer. A linear that is fused with nothing is a group of its own.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from deepseek_compress.models import Architecture, Block, Linear, Role


class FusedGroup(NamedTuple):
    """Linears of one block that must agree."""

    block: Block
    linears: tuple[Linear, ...]

    @property
    def names(self) -> list[str]:
        """Its modules, by their names in the checkpoint."""
        return [self.block.prefix + linear.name for linear in self.linears]

    @property
    def patterns(self) -> list[str]:
        """Shell patterns for exactly these modules: their names, or one for all experts of the layer."""
        if self.linears[0].expert is None:
            return self.names
        return [".".join(self.names[0].split(".")[:-2]) + ".*"]

    @property
    def label(self) -> str:
        """One name for all: `model.layers.3.self_attn.q_proj+k_proj+v_proj`, `model.layers.3.mlp.experts`."""
        if self.linears[0].expert is not None:
            return self.patterns[0].removesuffix(".*")
        stem = self.names[0].rpartition(".")[0]
        return f"{stem}.{'+'.join(name.rpartition('.')[2] for name in self.names)}"

    @property
    def weights(self) -> int:
        """Elements of all its matrices."""
        return sum(linear.rows * linear.columns for linear in self.linears)


def fused_groups(architecture: Architecture, roles: Collection[Role]) -> list[FusedGroup]:
    """Return the groups of all linears of `roles`, block by block, each at the place of its first linear."""
    found: dict[tuple[int, Role, str], list[Linear]] = {}
    for block in architecture.blocks:
        for linear in block.linears:
            if linear.role in roles:
                found.setdefault((block.layer, linear.role, linear.fused or linear.name), []).append(linear)
    return [FusedGroup(architecture.blocks[key[0]], tuple(linears)) for key, linears in found.items()]

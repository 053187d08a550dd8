"""The models that are understood: `Architecture` is one of them on this disk, block by block."""

from deepseek_compress.models.architecture import Architecture, Block
from deepseek_compress.models.config import Linear, ModelConfig, Role
from deepseek_compress.models.families.table import FAMILIES
from deepseek_compress.models.family import Family

__all__ = ["FAMILIES", "Architecture", "Block", "Family", "Linear", "ModelConfig", "Role"]

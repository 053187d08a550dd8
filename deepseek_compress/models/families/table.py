"""The families by the `model_type` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.models.families.deepseek_v2 import DeepseekV2
from deepseek_compress.models.families.deepseek_v3 import DeepseekV3
from deepseek_compress.models.families.deepseek_v4 import DeepseekV4
from deepseek_compress.models.families.deepseek_v32 import DeepseekV32
from deepseek_compress.models.families.deepseek_v41 import DeepseekV41
from deepseek_compress.models.families.llama import Llama
from deepseek_compress.models.families.qwen2 import Qwen2
from deepseek_compress.models.families.qwen3 import Qwen3
from deepseek_compress.models.family import Family

FAMILIES: dict[str, type[Family]] = {
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
    "deepseek_v32": DeepseekV32,
    "deepseek_v4": DeepseekV4,
    "deepseek_v41": DeepseekV41,
    "llama": Llama,
    "qwen2": Qwen2,
    "qwen3": Qwen3,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Find the family that `model_type` of a config.json names. Raises DscError with the supported ones."""
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DscError(
            f"config.json: model_type {str(name)[:80]!r} is not supported", f"supported: {', '.join(sorted(FAMILIES))}"
        )
    return FAMILIES[name]()

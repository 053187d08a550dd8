"""DeepSeek-V2 and V2-Lite: V3's attention (V2-Lite without the query latent), softmax routing, no balancing bias."""

from __future__ import annotations

from typing import ClassVar

from deepseek_compress.models.families.deepseek_v3 import DeepseekV3


class DeepseekV2(DeepseekV3):
    """V3 with other routing defaults."""

    model_type: ClassVar[str] = "deepseek_v2"
    method: ClassVar[str] = "greedy"
    scoring: ClassVar[str] = "softmax"
    normalize: ClassVar[bool] = False
    scaling: ClassVar[float] = 1.0

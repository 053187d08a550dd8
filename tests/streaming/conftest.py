"""The fixtures of DeepSeek-V3.2 and V4."""

from tests.models.conftest import tiny_v4, tiny_v32

__all__ = ["tiny_v4", "tiny_v32"]

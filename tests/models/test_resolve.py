"""Names of models: what resolves is also how it is shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from deepseek_compress.errors import DscError
from deepseek_compress.models.resolve import builtin_models, name_of, resolve_model


def test_a_builtin_model_is_shown_by_its_name(tiny_llama: Path) -> None:
    assert set(builtin_models()) == {"builtin:nano"}
    assert name_of(resolve_model("builtin:nano")) == "builtin:nano"
    assert name_of(resolve_model(str(tiny_llama))) == str(tiny_llama)
    with pytest.raises(DscError, match="builtin:nano"):
        resolve_model("builtin:huge")

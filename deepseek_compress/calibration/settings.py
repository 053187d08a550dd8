"""A recipe's `calibration`: sources of text, their shares, the number of samples, and selection among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator, model_serializer, model_validator

from deepseek_compress.calibration.sources import BUILTIN


class Source(BaseModel, frozen=True, extra="forbid"):
    """A file or directory, or `builtin`; a plain string is one without a share."""

    path: str = Field(min_length=1)
    share: float | None = Field(default=None, gt=0, allow_inf_nan=False)  # of the tokens; of the sum of all

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, value: Any) -> Any:
        return {"path": value} if isinstance(value, str) else value

    @model_serializer
    def _as_written(self) -> str | dict[str, Any]:
        return self.path if self.share is None else {"path": self.path, "share": self.share}

    @property
    def name(self) -> str:
        """Without directories: what is written about it is the same wherever the file lies."""
        return self.path if self.path == BUILTIN else Path(self.path).name


class Select(BaseModel, frozen=True, extra="forbid", populate_by_name=True):
    """Calibrate on the windows of a pool that tell the most: see `selection`."""

    pool: int = Field(alias="from", gt=0)  # windows to choose from
    alpha: float = Field(default=0.5, ge=0, allow_inf_nan=False)  # weight of the entropy of the model's prediction
    beta: float = Field(default=0.5, ge=0, allow_inf_nan=False)  # weight of the distance from what is chosen already
    balance: bool = False  # choose instead those that reach the experts most evenly


class Calibration(BaseModel, frozen=True, extra="forbid"):
    """The text that statistics are taken from: `builtin`, or files of the user's."""

    sources: tuple[Source, ...] = Field(default=(Source(path=BUILTIN),), min_length=1)
    samples: int = Field(default=64, gt=0)
    length: int = Field(default=512, gt=1)  # tokens in a sample
    select: Select | None = None
    statistics: str | None = None  # a directory of `dsc calibrate` instead of text; what else is set must agree with it

    @field_validator("sources")
    @classmethod
    def _all_or_none(cls, value: tuple[Source, ...]) -> tuple[Source, ...]:
        without = [source.path for source in value if source.share is None]
        if without and len(without) < len(value):
            raise ValueError(f"{', '.join(without)}: no share, though others have one; give all of them one, or none")
        return value

    @model_validator(mode="after")
    def _enough(self) -> Calibration:
        if self.select is not None and self.select.pool < self.samples:
            raise ValueError(f"select: {self.samples} samples cannot be chosen from {self.select.pool} windows")
        return self

    @property
    def named(self) -> tuple[Source, ...]:
        """The sources that count: with saved statistics, only those that are set."""
        return self.sources if self.statistics is None or "sources" in self.model_fields_set else ()

    def document(self) -> dict[str, Any]:
        """As a recipe writes it; with saved statistics only what it sets."""
        saved = self.statistics is not None
        return self.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_unset=saved)

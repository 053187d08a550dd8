"""Rows of a Parquet file, a few at a time: only the columns that hold text are read."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from deepseek_compress.calibration.forms import COLUMNS, FORMS
from deepseek_compress.errors import DscError

ROWS = 256  # decoded at a time


def read_rows(
    file: Path, columns: Collection[str] = (), form: str = FORMS
) -> Iterator[tuple[int, dict[str, Any] | DscError]]:
    """Yield (number from 1, row) of `file`; the error of a row that cannot be decoded in its place.

    `columns`: read those of them that are there, instead of the forms of calibration text.

    Raises DscError for a file that is no Parquet, or has no columns with text.
    """
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import ParquetFile
    except ImportError:
        what = f"{file}: Parquet needs the package pyarrow"
        raise DscError(what, "pip install 'deepseek-compress[parquet]', or give JSON Lines") from None
    try:
        with ParquetFile(file, buffer_size=1 << 20) as table:
            names = list(table.schema_arrow.names)
            wanted = [key for keys in COLUMNS if set(keys) <= set(names) for key in keys]
            if columns:
                wanted = [name for name in names if name in columns]
            if not wanted or wanted == ["input"]:
                raise DscError(f"{file}: has the columns {', '.join(names)[:200]}", f"its columns must be {form}")
            number = 1
            for batch in table.iter_batches(batch_size=ROWS, columns=wanted, use_threads=False):
                for row in _decoded(batch):
                    yield number, row
                    number += 1
    except (ArrowException, ValueError) as error:
        raise DscError(f"{file}: {str(error).splitlines()[0][:200]}", "give a Parquet file") from None


def _decoded(batch: Any) -> Iterator[dict[str, Any] | DscError]:
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:  # nothing was given yet: the whole batch is decoded first
        for place in range(batch.num_rows):
            try:
                yield batch.slice(place, 1).to_pylist()[0]
            except UnicodeDecodeError as error:
                yield DscError(f"not UTF-8 text ({error.reason})")

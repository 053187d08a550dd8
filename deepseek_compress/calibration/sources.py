"""Calibration text: files of the user's, or the built-in sets, as pieces of text with the place they came from.

A `.jsonl` line and a row of a `.parquet` file have one of the forms of `forms`; `.csv` is refused; any other file is
plain text. `.gz` after the name of a text file is undone. A directory means its files, sorted by name.

Reading stops where there is enough. Up to there a bad line ends it: then no more text is given, and all bad lines of
the source are looked for and reported together.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import IO, cast

from deepseek_compress import limits, resources
from deepseek_compress.calibration.forms import FORMS, Sample, sample_of
from deepseek_compress.calibration.parquet import read_rows
from deepseek_compress.errors import DscError, raise_problems

__all__ = ["BUILTIN", "Sample", "files_of", "read_samples"]

BUILTIN = "builtin"
SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet", ".txt", ".txt.gz", ".md")
TABLES = (".csv", ".tsv")
REPORTED = 20  # bad lines of a source
SEARCHED = 100_000  # good lines after the first bad one in which others are looked for


def files_of(source: str | Path) -> list[Path]:
    """Return the files of one source in the order in which they are read. Raises DscError where there are none."""
    path = resources.data("calibration_data") if str(source) == BUILTIN else Path(source).expanduser()
    if path.is_dir():
        wanted = (".jsonl",) if str(source) == BUILTIN else SUFFIXES  # the built-in sets have a card
        files = [file for file in sorted(path.iterdir()) if file.name.endswith(wanted) and file.is_file()]
        if not files:
            raise DscError(f"{path}: no {' or '.join(wanted)} file in it", "give a file with calibration text")
        return files
    if not path.is_file():
        raise DscError(f"{path}: no such file or directory", "give calibration text of yours, or builtin")
    if path.name.lower().removesuffix(".gz").endswith(TABLES):
        what = f"{path}: a table of separated values, whose columns are not known to be text"
        raise DscError(what, "write a line of JSON a row, with `text`, into a .jsonl file, or give Parquet")
    return [path]


def read_samples(source: str | Path) -> Iterator[Sample]:
    """Yield the samples of one source in the order of its files.

    Raises Problems with file and line (row) of the bad ones, and DscError where the source holds no text.
    """
    bad: list[DscError] = []
    empty, since = True, 0  # since: good lines after the first bad one
    for sample in (sample for file in files_of(source) for sample in _file(file)):
        if isinstance(sample, DscError):
            bad.append(sample)
        elif bad:
            since += 1
        else:
            empty = False
            yield sample
        if len(bad) == REPORTED or since > SEARCHED:
            bad.append(DscError(f"{source}: not searched for bad lines any further", "fix these first"))
            break
    raise_problems(bad)
    if empty:
        raise DscError(f"{source}: no text in it", "give a file with calibration text")


def _file(file: Path) -> Iterator[Sample | DscError]:
    """Yield the samples of a file, and what is wrong with it in their place."""
    name = file.name.removesuffix(".gz")
    try:
        if name.endswith(".jsonl"):
            yield from _lines(file)
        elif name.endswith(".parquet"):
            yield from _rows(file)
        elif name.endswith(".json"):
            yield DscError(f"{file}: one JSON document is not JSON Lines", "write an object a line into a .jsonl file")
        else:
            yield from _plain(file)
    except DscError as error:
        yield error
    except (OSError, EOFError, zlib.error) as error:
        yield DscError(f"{file}: {getattr(error, 'strerror', None) or error}", "give a file that can be read")


def _open(file: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(file)) if file.name.endswith(".gz") else open(file, "rb")


def _plain(file: Path) -> Iterator[Sample | DscError]:
    try:
        with _open(file) as raw, io.TextIOWrapper(raw, encoding="utf-8-sig") as text:
            while piece := text.read(limits.PIECE):
                piece += text.readline(limits.PIECE)
                if "\0" in piece:
                    yield DscError(f"{file}: has zero bytes: not text", "give text or JSON Lines")
                    return
                if piece.strip():
                    yield Sample(file.name, piece)
    except UnicodeDecodeError as error:
        with _open(file) as lines:
            number = next((number for number, line in enumerate(lines, start=1) if not _is_text(line)), 1)
        yield DscError(f"{file}:{number}: not UTF-8 text ({error.reason})", "give text or JSON Lines")


def _is_text(line: bytes) -> bool:
    try:
        line.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _lines(file: Path) -> Iterator[Sample | DscError]:
    with _open(file) as lines:
        for number in count(1):
            line = lines.readline(limits.LINE_BYTES + 1)
            if not line:
                return
            if len(line) > limits.LINE_BYTES:
                yield DscError(
                    f"{file}:{number}: a line of more than {limits.LINE_BYTES >> 20} MiB", "cut it into documents"
                )
                return
            if line.strip():
                yield from _line(f"{file}:{number}", line.removeprefix(codecs.BOM_UTF8) if number == 1 else line)


def _line(origin: str, line: bytes) -> Iterator[Sample | DscError]:
    try:
        sample = sample_of(origin, json.loads(line.decode("utf-8")))
    except UnicodeDecodeError as error:
        yield DscError(f"{origin}: not UTF-8 text ({error.reason})", "give text or JSON Lines")
    except (ValueError, RecursionError) as error:
        yield DscError(f"{origin}: not valid JSON ({error})", f"each line must be {FORMS}")
    except DscError as error:
        yield error
    else:
        if sample is not None:
            yield sample


def _rows(file: Path) -> Iterator[Sample | DscError]:
    for number, row in read_rows(file):
        origin = f"{file}: row {number}"
        try:
            if isinstance(row, DscError):
                raise DscError(f"{origin}: {row.what}", "write its text as UTF-8")
            sample = sample_of(origin, row)
        except DscError as error:
            yield error
        else:
            if sample is not None:
                yield sample

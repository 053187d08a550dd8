"""Statistics that `dsc calibrate` collected, taken up instead of text: only for the model and the data they are of."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from deepseek_compress import provenance
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.calibration.tokens import source_facts
from deepseek_compress.checkpoint import Checkpoint
from deepseek_compress.checkpoint.statistics import SavedStatistics, open_statistics
from deepseek_compress.errors import DscError, raise_problems
from deepseek_compress.stages.base import Context


class Saved(NamedTuple):
    """Statistics, what the manifest says of them, and what tells them from others."""

    statistics: SavedStatistics
    facts: dict[str, Any]
    digest: str


def saved_statistics(source: Checkpoint, context: Context, needs: frozenset[str]) -> Saved | None:
    """Return the statistics that the recipe names; None where it names none.

    needs: fields of `Statistics`. Raises Problems with everything in which they differ from what is asked for.
    """
    wanted = Calibration.model_validate(context.calibration)
    if wanted.statistics is None:
        return None
    raise_problems(saved_problems(source, wanted, needs))
    found = open_statistics(Path(wanted.statistics))
    made = found.manifest
    digest = provenance.digest([made["statistics"], made["calibration"], made["source"]["fingerprint"]])
    return Saved(found, {**made["calibration"], "statistics": digest}, digest)


def saved_problems(source: Checkpoint, wanted: Calibration, needs: frozenset[str]) -> list[DscError]:
    """In what the statistics that `wanted` names are not those of `source` and of the text named with them."""
    if wanted.statistics is None:
        return []
    found = open_statistics(Path(wanted.statistics))
    return [*_lacking(found, needs), *_other_model(found, source), *_other_text(found, wanted)]


def _lacking(found: SavedStatistics, needs: frozenset[str]) -> list[DscError]:
    """Return what a method needs and they do not have."""
    wrong = []
    if "cross_covariance" in needs:
        what = "the method compares the changed model with the original, which saved statistics cannot"
        wrong.append(DscError(f"{found.path}: {what}", "choose gptq, or calibrate with text"))
    if "text" in needs:
        what = f"{found.path}: rotated inputs and static activations need text, saved statistics have none"
        wrong.append(DscError(what, "leave those out, or calibrate with text"))
    if missing := sorted(needs - found.fields - {"cross_covariance", "half", "text"}):
        what = f"{found.path}: holds {', '.join(sorted(found.fields))}, not {', '.join(missing)}"
        wrong.append(DscError(what, "choose another method, or dsc calibrate --set statistics=hessian"))
    return wrong


def _other_model(found: SavedStatistics, source: Checkpoint) -> list[DscError]:
    made = found.manifest["source"]
    if made["fingerprint"] != provenance.fingerprint(source):
        what = f"{found.path}: statistics of another model ({made['name']}, fingerprint {made['fingerprint'][:12]})"
        return [DscError(f"{what} than {source.path}", "run dsc calibrate on this one")]
    if found.manifest["statistics"]["tokenizer"] != tokenizer_hash(source):
        what = f"{found.path}: made with another tokenizer.json than that of {source.path}"
        return [DscError(what, "run dsc calibrate again")]
    return []


def _other_text(found: SavedStatistics, wanted: Calibration) -> list[DscError]:
    """Return problems where settings given with `statistics` differ from those they were made with."""
    recorded, here = found.manifest["calibration"], wanted.model_copy(update={"statistics": None}).document()
    pairs = {key: (recorded.get(key), here.get(key)) for key in ("samples", "length", "select")}
    pairs["sources"] = _named(recorded["sources"]), _named(source_facts(wanted))
    return [
        DscError(f"{found.path}: made with {key} {there}, now {now}", f"leave {key} out, or run dsc calibrate again")
        for key, (there, now) in pairs.items()
        if key in wanted.model_fields_set and there != now
    ]


def _named(sources: list[dict[str, Any]]) -> str:
    """Each source with its share and the start of its files' hashes."""
    words = []
    for source in sources:
        share = "" if source["share"] is None else f"={source['share']}"
        words.append(f"{source['name']}{share} ({' '.join(digest[:12] for digest in source['files'].values())})")
    return ", ".join(words)


def tokenizer_hash(source: Checkpoint) -> str | None:
    """BLAKE3 of the tokenizer of a checkpoint; None where there is none."""
    file = source.path / "tokenizer.json"
    return provenance.hash_file(file) if file.is_file() else None

"""The calibration text of a stage: read, cut into windows and, where the recipe asks, chosen from a pool by a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress import provenance
from deepseek_compress.calibration.selection import Candidates, Quota, by_coverage, by_quality, coverage
from deepseek_compress.calibration.settings import Calibration, Select
from deepseek_compress.calibration.tokens import Windows, apportion, digest_of, facts, read_windows
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import kept, remove_tree, write_sealed
from deepseek_compress.compress import score_windows
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.planning.costs import Memory, Work
from deepseek_compress.planning.device import key as kind
from deepseek_compress.stages.base import Context, Forecast
from deepseek_compress.stages.resumable import CHOSEN
from deepseek_compress.streaming.block_run import PlainRun
from deepseek_compress.workers import open_pool


class Text(NamedTuple):
    """Calibration text and its entry in the manifest."""

    tokens: Tensor  # int64 (samples, length)
    facts: dict[str, Any]


def calibration_text(source: Checkpoint, context: Context, work: Path, samples: int | None = None) -> Text:
    """Read the text that the recipe names; `samples` instead of its number.

    What a choice needs lies in `work`, which is the caller's to remove. Raises DscError where the text is too short or
    has tokens that the model does not know.
    """
    wanted = context.text.model_copy(update={} if samples is None else {"samples": samples})
    select = wanted.select
    if select is not None and select.pool < wanted.samples:
        what = f"calibration.select: {wanted.samples} samples cannot be chosen from {select.pool} windows"
        raise DscError(what, f"set select.from to {wanted.samples} or more")
    pool = read_windows(
        wanted.model_copy(update={"samples": select.pool} if select else {}), load_tokenizer(source.path)
    )
    _check_vocabulary(source, pool.tokens)
    context.tell_all(normalized(wanted))
    if select is None:
        return Text(pool.tokens, facts(wanted, pool))
    found = _choose(source, context, work, wanted, select, pool)
    windows = pool.take(found["windows"])
    return Text(windows.tokens, {**facts(wanted, windows), "selection": found})


def normalized(wanted: Calibration) -> list[str]:
    """Say in a line that shares do not add up to 1, and what they are taken as."""
    shares = {source.name: source.share for source in wanted.sources if source.share is not None}
    total = sum(shares.values())
    if not shares or abs(total - 1) < 1e-6:
        return []
    taken = ", ".join(f"{name} {share / total:.3g}" for name, share in shares.items())
    return [f"shares add up to {total:g}, not 1; taken as {taken}"]


def choice_cost(source: Header, select: Select, length: int) -> tuple[Memory, Work, Work]:
    """Memory, work here and in workers of choosing from a pool. Raises DscError where the model cannot choose so."""
    architecture = Architecture.of(source)
    if select.balance and architecture.cfg.moe is None:
        raise DscError("calibration.select.balance: the model has no experts", "leave it out")
    return score_windows.cost(architecture, select.pool, length)


def _check_vocabulary(source: Checkpoint, tokens: Tensor) -> None:
    largest, size = int(tokens.max()), Architecture.of(source).cfg.vocab_size
    if largest >= size:
        what = f"{source.path}: the tokenizer gives id {largest}, config.json has a vocabulary of {size}"
        raise DscError(what, "check that tokenizer and model belong together")


def _choose(
    source: Checkpoint, context: Context, work: Path, wanted: Calibration, select: Select, pool: Windows
) -> dict[str, Any]:
    """{"windows": numbers of those chosen, and what that changed}; taken from `work` where a run before chose."""
    text = digest_of(pool.tokens)
    decided = [text, wanted.document(), provenance.fingerprint(source), provenance.versions(), torch.get_num_threads()]
    decided += [kind(context.device)]
    key, file = provenance.digest(decided), work / CHOSEN
    if (before := kept(file) or {}).get("key") == key:
        return dict(before["found"])
    reading = work / f"pool-{key[:16]}"  # of this text, model and machine alone
    run = PlainRun(context.architecture(source), reading)
    memory = score_windows.cost(run.architecture, *pool.tokens.shape)[0]
    workers = context.count(Forecast(source.header, memory=memory, read=source.header.bytes))
    with open_pool(run, workers, context.ray, memory.task, context.places) as workforce:
        made = score_windows.score_windows(run, pool.tokens, workforce, context.progress)
    found = _decide(made, wanted, select, pool)
    context.tell_all(_notes(found, select))
    write_sealed(file, {"key": key, "found": found})
    remove_tree(reading)
    return found


def _decide(made: Candidates, wanted: Calibration, select: Select, pool: Windows) -> dict[str, Any]:
    shares = [source.share for source in wanted.sources if source.share is not None]
    quota = None
    if shares:
        source = pool.taken.argmax(1)  # with shares, each window has one
        there = torch.bincount(source, minlength=len(shares)).tolist()
        quota = Quota(source.tolist(), apportion(shares, wanted.samples, there))
    if select.balance:
        assert made.experts is not None
        chosen = by_coverage(made.experts, wanted.samples, quota)
    else:
        chosen = by_quality(made, wanted.samples, select.alpha, select.beta, quota)
    first = range(wanted.samples)
    found: dict[str, Any] = {"windows": chosen, "entropy": _mean(made, chosen), "entropy_in_order": _mean(made, first)}
    if made.experts is not None:
        found["experts"] = coverage(made.experts, chosen)
        found["experts_in_order"] = coverage(made.experts, first)
    return found


def _mean(made: Candidates, chosen: Any) -> float:
    return float(made.entropy[list(chosen)].mean())


def _notes(found: dict[str, Any], select: Select) -> list[str]:
    """Describe the choice, a line each."""
    windows = f"text: {len(found['windows'])} of {select.pool} windows chosen"
    lines = [f"{windows}, entropy {found['entropy']:.3f} nats ({found['entropy_in_order']:.3f} in order)"]
    if "experts" in found:
        now, then = found["experts"], found["experts_in_order"]
        lines.append(
            f"tokens of an expert: fewest {now['fewest']} ({then['fewest']} in order), median {now['median']} "
            f"({then['median']}), without any {now['unreached']} ({then['unreached']})"
        )
    return lines

"""Validate a YAML recipe. Every error has its line number, and all are reported together.

A recipe is a mapping with `stages`, a list of steps. A step has one stage with its knobs, and may have a `name` and
a `from`, the name of the output it reads:

    model: builtin:nano
    as: teacher                       # the input's name in reports; `model` means it too
    stages:
      - name: teacher-w4a16
        from: model
        compress: {weights: {gptq: {group_size: 64}}}
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, Field, ValidationError

from deepseek_compress import resources, stages
from deepseek_compress.calibration.settings import Calibration
from deepseek_compress.errors import DscError, Problems, raise_problems
from deepseek_compress.recipe import document as yaml_text
from deepseek_compress.recipe.document import Document
from deepseek_compress.registry import explain

if TYPE_CHECKING:
    from deepseek_compress.stages.base import Stage

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_STEP_KEYS = ("name", "from")
_QUANTISING = ("compress", "allocate")  # stages whose `weights` have a group size


class _Top(BaseModel, frozen=True, extra="forbid"):
    name: str = Field(default="", pattern=f"^({_NAME.pattern})?$", max_length=200)
    model: str | None = Field(default=None, min_length=1)
    alias: str = Field(default="model", alias="as", pattern=f"^{_NAME.pattern}$", max_length=200)
    inputs: dict[str, str] = {}
    seed: int = Field(default=0, ge=0)
    calibration: Calibration = Calibration()
    stages: list[dict[str, Any]] = Field(min_length=1)


@dataclass(frozen=True)
class Step:
    """One stage of a recipe with its place in the pipeline."""

    name: str
    kind: str
    source: str  # name of the output it reads; `model` is the input
    knobs: Mapping[str, Any]
    stage: Stage
    line: int  # in the recipe; 0 when an option put it there


@dataclass(frozen=True)
class Recipe:
    """A whole recipe, validated."""

    name: str
    model: str | None
    alias: str  # the input's name in reports
    inputs: Mapping[str, str]  # further models, by name
    seed: int
    calibration: Calibration
    steps: Sequence[Step]
    text: str  # what is copied into every output
    document: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Changes:
    """Changes that options make to a recipe before it is validated."""

    settings: Sequence[str] = ()  # of `--set`: path=value
    values: Mapping[str, Any] = field(default_factory=dict)  # path -> value; a value that is None changes nothing
    group_size: int | None = None  # of every weight quantizer in the recipe


def read_recipe(path: Path, changes: Changes = Changes()) -> Recipe:
    """Return the recipe at `path`, changed and validated. Raises `DscError`."""
    try:
        text = yaml_text.read(path)
    except OSError as error:
        raise DscError(f"{path}: {error.strerror}", "give a recipe file") from None
    own = path.parent == resources.data("recipes")
    return parse_recipe(text, path.name if own else str(path), changes)


def parse_recipe(text: str, where: str, changes: Changes = Changes()) -> Recipe:
    """Validate a recipe from text; `where` is its name in error messages, before the line number."""
    document = yaml_text.parse(text, where)
    if _apply(document, changes):
        text = yaml_text.dump(document.value)
    top = _validate_top(document)
    name = top.name or Path(where).stem
    return Recipe(
        name, top.model, top.alias, top.inputs, top.seed, top.calibration, _steps(top, document), text, document.value
    )


def _apply(document: Document, changes: Changes) -> bool:
    """Apply `changes`; return whether there were any."""
    if not isinstance(document.value, dict):
        return False
    wanted = [_setting(document, setting) for setting in changes.settings]
    wanted += [(_place(document, key.split(".")), v) for key, v in changes.values.items() if v is not None]
    if changes.group_size is not None:
        wanted += [(place, changes.group_size) for place in _group_sizes(document)]
    for place, value in wanted:
        document.set(place, value)
    return bool(wanted)


def _group_sizes(document: Document) -> list[tuple[str, ...]]:
    """Where the group size of each weight quantizer stands."""
    places: list[tuple[str, ...]] = []
    for index, item in enumerate(document.value.get("stages") or []):
        kind = next((key for key in _QUANTISING if isinstance(item, dict) and key in item), "compress")
        weights = (item.get(kind) or {}).get("weights") if isinstance(item, dict) else None
        if isinstance(weights, str):
            document.set(("stages", index, kind, "weights"), {weights: {}})
            weights = {weights: {}}
        places += [("stages", str(index), kind, "weights", name, "group_size") for name in weights or {}]
    if not places:
        raise DscError(f"--group-size: {document.where} quantises no weights", "leave the option out")
    return places


def _validate_top(document: Document) -> _Top:
    if not isinstance(document.value, dict):
        raise DscError(f"{document.where}: a recipe is a mapping with `stages`", "see the recipes of `dsc list`")
    try:
        top = _Top.model_validate(document.value)
    except ValidationError as error:
        raise Problems(
            document.at(item["loc"], explain(_Top, "recipe", item)) for item in error.errors(include_url=False)
        ) from None
    bad = [name for name in top.inputs if not _NAME.fullmatch(name) or name in {"model", top.alias}]
    raise_problems(
        document.at(("inputs", name), DscError(f"inputs: the name {name!r} cannot be used", "choose another"))
        for name in bad
    )
    return top


def _steps(top: _Top, document: Document) -> list[Step]:
    """Resolve names and `from`, validate every stage's knobs; raises `Problems` with all mistakes."""
    problems: list[DscError] = []
    steps: list[Step] = []
    taken = {"model", top.alias, *top.inputs}
    checkpoints = ["model"]  # names a later stage may read, the last one is the default
    for index, item in enumerate(top.stages):
        place: tuple[str | int, ...] = ("stages", index)
        found = len(problems)
        name = kind = ""
        with _collect(problems, document, place):
            kind, knobs = _kind(item)
        with _collect(problems, document, place):
            name = _name(item, kind, taken)
        with _collect(problems, document, place):
            source = _source(item, name or kind, checkpoints, top.alias)
        taken.add(name)
        with _collect(problems, document, place):
            if kind:
                stage = _stage(document, (*place, kind), kind, knobs)
        if kind and stages.load(kind).writes == "checkpoint" and name:
            checkpoints.append(name)
        if len(problems) == found:
            steps.append(Step(name, kind, source, knobs, stage, document.line((*place, kind))))
    names = {"model", top.alias, *top.inputs, *(step.name for step in steps)}
    if not problems:
        problems = [document.at(("stages", i), e) for i, step in enumerate(steps) for e in _unknown_reads(step, names)]
    raise_problems(problems)
    return steps


@contextmanager
def _collect(problems: list[DscError], document: Document, place: Sequence[str | int]) -> Iterator[None]:
    """Add a `DscError` raised inside to `problems`, with the line of `place` unless it has its own."""
    try:
        yield
    except Problems as error:
        problems += error.problems
    except DscError as error:
        problems.append(document.at(place, error))


def _kind(item: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    kinds = [key for key in item if key not in _STEP_KEYS]
    valid = ", ".join(stages.STAGES)
    if len(kinds) != 1:
        got = " and ".join(kinds) or "none"
        raise DscError(f"a step names one stage, this one names {got}", f"valid stages: {valid}")
    kind = kinds[0]
    if kind not in stages.STAGES:
        close = difflib.get_close_matches(str(kind), stages.STAGES, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DscError(f"unknown stage {kind!r}", f"{hint}valid stages: {valid}")
    knobs = item[kind] if item[kind] is not None else {}
    if not isinstance(knobs, dict):
        raise DscError(f"{kind}: expected its knobs, got {knobs!r}", f"write it as {kind}: {{...}}")
    return kind, knobs


def _name(item: Mapping[str, Any], kind: str, taken: set[str]) -> str:
    if item.get("name") is None:
        candidates = (kind if n == 1 else f"{kind}-{n}" for n in range(1, len(taken) + 2))
        return next(name for name in candidates if name not in taken)
    name = item["name"]
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise DscError(f"the name {name!r} cannot be a directory", "use letters, digits, '.', '_' and '-'")
    if name in taken:
        raise DscError(f"the name {name!r} is taken", "give each stage a name of its own")
    return name


def _source(item: Mapping[str, Any], name: str, checkpoints: list[str], alias: str) -> str:
    source = item.get("from", checkpoints[-1])
    if source == alias:
        return "model"
    if source not in checkpoints:
        raise DscError(
            f"{name}: from: unknown checkpoint {source!r}",
            f"earlier ones: {', '.join(checkpoints)}",
        )
    return str(source)


def _stage(document: Document, place: tuple[str | int, ...], kind: str, knobs: dict[str, Any]) -> Stage:
    component = stages.load(kind)
    try:
        return component.model_validate(knobs)
    except (ValidationError, DscError) as error:
        raise Problems([*_mistakes(document, place, component, kind, knobs)] or [str(error)]) from None


def _mistakes(
    document: Document, place: tuple[str | int, ...], component: type[Stage], kind: str, knobs: dict[str, Any]
) -> Iterator[DscError]:
    """Yield the mistakes of each knob by itself, since `pick` in a validator stops at the first; then missing knobs."""
    tag = {key: value for key, value in knobs.items() if key == component.tag}
    for given in ({}, *({**tag, key: value} for key, value in knobs.items())):
        try:
            component.model_validate(given)
        except ValidationError as error:
            for item in error.errors(include_url=False):
                if item["loc"][0] in given or (not given and item["loc"][0] not in knobs):
                    yield document.at((*place, *item["loc"]), explain(component, kind, item))
        except DscError as error:  # it names the word, not the place
            found = error.problems if isinstance(error, Problems) else [error]
            yield from (document.at(document.find(place, str(e)), e) for e in found)


def _unknown_reads(step: Step, names: set[str]) -> list[DscError]:
    return [
        DscError(f"{step.name}: unknown model {name!r}", f"valid names: {', '.join(sorted(names))}")
        for name in step.stage.reads()
        if name not in names
    ]


def _setting(document: Document, setting: str) -> tuple[tuple[str, ...], Any]:
    """`path=value` of `--set` -> (path in the document, value)."""
    left, equals, right = setting.partition("=")
    parts = left.strip().split(".")
    if not equals or not all(parts):
        raise DscError(f"--set {setting!r} is not path=value", "for instance --set calibration.samples=16")
    if not right.strip():
        raise DscError(f"--set {setting!r} has no value", "write null to leave a knob unset")
    return _place(document, parts), yaml_text.parse(right, f"--set {left}").value


def _place(document: Document, parts: list[str]) -> tuple[str, ...]:
    """Return the path in the document that `a.b.c` means.

    The first part is a top-level key, or the name or kind of a stage (its knobs follow); with a single stage the
    knobs may stand alone: `compress.weights.gptq.group_size`, `weights.gptq.group_size`.
    """
    if parts[0] in {known.alias or name for name, known in _Top.model_fields.items()} - {"stages"}:
        return tuple(parts)
    dotted = ".".join(parts)
    items = [item if isinstance(item, dict) else {} for item in document.value.get("stages") or []]
    parts = parts[1:] if parts[0] == "stages" else parts
    labels = [{str(i), str(item.get("name")), *_kinds(item)} for i, item in enumerate(items)]
    chosen = [i for i, label in enumerate(labels) if parts and parts[0] in label]
    if len(chosen) == 1:
        parts = parts[1:]
    elif not chosen and len(items) == 1:
        chosen = [0]
    if len(chosen) != 1 or not parts:
        names = ", ".join(str(item.get("name") or next(iter(_kinds(item)), i)) for i, item in enumerate(items))
        what = "names several stages" if len(chosen) > 1 else "names no knob of a stage"
        raise DscError(f"--set {dotted}: {what}", f"begin with calibration, seed, model, or one of: {names}")
    if parts[0] in _STEP_KEYS:
        return ("stages", str(chosen[0]), parts[0])
    kind = _kinds(items[chosen[0]])[:1]
    return ("stages", str(chosen[0]), *kind, *(parts[1:] if parts[:1] == kind else parts))


def _kinds(item: Mapping[str, Any]) -> list[str]:
    return [str(key) for key in item if key not in _STEP_KEYS]

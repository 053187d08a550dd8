"""`pick(table, {name: knobs})`: the only look-up from a name in a recipe to the component it means."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import Any, NamedTuple, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from deepseek_compress.errors import DscError, Problems

Component = TypeVar("Component", bound=BaseModel)


class Entry(NamedTuple):
    """Where a component lives (module of a package, class) and what it does, in one line: a table imports none."""

    module: str
    name: str
    summary: str

    def load(self, package: str) -> Any:
        """Return the class."""
        return getattr(import_module(f"{package}.{self.module}"), self.name)


def pick(table: Mapping[str, type[Component]], choice: Any, what: str = "component") -> Component:
    """Build the component that `choice` names, with its knobs validated.

    `choice` is `{name: knobs}`, `{name: None}` or a bare `name`. Raises `Problems` with every unknown or invalid
    knob at once, and the valid names where the name is unknown.
    """
    name, knobs = _split(choice, what)
    if name not in table:
        close = difflib.get_close_matches(name, table, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        raise DscError(f"unknown {what} {name!r}", f"{hint}valid names: {', '.join(sorted(table))}")
    return build(table[name], knobs, f"{what} {name}")


def build(component: type[Component], knobs: Mapping[str, Any], where: str) -> Component:
    """Validate `knobs` against `component`; every mistake is reported together as `where.knob: reason`."""
    try:
        return component.model_validate(dict(knobs))
    except ValidationError as error:
        raise Problems(explain(component, where, item) for item in error.errors()) from None


def _split(choice: Any, what: str) -> tuple[str, Mapping[str, Any]]:
    if isinstance(choice, str):
        return choice, {}
    if isinstance(choice, Mapping) and len(choice) == 1:
        ((name, knobs),) = choice.items()
        if isinstance(name, str) and (knobs is None or isinstance(knobs, Mapping)):
            return name, knobs or {}
    raise DscError(
        f"{what}: expected one name with its knobs, got {choice!r}", f"write it as {what}: {{name: {{...}}}}"
    )


def explain(component: type[BaseModel], where: str, item: Any) -> DscError:
    """One entry of `ValidationError.errors()` as a `DscError` about `where.knob`."""
    path = ".".join(str(part) for part in item["loc"])
    place = f"{where}.{path}" if path else where
    if item["type"] == "extra_forbidden":
        inner = _model_at(component, item["loc"][:-1])
        names = sorted(field.alias or name for name, field in inner.model_fields.items())
        close = difflib.get_close_matches(str(item["loc"][-1]), names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return DscError(f"{where}: unknown knob {path!r}", f"{hint}valid knobs: {', '.join(names) or 'none'}")
    if item["type"] == "missing":
        return DscError(f"{place}: missing", "give it a value")
    if item["type"] == "value_error":  # a check of ours, which names what it is about
        return DscError(f"{place}: {item['msg'].removeprefix('Value error, ')}")
    got = repr(item["input"])
    return DscError(f"{place}: {item['msg']} (got {got if len(got) <= 60 else got[:57] + '...'})")


def _model_at(component: type[BaseModel], place: Sequence[int | str]) -> type[BaseModel]:
    """Return the model whose knobs stand at `place` in `component`; `component` itself where that is not known."""
    found = component
    for part in place:
        field = next((f for name, f in found.model_fields.items() if part in (name, f.alias)), None)
        kinds = [] if field is None else [field.annotation, *get_args(field.annotation)]
        found = next((kind for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)), found)
    return found

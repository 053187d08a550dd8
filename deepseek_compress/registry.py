"""`pick(table, {name: knobs})`: the only look-up from a name in a recipe to the component it means."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from deepseek_compress.errors import DscError, Problems

Component = TypeVar("Component", bound=BaseModel)


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
        names = sorted(field.alias or name for name, field in component.model_fields.items())
        close = difflib.get_close_matches(path, names, n=1)
        hint = f"did you mean {close[0]!r}? " if close else ""
        return DscError(f"{where}: unknown knob {path!r}", f"{hint}valid knobs: {', '.join(names) or 'none'}")
    if item["type"] == "missing":
        return DscError(f"{place}: missing", "give it a value")
    got = repr(item["input"])
    return DscError(f"{place}: {item['msg']} (got {got if len(got) <= 60 else got[:57] + '...'})")

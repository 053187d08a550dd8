"""Fill the pages that are generated: every knob from the classes that validate it, every command, every report."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import typer.main
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from deepseek_compress import stages
from deepseek_compress.calibration.settings import Calibration, Select, Source
from deepseek_compress.cli import app
from deepseek_compress.compress.overrides import Override
from deepseek_compress.distillation.losses import LOSSES
from deepseek_compress.export import TARGETS
from deepseek_compress.export import load as load_target
from deepseek_compress.numerics import ACTIVATIONS, MIGRATION, ROTATION, SPARSITY, WEIGHTS
from deepseek_compress.numerics.kv_cache import KvRounding
from deepseek_compress.numerics.ranges import ESTIMATORS

ROOT = Path(__file__).parents[1]
TABLES: dict[str, Mapping[str, type[Any]]] = {
    "weights": WEIGHTS, "sparsity": SPARSITY, "activations": ACTIVATIONS, "estimator": ESTIMATORS,
    "migration": MIGRATION, "rotation": ROTATION, "loss": LOSSES,
}  # fmt: skip


def on_files(files: Any, config: Any) -> Any:
    """Add the pictures of `reports/`."""
    from mkdocs.structure.files import File

    for picture in (ROOT / "reports").glob("*.svg"):
        files.append(File.generated(config, picture.name, abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any = None, config: Any = None, files: Any = None) -> str:
    """Replace `<!-- knobs -->`, `<!-- commands -->` and `<!-- report NAME -->` by their text."""
    if "<!-- knobs -->" in markdown:
        markdown = markdown.replace("<!-- knobs -->", knobs())
    if "<!-- commands -->" in markdown:
        markdown = markdown.replace("<!-- commands -->", commands())
    return re.sub(r"<!-- report (\w+) -->", lambda found: report(found[1]), markdown)


def knobs() -> str:
    """One table for each class that a recipe can reach."""
    parts = ["## calibration", _table(Calibration), "### a source", _table(Source), "### select", _table(Select)]
    parts.append("# Stages")
    for kind, entry in stages.STAGES.items():
        parts += [f"## {kind}", f"{entry.summary[0].upper()}{entry.summary[1:]}.", _table(stages.load(kind))]
    parts += ["### an entry of overrides", _table(Override), "### kv_cache", _table(KvRounding)]
    for title, table in TABLES.items():
        parts.append(f"# {title}")
        for name, component in table.items():
            paper = getattr(component, "paper", "")
            about = inspect.getdoc(component) or ""
            parts += [f"## `{name}`", about + (f"\n\nSource: {paper}" if paper else ""), _table(component)]
    parts.append("# export targets")
    for name, entry in TARGETS.items():
        parts += [f"## `{name}`", f"Writes {entry.summary}.", _table(load_target(name))]
    return "\n\n".join(part for part in parts if part)


def _table(component: type[Any]) -> str:
    if not (isinstance(component, type) and issubclass(component, BaseModel)) or not component.model_fields:
        return "No knobs."
    notes = {name: note for kind in reversed(component.__mro__) for name, note in _comments(kind)}
    rows = [
        f"| `{field.alias or name}` | {_escaped(_type(field))} | {_default(field)} | {_escaped(notes.get(name, ''))} |"
        for name, field in component.model_fields.items()
    ]
    return "\n".join(["| knob | type | default | |", "|---|---|---|---|", *rows])


def _comments(kind: type[Any]) -> Iterator[tuple[str, str]]:
    """Field -> the comment on its line."""
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return
    lines = source.splitlines()
    (tree,) = ast.parse(source).body
    for node in tree.body if isinstance(tree, ast.ClassDef) else ():
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.end_lineno:
            _, mark, note = lines[node.end_lineno - 1][node.end_col_offset :].partition("#")
            if mark:
                yield node.target.id, note.strip()


BOUNDS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below", "min_length": "length at least"}


def _type(field: FieldInfo) -> str:
    """`float, above 0, at most 1`."""
    kind = field.annotation
    plain = isinstance(kind, type) and "[" not in str(kind)
    text = re.sub(r"\b(?:[a-z_0-9]+\.)+", "", kind.__name__ if plain and isinstance(kind, type) else str(kind))
    limits = [
        f"{words} {getattr(one, key)}" for one in field.metadata for key, words in BOUNDS.items() if hasattr(one, key)
    ]
    return ", ".join([text, *limits])


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    if value is None:
        return "none"
    return f"`{_yaml(value)}`"


def _yaml(value: Any) -> str:
    """Write a default as a recipe would."""
    if isinstance(value, (list, tuple, set, frozenset)):
        parts = [_yaml(part) for part in (sorted(value) if isinstance(value, (set, frozenset)) else value)]
        return f"[{', '.join(parts)}]"
    if isinstance(value, BaseModel):
        dumped = value.model_dump(mode="json", exclude_defaults=True)
        name = type(value).__name__.lower() if hasattr(value, "paper") else "its defaults"
        return name if not dumped else _yaml(dumped) if isinstance(dumped, dict) else str(dumped)
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_yaml(part)}" for key, part in value.items()) + "}"
    return {True: "true", False: "false", None: "null"}[value] if isinstance(value, bool | None) else str(value)


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def commands() -> str:
    """Usage and options of each command."""
    group = typer.main.get_command(app)
    parts = []
    for name, command in group.commands.items():  # type: ignore[attr-defined]
        rows = ["| option | |", "|---|---|"]
        for option in command.params:
            words = ", ".join(f"`{word}`" for word in option.opts) if option.param_type_name == "option" else ""
            described = getattr(option, "help", None) or ""
            rows.append(f"| {words or f'`{option.metavar or option.human_readable_name}`'} | {_escaped(described)} |")
        parts += [f"## dsc {name}", (command.help or "").strip(), "\n".join(rows)]
    return "\n\n".join(parts)


def report(name: str) -> str:
    """Return a report's Markdown, its headings below ours; pictures and links to other files stay in the repository."""
    text = (ROOT / "reports" / f"{name}.md").read_text(encoding="utf-8")
    text = re.sub(r"^#+ .*$\n?", "", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^(#+) ", r"##\1 ", text, flags=re.MULTILINE)
    return re.sub(r"!?\[([^\]]*)\]\((?!http)[^)]*\)", r"\1", text).strip()


JUDGED = ("moe", "smollm2")  # models that were not made here, or made without a thought of this
GPTQ = "llm-compressor GPTQ"
SHOWN = ("dsc w4a16-fast", "dsc w4a16", "dsc w4a16-best", GPTQ, f"{GPTQ}, mse", f"{GPTQ}, mse, 8 bits as w4a16-best")


def results() -> str:
    """Build the README's table from reports/accuracy.json."""
    record = json.loads((ROOT / "reports" / "accuracy.json").read_text(encoding="utf-8"))
    lines = [
        "| model | method | size | KL, text like calibration's | of the rival's | KL, other text | of the rival's "
        "| CPU time |",
        "|---|---|---|---|---|---|---|---|",
    ]
    rows = [dict(zip(record["columns"], values, strict=True)) for values in record["rows"]]
    rows = [row for row in rows if row["model"] in JUDGED and row["method"] in SHOWN and row["KL like"]]
    for row in sorted(rows, key=lambda row: JUDGED.index(row["model"])):
        bars = record["bars"][row["model"]]
        kind = {"dsc w4a16": "default", "dsc w4a16-best": "best"}.get(row["method"], "")
        like, other = (_share(bars.get(f"{kind}, {text}")) for text in ("like", "other"))
        size, cpu = f"{row['MB on disk']:.2f} MB", f"{row['CPU s']:.0f} s"
        lines.append(
            f"| {row['model']} | {row['method']} | {size} | {row['KL like']:.5f} | {like} "
            f"| {row['KL other']:.5f} | {other} | {cpu} |"
        )
    return "\n".join(lines)


def _share(bar: Mapping[str, Any] | None) -> str:
    if bar is None:
        return ""
    low, high = bar["interval"]
    return f"{bar['share_of_kl']:.2f} [{low:.2f}, {high:.2f}]"


if __name__ == "__main__":  # the README's table, anew
    START, END = "<!-- results -->", "<!-- end of results -->"
    page = ROOT / "README.md"
    before, _, rest = page.read_text(encoding="utf-8").partition(START)
    page.write_text(f"{before}{START}\n{results()}\n{END}{rest.partition(END)[2]}", encoding="utf-8")

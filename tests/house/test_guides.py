"""README and docs/: every `sh`, `yaml` and `python` block runs as typed, on tiny models with shortened knobs."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from deepseek_compress import export, stages  # noqa: F401 - the packages whose tables are extended
from deepseek_compress.export import TARGETS
from deepseek_compress.models.families.table import FAMILIES
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.recipe import parse_recipe
from deepseek_compress.registry import Entry
from deepseek_compress.stages import STAGES
from tests.house.conftest import Dsc
from tests.house.short import TEXT, shorten

ROOT = Path(__file__).parents[2]
PAGES = {
    str(path.relative_to(ROOT)): path.read_text(encoding="utf-8") for path in sorted((ROOT / "docs").rglob("*.md"))
}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)
TABLES: dict[str, dict[str, Any]] = {"WEIGHTS": WEIGHTS, "FAMILIES": FAMILIES, "TARGETS": TARGETS, "STAGES": STAGES}
MODELS = {"DeepSeek-R1-Distill-Qwen-1.5B": "tiny_qwen2", "DeepSeek-V3": "tiny_v3"}
SHORT = {"README.md"}  # the others are run by `make verify`


def blocks(page: str, kind: str) -> list[str]:
    return [text for found, text in BLOCK.findall(PAGES[page]) if found == kind]


def lines(text: str) -> Iterator[str]:
    """Lines of a shell, a here-document with its command."""
    rest = iter(text.splitlines())
    for line in rest:
        found = re.search(r"<<'(\w+)'", line)
        while found and not line.endswith(f"\n{found[1]}"):
            line += "\n" + next(rest)
        if line.strip():
            yield line


def pages_with(kind: str) -> list[Any]:
    found = [page for page in PAGES if blocks(page, kind)]
    return [pytest.param(page, marks=[] if page in SHORT else [pytest.mark.verify]) for page in found]


def test_each_command_and_each_name_of_a_recipe_has_an_example_or_a_word() -> None:
    shown = {line.split()[1] for page in PAGES for kind in ("sh", "bash") for text in blocks(page, kind)
             for line in lines(text) if line.startswith("dsc ")}  # fmt: skip
    expected = "plan run distill prune calibrate quantize allocate export evaluate generate chat compare inspect"
    assert shown == set(expected.split())


def test_what_is_not_run_here_is_of_other_programs_or_needs_them() -> None:
    """`bash` blocks: a server, a cluster, a download, an extra."""
    needs = ("--ray", "http://", "--target genai", "--target gguf", "--target tensorrt-rtx", "problems.jsonl")
    for page in PAGES:
        for text in blocks(page, "bash"):
            wrong = [line for line in lines(text) if line.startswith("dsc ") and not any(n in line for n in needs)]
            assert wrong == [], page


def test_the_recipes_are_valid() -> None:
    found = {page: [[step.name for step in parse_recipe(text, page).steps] for text in blocks(page, "yaml")]
             for page in PAGES if blocks(page, "yaml")}  # fmt: skip
    assert found == {
        "docs/guides/distill.md": [["record", "distill"]],
        "docs/guides/recipe.md": [["teacher-w4a16", "evaluate"], ["compress"], ["compress"]],
    }


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh"))
def test_the_commands_run_as_typed(
    page: str, dsc: Dsc, text: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, fixture in MODELS.items():
        Path(name).symlink_to(request.getfixturevalue(fixture))
    tiny = request.getfixturevalue("tiny_v3")
    if "Mistral" in PAGES[page]:
        _renamed(request.getfixturevalue("tiny_llama"), Path("Mistral-7B"), "mistral")
    for kind, content in BLOCK.findall(PAGES[page]):
        if kind == "python" and content.startswith("# deepseek_compress/"):
            _extend(content, monkeypatch)
        for line in lines(content) if kind == "sh" else ():
            if not line.startswith("dsc "):
                subprocess.run(["bash", "-c", line.replace("builtin:nano", str(tiny))], check=True)
                continue
            words = [str(tiny) if word == "builtin:nano" else word for word in shlex.split(line)[1:]]
            words = [word.replace("group_size: 64", "group_size: 32") for word in words]
            own = "--calibration" in words or "--tasks" in words
            done = dsc(*words, *_short(words, own, tiny, text))
            assert done.exit_code == 0, f"{line}\n{done.output}"
            if words[0] not in ("generate", "chat"):  # whose standard output is the answer
                assert done.stdout.splitlines()[-1].startswith("next: dsc "), line


def _short(words: list[str], own: bool, tiny: Path, text: Path) -> list[str]:
    """Shortened as every command; a text or question file that the page itself wrote is kept."""
    added = shorten(words, tiny, text)
    recipe = next((Path(word) for word in words if word.endswith(".yaml") and words[0] in ("run", "plan")), None)
    if recipe is not None:
        small = ["--group-size", "32", *TEXT, "--calibration", str(text)] if "weights" in recipe.read_text() else []
        return [*(["--model", str(tiny)] if words[0] == "run" else []), *small]
    if words[0] == "export":
        return []
    if words[:1] == ["plan"] and "calibrate" in words:  # which has no weights to group
        return [*TEXT, "--calibration", str(text)]
    if own and words[0] != "evaluate":
        added = added[len(shorten(["calibrate"], tiny, text)) :]
    if any("weights={" in word for word in words):
        return added[: added.index("--group-size")]
    return added


def _renamed(source: Path, to: Path, model_type: str) -> None:
    to.mkdir()
    for file in source.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps({**config, "model_type": model_type}))


def _extend(content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of the guide becomes a module, a line of a table an entry."""
    path, _, table = content.splitlines()[0].removeprefix("# ").partition(": ")
    if table:
        known = {**vars(sys.modules["tests.house.added"]), "Entry": Entry}
        added: Mapping[str, Any] = eval("{" + content.partition("\n")[2] + "}", known)
        for name, value in added.items():
            monkeypatch.setitem(TABLES[table], name, value)
        return
    name = path.removesuffix(".py").replace("/", ".")
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(compile(content, path, "exec"), module.__dict__)
    monkeypatch.setitem(sys.modules, "tests.house.added", module)


@pytest.mark.verify
def test_the_python_of_the_reference_and_the_notebook_run(
    dsc: Dsc, tiny_v3: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (example,) = blocks("docs/reference/python.md", "python")
    notebook = json.loads((ROOT / "docs" / "guides" / "notebook.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert len(cells) >= 6
    for code in ([example], cells):
        names: dict[str, Any] = {}
        for cell in code:
            short = cell.replace("builtin:nano", str(tiny_v3)).replace("group_size=64", "group_size=32")
            short = short.replace("problems=100", "problems=2").replace("max_tokens=64", "max_tokens=2")
            short = (
                short.replace('quantize("', 'quantize(samples=2, length=16, model="') if code == [example] else short
            )
            short = short.replace("samples=16, length=256", "samples=2, length=16")
            exec(short.replace(', "w4"', ', out="w4"'), names)
    assert "groups of 100" in capsys.readouterr().out


def test_links_lead_somewhere() -> None:
    for page, content in PAGES.items():
        prose = BLOCK.sub("", content)
        for link in re.findall(r"\]\(([^)#]+)[^)]*\)", prose):
            if not link.startswith("http"):
                generated = (ROOT / "reports" / link).is_file() and link.endswith(".svg")
                assert generated or ((ROOT / page).parent / link).exists(), f"{page}: {link}"


def test_generated_pages_have_every_knob_command_and_result() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        import hooks
    finally:
        sys.path.pop(0)
    knobs = hooks.knobs()
    for kind in STAGES:
        for name, field in stages.load(kind).model_fields.items():
            assert f"| `{field.alias or name}` |" in knobs, f"{kind}.{name}"
    for name in [*WEIGHTS, *TARGETS]:
        assert f"## `{name}`" in knobs
    assert "| `alpha` | float, at least 0 | `0.5` | weight of the entropy of the model's prediction |" in knobs
    commands = hooks.commands()
    assert "## dsc quantize" in commands
    assert "`--group-size`" in commands
    readme = PAGES["README.md"]
    assert (
        readme[readme.index("<!-- results -->") : readme.index("<!-- end of results -->")].split("\n", 1)[1].strip()
        == hooks.results().strip()
    ), "python docs/hooks.py writes it"

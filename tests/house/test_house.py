"""House rules that are tests: layers, lengths, names, the tree of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import re
import subprocess
from collections import defaultdict
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

from deepseek_compress import resources
from deepseek_compress.distillation.losses import LOSSES
from deepseek_compress.numerics import ACTIVATIONS, SPARSITY, WEIGHTS
from deepseek_compress.numerics.ranges import ESTIMATORS
from deepseek_compress.stages import STAGES, load

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepseek_compress"

# A module may import from its own layer's files and from layers below (greater numbers); no two import each other.
LAYERS = [
    {"__main__"},
    {"cli", "api"},
    {"catalogue", "doctor", "survey", "jobs"},
    {"pipeline"},
    {"recipe", "workspace"},
    {"stages"},
    {"distillation", "export", "evaluation", "generation", "reports"},
    {"compress"},
    {"streaming"},
    {"models", "calibration", "tasks"},
    {"planning"},
    {"checkpoint", "provenance"},
    {"numerics"},
    {"cuda_ops"},
    {"workers"},
    {"errors", "registry", "console", "resources", "machine", "processes", "limits", "user_code"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
ONLY = {
    "typer": {"cli"},
    "rich": {"console"},
    "yaml": {"recipe"},
    "safetensors": {"checkpoint"},
}


def sources() -> list[Path]:
    """Every Python file of the project that git would take."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.split()
    found = [ROOT / name for name in listed if (ROOT / name).is_file()]
    return found or [*PACKAGE.rglob("*.py"), *(ROOT / "cuda_ops").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]


def part(path: Path) -> str:
    """The top-level part of the package that a file belongs to: `numerics`, `cli`, `cuda_ops`."""
    inside = path.relative_to(ROOT).parts
    return "cuda_ops" if inside[0] == "cuda_ops" else inside[1].removesuffix(".py")


def imports(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, inside functions too; those for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def of_package() -> list[Path]:
    return [p for p in sources() if p.is_relative_to(PACKAGE) or p.is_relative_to(ROOT / "cuda_ops")]


def test_imports_run_downward_only() -> None:
    wrong, graph = [], defaultdict(set)
    for path in of_package():
        here = part(path)
        if here == "__init__":
            continue
        assert here in LEVEL, f"{path}: give {here} a layer"
        for name in imports(path):
            words = name.split(".")
            there = "cuda_ops" if words[0] == "cuda_ops" else words[1] if words[0] == "deepseek_compress" else ""
            if there in LEVEL and there != here:
                graph[here].add(there)
                if LEVEL[there] < LEVEL[here]:
                    wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []
    assert list(TopologicalSorter(graph).static_order())  # raises where parts of one layer import each other


def test_the_kernels_import_nothing_of_the_package_above() -> None:
    """`cuda_ops` with torch alone builds and runs anywhere; what it refuses is its own error."""
    files = [path for path in sources() if path.is_relative_to(ROOT / "cuda_ops")]
    assert files
    wrong = [f"{path.name} imports {name}" for path in files for name in imports(path) if name.startswith(PACKAGE.name)]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    """Imports within functions and for type checkers count too; packages' own files are left out."""
    modules = {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in of_package()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        if path.stem != "__init__":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            names = {
                f"{node.module}.{alias.name}"
                for node in ast.walk(tree)
                if isinstance(node, ast.ImportFrom) and node.module
                for alias in node.names
            }
            found = {name if name in modules else name.rpartition(".")[0] for name in names}
            graph[module] = found & modules.keys() - {module}
    assert list(TopologicalSorter(graph).static_order())


def test_stages_never_import_each_other() -> None:
    wrong = []
    for path in sources():
        if path.parent == PACKAGE / "stages" and path.stem not in {"__init__", "base"}:
            for name in imports(path):
                words = name.split(".")
                if words[:2] == ["deepseek_compress", "stages"] and words[2] not in {
                    "base",
                    "resumable",
                    "saved",
                    "text",
                    "training",
                }:
                    wrong.append(f"{path.name} imports {name}")
    assert wrong == []


READS = {"read", "read_raw", "read_quantized", "resident", "weights", "top", "StreamedWeights"}
MAY_READ = {
    ("streaming/loop.py", "run"): "the loop",
    ("compress/rotation.py", "rotated"): "the norms, which are vectors",
}


def test_only_the_loop_goes_through_blocks_and_reads_their_weights() -> None:
    wrong = []
    for path in of_package():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and _reads_block_by_block(node):
                place = (str(path.relative_to(PACKAGE)) if path.is_relative_to(PACKAGE) else path.name, node.name)
                wrong += [] if place in MAY_READ else [place]
    assert wrong == []


def _reads_block_by_block(function: ast.FunctionDef) -> bool:
    """Whether a loop over blocks or layers has a call in it that reads tensors."""
    for node in ast.walk(function):
        if isinstance(node, ast.For):
            over, inside = ast.dump(node.iter), node.body
        elif isinstance(node, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            over, inside = "".join(ast.dump(part.iter) for part in node.generators), [node]
        else:
            continue
        if "'blocks'" in over or "'num_hidden_layers'" in over:
            calls = [c.func for part in inside for c in ast.walk(part) if isinstance(c, ast.Call)]
            if any(getattr(call, "attr", getattr(call, "id", "")) in READS for call in calls):
                return True
    return False


@pytest.mark.parametrize("library", ONLY)
def test_a_library_is_used_in_its_place_only(library: str) -> None:
    users = {part(path) for path in of_package() for name in imports(path) if name.split(".")[0] == library}
    assert users <= ONLY[library]


def test_no_file_over_400_lines_no_function_over_60() -> None:
    long = []
    for path in sources():
        text = path.read_text(encoding="utf-8")
        count = len(text.splitlines())
        if count > 400:
            long.append(f"{path.relative_to(ROOT)}: {count} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                length = (node.end_lineno or 0) - node.lineno + 1
                if length > 60:
                    long.append(f"{path.relative_to(ROOT)}: {node.name} has {length} lines")
    assert long == []


def test_nobody_formats_with_print() -> None:
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno}"
        for path in of_package()
        if part(path) not in {"console", "evaluation", "cuda_ops"}
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert wrong == []


@pytest.mark.parametrize("kind", STAGES)
def test_each_stage_is_what_the_table_says(kind: str) -> None:
    stage = load(kind)
    assert stage.__doc__
    assert stage.writes in {"checkpoint", "artifact", "report"}
    assert len(STAGES[kind].summary) < 80


def test_each_registry_name_is_documented() -> None:
    guides = "".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md"))
    names = [*LOSSES, *WEIGHTS, *SPARSITY, *ACTIVATIONS, *ESTIMATORS, *STAGES, *resources.recipes()]
    assert [name for name in names if f"`{name}`" not in guides] == []
    for table in (WEIGHTS, SPARSITY, ACTIVATIONS, ESTIMATORS):
        for name, component in table.items():
            assert component.__doc__, name
            assert getattr(component, "paper", ""), name


def test_the_tree_of_contributing_is_the_real_one() -> None:
    readme = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    block = re.search(r"```text\n(\.\n.*?)```", readme, re.DOTALL)
    assert block, "CONTRIBUTING.md has no tree"
    told, above = set(), ""
    for line in block[1].splitlines()[1:]:
        name = line.split()[0]
        nested = line.startswith(" " * 4)
        above = above if nested else name.rstrip("/")
        told.add(f"{above}/{name.rstrip('/')}" if nested else above)
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.splitlines()
    if not listed:
        pytest.skip("no git here")
    real = {name.split("/")[0] for name in listed} - {".gitignore", ".ci", ".gitattributes"}
    inside = {"/".join(name.split("/")[:2]) for name in listed if name.startswith("deepseek_compress/")}
    inside -= {"deepseek_compress/__init__.py", "deepseek_compress/__main__.py", "deepseek_compress/py.typed"}
    assert told == real | inside


def test_nothing_names_a_path_of_one_machine() -> None:
    pattern = re.compile("/" + "(work|home|root)/")
    wrong = [str(p.relative_to(ROOT)) for p in sources() if pattern.search(p.read_text(encoding="utf-8"))]
    assert wrong == []

"""One place starts processes, one opens safetensors headers, one deletes: the source is read for it.

`cuda_ops/build.py` has its own compiler process and its own cache: that package stands alone.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "deepseek_compress"
ALONE = "cuda_ops/build.py"

STARTERS = ("subprocess", "multiprocessing", "pty", "concurrent.futures.process")
STARTS = ("system", "popen", "fork", "forkpty", "posix_spawn", "posix_spawnp")
REMOVES = ("unlink", "remove", "rmdir", "removedirs", "rmtree")


def places(found: Callable[[ast.AST], bool]) -> set[str]:
    """Files of both packages with a node that `found` finds."""
    files = [*PACKAGE.rglob("*.py"), *(ROOT / "cuda_ops").rglob("*.py")]
    trees = {str(file.relative_to(ROOT)): ast.parse(file.read_text(encoding="utf-8")) for file in files}
    return {name for name, tree in trees.items() if any(found(node) for node in ast.walk(tree))}


def imported(node: ast.AST) -> Iterator[str]:
    """Dotted names that an import names, those for type checkers too."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom) and node.module:
        yield node.module
        yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(node: ast.AST) -> tuple[str, str]:
    """(object, function) of a call or of a function that is passed on: `os.remove` -> ("os", "remove")."""
    if isinstance(node, ast.Attribute):
        return getattr(node.value, "id", ""), node.attr
    return ("", node.id) if isinstance(node, ast.Name) else ("", "")


def starts(node: ast.AST) -> bool:
    names = set(imported(node))
    names -= {"multiprocessing.connection", "multiprocessing.connection.Connection"}  # a type
    owner, function = called(node)
    return (
        any(name == starter or name.startswith(f"{starter}.") for name in names for starter in STARTERS)
        or "ProcessPoolExecutor" in {function, *(name.rpartition(".")[2] for name in names)}
        or (owner == "os" and (function in STARTS or function.startswith(("exec", "spawn"))))
        or any(name in {f"os.{start}" for start in STARTS} for name in names)
    )


def deletes(node: ast.AST) -> bool:
    """`remove` is a method of lists too, so that it counts where `os` is named."""
    owner, function = called(node)
    if any(
        name in {f"{module}.{function}" for module in ("os", "shutil") for function in REMOVES}
        for name in imported(node)
    ):
        return True
    return isinstance(node, ast.Attribute) and function in REMOVES and (function != "remove" or owner == "os")


def opens_headers(node: ast.AST) -> bool:
    """The length before a header is unpacked, or a library is used that reads one."""
    if any(name.split(".")[0] == "safetensors" for name in imported(node)):
        return True
    if isinstance(node, ast.Call) and called(node.func)[1] in ("unpack", "unpack_from"):
        return any(isinstance(a, ast.Constant) and a.value in ("<Q", "Q", "=Q") for a in node.args)
    return False


def test_one_place_starts_processes() -> None:
    assert places(starts) == {"deepseek_compress/processes.py", ALONE}


def test_one_place_opens_safetensors_headers() -> None:
    assert places(opens_headers) == {"deepseek_compress/checkpoint/header.py"}


def test_one_place_deletes() -> None:
    assert places(deletes) == {"deepseek_compress/checkpoint/files.py", ALONE}


def test_the_searches_find_what_they_look_for() -> None:
    """Each of these lines, anywhere else, would fail a test above."""
    found = {
        starts: ("import subprocess", "from os import fork", "os.fork()", "os.execvp(a, b)", "os.system(c)",
                 "from multiprocessing import Process", "from concurrent.futures import ProcessPoolExecutor as P",
                 "import concurrent.futures as c; c.ProcessPoolExecutor(2)"),
        deletes: ("path.unlink()", "os.remove(path)", "shutil.rmtree(path)", "from shutil import rmtree", "os.rmdir(p)",
                  "map(os.unlink, paths)", "from os import remove"),
        opens_headers: ("import safetensors", "from safetensors.torch import load_file", "struct.unpack('<Q', head)"),
    }  # fmt: skip
    for search, lines in found.items():
        for line in lines:
            assert any(search(node) for node in ast.walk(ast.parse(line))), line
    for line in ("items.remove(x)", "remove(path)", "from multiprocessing.connection import Connection", "unpack(a)"):
        assert not any(search(node) for search in found for node in ast.walk(ast.parse(line))), line

"""Compare what two commits write: every recipe and way through the code, on the built-in model and the tiny ones.

    python -m benchmarks.same_bytes BEFORE [AFTER] [--case PATTERN ...]

BEFORE: a commit (default HEAD~1). AFTER: a commit (default: the working tree as it is). The commands stand in
`same_bytes.yaml`; each case runs them with `python -m deepseek_compress` and one OpenMP thread in an empty directory,
and every file that is left is compared. Nothing of the package is imported here, so that AFTER may rename all of it.

Both sides are checked out at the same path, one after the other, and run at the same path, since outputs may name
where they were read from. Recipes and tiny models are those of BEFORE on both sides, so a recipe that AFTER changes is
compared by its old text. What BEFORE wrote is kept as hashes in the temporary directory, case by case: when the
command runs again, also after it was stopped, only AFTER is computed. `--forget` drops them.

Not compared: `dsc_run.json` (time, peaks, host), and in JSON the keys of MASKED. Engines are not built.

Prints one line a case while it runs, a table of what differs (the first key or tensor of each file) and a JSON line.
Exit 1 where anything differs or a command of BEFORE fails.

A command takes about 4 s of one core on a tiny model, most of it imports, and longer on the built-in one: with 160
commands a side, expect 10 to 15 minutes a side on two free cores (an estimate from part of the cases).
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatch
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import yaml

ROOT = Path(__file__).resolve().parent.parent
SKIPPED = {"dsc_run.json"}  # the one file that tells of the run and not of the result
MASKED = {"versions": "a commit may raise the version of the package"}  # JSON key -> why it may differ
FORMAT = 1  # of what is kept of BEFORE
FAILED = "(a command failed)"  # a file of a digest

Digest = dict[str, dict[str, str]]  # file -> part of it (a tensor, a key) -> its hash or value

# Runs in the checkout: the models of its tests, from the functions behind the fixtures.
MAKE_MODELS = """
import importlib, pathlib, sys
class Factory:
    def mktemp(self, name):
        (out := pathlib.Path(sys.argv[1], name)).mkdir(parents=True)
        return out
for module, name in (word.split(":") for word in sys.argv[2:]):
    fixture = getattr(importlib.import_module(module), name)
    function = getattr(fixture, "_get_wrapped_function", lambda: fixture.__wrapped__)()
    function(Factory())
"""
MODELS = [f"tests.conftest:{name}" for name in ("tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_llama")]
MODELS += [f"tests.models.conftest:{name}" for name in ("tiny_v32", "tiny_v4")]


class Case(NamedTuple):
    """Commands of `dsc` that are run one after the other in one empty directory."""

    name: str  # "w4a16/tiny_v3"
    commands: list[str]


class Place(NamedTuple):
    """The directories of one BEFORE."""

    home: Path

    @property
    def tree(self) -> Path:
        """Where either side is checked out."""
        return self.home / "tree"

    @property
    def inputs(self) -> Path:
        """recipes/, own/ and models/, made once from BEFORE."""
        return self.home / "inputs"


def main() -> int:
    """Compare and print."""
    arguments = _arguments()
    before = _git("rev-parse", "--verify", arguments.before + "^{commit}")
    after = arguments.after and _git("rev-parse", "--verify", arguments.after + "^{commit}")
    place = Place(Path(tempfile.gettempdir()) / f"same_bytes-{os.getuid()}" / before)
    if arguments.forget:
        shutil.rmtree(place.home, ignore_errors=True)
    place.home.mkdir(parents=True, exist_ok=True)
    with open(place.home / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # the paths are the same for all runs with this BEFORE
        began = time.monotonic()
        chosen = [case for case in cases() if any(fnmatch(case.name, f"*{part}*") for part in arguments.case)]
        if not chosen:
            raise SystemExit(f"no case is called {' or '.join(arguments.case)}; they stand in same_bytes.yaml")
        missing = [case for case in chosen if not _kept(place, case).is_file()]
        if missing:
            with checked_out(place.tree, before):
                _prepare(place)
                _all(place, missing, "before", arguments.jobs, keep=True)
        with checked_out(place.tree, after):
            found = _all(place, chosen, "after", arguments.jobs)
        rows = [_row(case, json.loads(_kept(place, case).read_text()), found[case.name]) for case in chosen]
    return _report(rows, before, after, time.monotonic() - began)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("before", nargs="?", default="HEAD~1", help="a commit (HEAD~1)")
    parser.add_argument("after", nargs="?", help="a commit (the working tree)")
    parser.add_argument("--case", action="append", metavar="PATTERN", help="only cases whose name it is a part of")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--forget", action="store_true", help="compute BEFORE again")
    arguments = parser.parse_args()
    arguments.case = arguments.case or ["*"]
    return arguments


def cases() -> list[Case]:
    """Every case of `same_bytes.yaml` with every model that it names."""
    told = _told()
    found = []
    for name, (models, *commands) in told["cases"].items():
        for model in told["models"][models]:
            path = "builtin:nano" if model == "nano" else f"models/{model}"
            filled = [command.replace("{model}", path).replace("{text}", told["text"]) for command in commands]
            found.append(Case(f"{name}/{model}", filled))
    return found


def _told() -> dict[str, Any]:
    told: dict[str, Any] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
    return told


@contextmanager
def checked_out(tree: Path, commit: str | None) -> Iterator[None]:
    """Inside, `tree` is a worktree of `commit`; of None: of the working tree's files as they are now."""
    _drop(tree)
    _git("worktree", "add", "--detach", "--force", str(tree), commit or "HEAD")
    try:
        if commit is None:
            for name in _git("ls-files", "-z").split("\0"):
                if name and not (ROOT / name).is_file():
                    (tree / name).unlink(missing_ok=True)
            for name in _git("ls-files", "-coz", "--exclude-standard").split("\0"):
                if name and (ROOT / name).is_file():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, tree / name)
        yield
    finally:
        _drop(tree)


def _drop(tree: Path) -> None:
    subprocess.run(["git", "worktree", "remove", "--force", str(tree)], cwd=ROOT, capture_output=True, check=False)
    shutil.rmtree(tree, ignore_errors=True)


def _prepare(place: Place) -> None:
    """Recipes and models of BEFORE; what AFTER has of them does not count."""
    done, told = place.inputs / "done", json.dumps(_told()["recipes"])
    if done.is_file() and done.read_text() == told:
        return
    shutil.rmtree(place.inputs, ignore_errors=True)
    (place.inputs / "own").mkdir(parents=True)
    shutil.copytree(place.tree / "recipes", place.inputs / "recipes")
    quickstart = place.inputs / "recipes" / "quickstart.yaml"
    quickstart.write_text(without_engines(quickstart.read_text(encoding="utf-8")), encoding="utf-8")
    for name, recipe in _told()["recipes"].items():
        text = yaml.safe_dump({"calibration": {"sources": ["builtin"]}, **recipe}, sort_keys=False)
        (place.inputs / "own" / f"{name}.yaml").write_text(text, encoding="utf-8")
    command = [sys.executable, "-c", MAKE_MODELS, str(place.inputs / "models"), *MODELS]
    subprocess.run(command, check=True, env=_environment(place), cwd=place.tree)
    done.write_text(told)


def without_engines(recipe: str) -> str:
    """The recipe without its stages that export to TensorRT."""
    told = yaml.safe_load(recipe)
    told["stages"] = [
        stage for stage in told["stages"] if not stage.get("export", {}).get("target", "").startswith("tensorrt")
    ]
    return yaml.safe_dump(told, sort_keys=False)


def _environment(place: Place) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(place.tree), "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}


def _all(place: Place, chosen: Sequence[Case], side: str, jobs: int, keep: bool = False) -> dict[str, Digest]:
    """Run the cases, `jobs` at a time, and tell what each left; `keep`: also on the disk, for later runs."""

    def one(case: Case) -> Digest:
        began = time.monotonic()
        found = run(place, case)
        if keep:
            file = _kept(place, case)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_suffix(".tmp").write_text(json.dumps(found))
            file.with_suffix(".tmp").replace(file)
        how = str(found.get(FAILED, f"{len(found)} files"))
        if not keep:
            how += f", {len(_row(case, json.loads(_kept(place, case).read_text()), found).differing)} differ"
        print(f"{side} {case.name}: {how}, {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
        return found

    pool = ThreadPoolExecutor(jobs)
    try:
        return dict(zip((case.name for case in chosen), pool.map(one, chosen), strict=True))
    finally:
        pool.shutdown(cancel_futures=True)  # stopped by Ctrl-C, it does not begin with the others


def _kept(place: Place, case: Case) -> Path:
    key = _sha(json.dumps([FORMAT, case.commands, _told()["recipes"]]).encode())
    return place.home / "before" / f"{case.name.replace('/', '-')}-{key}.json"


def run(place: Place, case: Case) -> Digest:
    """What the commands of `case` leave. A command that fails ends it, and stands there with its last line."""
    work = place.home / "work" / case.name.replace("/", "-")
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    for name in ("recipes", "own", "models"):
        (work / name).symlink_to(place.inputs / name)
    failed: Digest = {}
    for command in case.commands:
        words = [sys.executable, "-m", "deepseek_compress", *shlex.split(command)]
        done = subprocess.run(words, cwd=work, env=_environment(place), capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or [""])[-1]
            failed = {FAILED: {command.partition(" -")[0]: f"exit {done.returncode}: {last}"}}
            break
    for name in ("recipes", "own", "models"):
        (work / name).unlink()
    found = {**digest(work), **failed}
    shutil.rmtree(work)
    return found


def digest(directory: Path) -> Digest:
    """Every file of `directory` by its parts."""
    found: Digest = {}
    for file in sorted(path for path in directory.rglob("*") if path.is_file() and path.name not in SKIPPED):
        parts = {"bytes": _sha(file.read_bytes())}
        if file.suffix == ".json":
            leaves = dict(_leaves("", json.loads(file.read_text(encoding="utf-8"))))
            kept = {key: value for key, value in leaves.items() if not MASKED.keys() & set(key.split("/"))}
            whole = {"the order": _sha("\n".join(kept).encode())} if len(kept) < len(leaves) else parts
            parts = {**kept, **whole}
        elif file.suffix == ".safetensors":
            parts = {**_tensors(file), **parts}
        found[str(file.relative_to(directory))] = parts
    return found


def _sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _leaves(path: str, value: Any) -> Iterator[tuple[str, str]]:
    """("a/0/b", its value as text) for everything in a JSON document."""
    items: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if not items:
        yield path.lstrip("/"), repr(value)
        return
    for key, item in items:
        yield from _leaves(f"{path}/{key}", item)


def _tensors(file: Path) -> dict[str, str]:
    """Of each tensor of a safetensors file: type, shape and hash."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    found = {}
    for name, entry in json.loads(data[8:start]).items():
        if name == "__metadata__":
            found[name] = repr(entry)
        else:
            low, high = entry["data_offsets"]
            found[name] = f"{entry['dtype']} {entry['shape']} {_sha(data[start + low : start + high])}"
    return found


class Row(NamedTuple):
    """A case: how many files are equal, and of the others the first part that differs."""

    case: str
    equal: int
    differing: dict[str, str]


def _row(case: Case, before: Digest, after: Digest) -> Row:
    differing = dict(before.get(FAILED, {}))  # equal or not: nothing was compared
    for file in sorted({*before, *after} - {FAILED}):
        if file not in before or file not in after:
            differing[file] = "only before" if file in before else "only after"
        elif before[file] != after[file]:
            differing[file] = _first(before[file], after[file])
    if FAILED in after and FAILED not in before:
        differing |= after[FAILED]
    return Row(case.name, len({*before, *after} - {FAILED}) - len(differing.keys() & {*before, *after}), differing)


def _first(before: dict[str, str], after: dict[str, str]) -> str:
    """The first part that differs, and how."""
    order = list(dict.fromkeys(key for pair in zip_longest(before, after) for key in pair if key is not None))
    key = next(key for key in order if before.get(key) != after.get(key))
    return f"{key}: {before.get(key, 'absent')} -> {after.get(key, 'absent')}"


def _report(rows: Sequence[Row], before: str, after: str | None, seconds: float) -> int:
    width = max(len(row.case) for row in rows)
    print(f"| {'case'.ljust(width)} | files | differing |\n|{'-' * (width + 2)}|-------|-----------|")
    for row in rows:
        print(f"| {row.case.ljust(width)} | {row.equal + len(row.differing):5} | {len(row.differing):9} |")
        for file, how in row.differing.items():
            print(f"    {file}: {how}")
    wrong = {row.case: row.differing for row in rows if row.differing}
    record = {
        "benchmark": "same_bytes",
        "before": before,
        "after": after or "working tree",
        "cases": len(rows),
        "files": sum(row.equal + len(row.differing) for row in rows),
        "differing": wrong,
        "masked": MASKED,
        "seconds": round(seconds),
    }
    print(json.dumps(record))
    return 1 if wrong else 0


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words)}: {done.stderr.strip()}")
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())

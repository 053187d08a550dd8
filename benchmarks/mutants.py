"""Change a sign, an index or a weight in the numerics by hand and see whether the matching tests notice.

    python -m benchmarks.mutants [--only PATTERN ...]

Each mutant is one replacement in one file, made in a copy of the sources; the tests named beside it (files, or single
tests) run there until the first failure. A mutant that survives is a test that is missing. The tests run in a fork of
this process, which has imported torch and pytest already: importing them takes longer than most of the tests. First the
tests run on the sources as they are, since what fails anyway catches nothing. The last line is one JSON object; at
least 95 % are to be caught.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import hypothesis  # noqa: F401 - imported before the fork, as are those below
import numpy as np  # noqa: F401
import pydantic  # noqa: F401
import pytest
import safetensors.torch  # noqa: F401
import torch

ROOT = Path(__file__).resolve().parent.parent  # not from `common`: nothing of the package is to be imported here
NUMERICS, TESTS = "deepseek_compress/numerics", "tests/numerics"
COPIED = ("deepseek_compress", "cuda_ops", "tests", "recipes", "calibration_data", "builtin", "nano", "pyproject.toml")
ROUTING = "tests/models/test_routing_and_rope.py"
KEPT = "tests/models/test_kept_tokens.py -k loop"
BAR = 0.95


class Mutant(NamedTuple):
    """`before`, which stands once in `file`, becomes `after`; `tests` should fail."""

    file: str
    before: str
    after: str
    tests: str


def _numerics(name: str, before: str, after: str, *tests: str) -> Mutant:
    return Mutant(f"{NUMERICS}/{name}.py", before, after, " ".join(f"{TESTS}/test_{test}.py" for test in tests))


MUTANTS = (
    _numerics("gptq", "cost[factor.order] = factor.cost", "cost[:] = factor.cost", "solvers"),
    _numerics("gptq", "inputs.view(-1, group_size)", "inputs.view(group_size, -1).t()", "solvers"),
    _numerics("gptq", "torch.argsort(grouped, dim=1, descending=True", "torch.argsort(grouped, dim=1, descending=False",
              "solvers"),
    _numerics("gptq", "feedback[:, :start], residual[:start])", "feedback[:, :start], -residual[:start])", "solvers"),
    _numerics("gptq", "codes[factor.order] = rounding.codes", "codes[:] = rounding.codes", "solvers", "tables"),
    _numerics("gptaq", "return weight + strength * moved", "return weight - strength * moved", "methods"),
    _numerics("gptaq", "min(1.0, max(0.0, gained / energy))", "min(1.0, max(0.0, energy / gained))", "held"),
    _numerics("gptaq", "(whole - first[0], missing(weight, statistics) - first[1])",
              "(whole, missing(weight, statistics) - first[1])", "held"),
    _numerics("gptaq", "2 * strength * gained - strength**2 * energy", "strength * gained - strength**2 * energy",
              "held"),
    _numerics("gptaq", "((first, second), (second, first))", "((first, first), (second, second))", "held"),
    _numerics("held_scales", "((first, second), (second, first))", "((first, first), (second, second))", "held"),
    _numerics("held_scales", "/ scales, judging)", "* scales, judging)", "held"),
    _numerics("held_scales", "(1 - LEAST) * unmoved", "(1 + LEAST) * unmoved", "held"),
    _numerics("held_scales", "if error < lowest", "if error > lowest", "held"),
    _numerics("hessian", "diagonal += damping * torch.where(mean", "diagonal -= damping * torch.where(mean", "solvers"),
    _numerics("hessian", "addmm_(above[:, : stop - start].t(), above, alpha=-1)",
              "addmm_(above[:, : stop - start].t(), above, alpha=1)", "solvers", "methods"),
    _numerics("hessian", "own += own.triu(1).t()", "own += own.triu(0).t()", "methods", "solvers"),
    _numerics("hessian", "ordered / factor.cost[:, None]", "ordered * factor.cost[:, None]", "methods"),
    _numerics("awq", "shrink = 1 - (1 - self.least) * step / self.steps", "shrink = 1 - (1 - self.least) * step",
              "methods"),
    _numerics("awq", "wins = error < lowest", "wins = error > lowest", "methods"),
    _numerics("awq", ".dequantize() / scales, statistics.hessian)", ".dequantize(), statistics.hessian)", "methods"),
    _numerics("awq", "scales = size ** (step / steps)", "scales = size ** (-step / steps)", "methods"),
    _numerics("migration", "pow(1 - self.alpha)", "pow(self.alpha)", "migration"),
    _numerics("migration", "scales.log2().round()", "scales.log2().ceil()", "migration"),
    _numerics("quantease", "alpha=1 / diagonal[j]", "alpha=-1 / diagonal[j]", "methods"),
    _numerics("quantease", "pull.addr_(own[j], values[j] - best)", "pull.addr_(own[j], best - values[j])", "methods"),
    _numerics("learned", "(1 - step / self.iterations) / self.iterations", "1.0 / self.iterations", "methods"),
    _numerics("learned", "by_offset.sign()", "-by_offset.sign()", "methods"),
    _numerics("sparsegpt", "best.square() * factor.cost[four, None]", "best.abs() * factor.cost[four, None]",
              "solvers"),
    _numerics("sparsegpt", "feedback[four, start:j], residual[start:j])",
              "feedback[four, start:j], -residual[start:j])", "solvers"),
    _numerics("magnitude", "pattern.keep_two(fours.abs())", "pattern.keep_two(fours)", "methods", "tables"),
    _numerics("hqq", "beta *= 1.01", "beta *= 0.5", "methods"),
    _numerics("hqq", "(codes - target / now.scale).mean(0)", "(target / now.scale - codes).mean(0)", "methods"),
    _numerics("kv_cache", "last = last + self(x[:, :, t] - last)", "last = last - self(x[:, :, t] - last)", "kv_cache"),
    _numerics("kv_cache", "self.num_bits, symmetric=False)", "self.num_bits - 1, symmetric=False)", "kv_cache"),
    _numerics("kv_cache", "positions % ANCHOR == 0", "positions % ANCHOR == 1", "kv_cache"),
    _numerics("ranges", "counts[0] = counts[1]", "counts[1] = counts[0]", "ranges"),
    _numerics("ranges", "places = (part.float().abs()", "places = (part.float().square()", "ranges"),
    _numerics("kv_cache", "return first + self.coarse(x - first)", "return first - self.coarse(x - first)", "kv_cache"),
    Mutant("deepseek_compress/models/kept_tokens.py", "before < here[:, None] - knobs.window",
           "before <= here[:, None] - knobs.window", KEPT),
    Mutant("deepseek_compress/models/kept_tokens.py", "masked_fill(~candidates, -1.0)", "masked_fill(candidates, -1.0)",
           KEPT),
    Mutant("deepseek_compress/models/kept_tokens.py", "(weights * ~kept, rest[1])", "(weights * kept, rest[1])", KEPT),
    Mutant("deepseek_compress/models/moe.py", "groups.topk(2", "groups.topk(1", ROUTING),
    Mutant("deepseek_compress/models/rope.py", "scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2",
           "scale *= yarn_mscale(rope.factor, rope.mscale_all_dim)", ROUTING),
    Mutant("deepseek_compress/evaluation/statistics.py", "np.asarray(values, dtype=np.float64) - np.asarray(reference",
           "np.asarray(values, dtype=np.float64) + np.asarray(reference", "tests/evaluation/test_statistics.py"),
    Mutant("deepseek_compress/models/rope.py",
           "yarn_mscale(rope.factor, rope.mscale) / yarn_mscale(rope.factor, rope.mscale_all_dim)",
           "yarn_mscale(rope.factor, rope.mscale) * yarn_mscale(rope.factor, rope.mscale_all_dim)", ROUTING),
    Mutant("deepseek_compress/models/moe.py", "if moe.method == \"noaux_tc\" else groups.amax(-1)",
           "if moe.method == \"noaux_tc\" else groups.amin(-1)", ROUTING),
)  # fmt: skip


def misplaced() -> list[str]:
    """Mutants whose text does not stand in its file exactly once: the list has to follow the sources."""
    return [f"{m.file}: {m.before!r}" for m in MUTANTS if (ROOT / m.file).read_text().count(m.before) != 1]


def failed(tests: str, tree: Path) -> bool:
    """Whether a test fails in the copy `tree`; raises SystemExit where they cannot be run."""
    child = os.fork()
    if not child:
        os.chdir(tree)
        sys.dont_write_bytecode = True
        sys.path[:] = [str(tree), *(path for path in sys.path if path and Path(path).resolve() != ROOT)]
        torch.set_num_threads(1)
        with open(tree / "log", "w", encoding="utf-8") as log:
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
            os._exit(
                pytest.main([*tests.split(), "-x", "-q", "-p", "no:cacheprovider", "-m", "not gpu and not verify"])
            )
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"{tests}: pytest ended with {code}:\n{(tree / 'log').read_text()[-2000:]}")
    return code == pytest.ExitCode.TESTS_FAILED


def caught(mutant: Mutant, tree: Path) -> bool:
    """Whether a test fails with the mutant in the copy `tree`, which is put right again."""
    file = tree / mutant.file
    text = file.read_text()
    file.write_text(text.replace(mutant.before, mutant.after))
    try:
        return failed(mutant.tests, tree)
    finally:
        file.write_text(text)


def main() -> int:
    """Try every mutant; 1 where too many survive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of files")
    options = parser.parse_args()
    if wrong := misplaced():
        raise SystemExit("\n".join(["not there once:", *wrong]))
    chosen = [mutant for mutant in MUTANTS if any(fnmatch(mutant.file, pattern) for pattern in options.only)]
    survived = []
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder)
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, tree / name)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if failed(tests, tree):
                raise SystemExit(f"{tests} fails without a mutant:\n{(tree / 'log').read_text()[-2000:]}")
        for number, mutant in enumerate(chosen, start=1):
            found = caught(mutant, tree)
            told = "caught" if found else "SURVIVED"
            print(f"{number}/{len(chosen)} {told}: {mutant.file}: {mutant.before}", flush=True)
            if not found:
                survived.append(f"{mutant.file}: {mutant.before}")
    share = 1 - len(survived) / len(chosen)
    print(json.dumps({"benchmark": "mutants", "mutants": len(chosen), "caught": round(share, 3), "survived": survived}))
    return 0 if share >= BAR else 1


if __name__ == "__main__":
    raise SystemExit(main())

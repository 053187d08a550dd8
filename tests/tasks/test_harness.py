"""Scores of GSM8K answers against lm-evaluation-harness's own filters and metric.

`DSC_LM_EVAL=PYTHON`: an environment with lm-eval, apart: it brings many packages.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
from pathlib import Path

import pytest

from deepseek_compress.tasks import files

THEIRS = r"""
import json, sys
from lm_eval.api.metrics import exact_match_hf_evaluate
from lm_eval.filters.extraction import RegexFilter
given = json.load(sys.stdin)
filters = {
    "strict": RegexFilter(r"#### (\-?[0-9\.\,]+)"),
    "flexible": RegexFilter(r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1),
}
out = {}
for name, made in filters.items():
    found = [one[0] for one in made.apply([[text] for text in given["texts"]], [{}] * len(given["texts"]))]
    out[name] = [
        float(exact_match_hf_evaluate([a], [r], [",", "\\$", "(?s).*#### ", "\\.$"], ignore_case=True)["exact_match"])
        for a, r in zip(found, given["references"])
    ]
json.dump(out, sys.stdout)
"""


def completions() -> tuple[list[str], list[str]]:
    """Answers as models write them, right and wrong, with the oddities that filters differ on."""
    rng, texts, references = random.Random(5), [], []
    for _ in range(300):
        right = rng.choice([rng.randint(0, 99), rng.randint(1000, 99999), -rng.randint(1, 50)])
        said = right if rng.random() < 0.6 else right + rng.choice([1, -1, 10])
        form = rng.choice(["{0}", "{0:,}", "${0}", "{0}.", "{0}.00", "{0} apples", "**{0}**"])
        end = rng.choice(
            ["#### {}", "#### {}\n", "####{}", "The answer is {}", "{}", "so {} or 3?", "#### {}\n\n#### 5"]
        )
        chain = rng.choice(["", "3 + 4 = <<3+4=7>>7\n", "First 1,5 then ... ", "no numbers. "])
        texts.append(chain + end.format(form.format(said)))
        references.append(f"some steps <<1+1=2>>2\n#### {right:,}" if rng.random() < 0.5 else f"steps\n#### {right}")
    return [*texts, "", "...", "$", "#### "], [*references, "#### 1", "#### 1", "#### 1", "#### 1"]


@pytest.mark.verify
@pytest.mark.skipif("DSC_LM_EVAL" not in os.environ, reason="DSC_LM_EVAL names no Python with lm-eval")
def test_scores_are_those_of_lm_evaluation_harness(tmp_path: Path) -> None:
    texts, references = completions()
    done = subprocess.run(
        [os.environ["DSC_LM_EVAL"], "-c", THEIRS], input=json.dumps({"texts": texts, "references": references}),
        capture_output=True, text=True, check=True, cwd=tmp_path,
    )  # fmt: skip
    theirs = json.loads(done.stdout)
    problems = [files.problem_of("x", {"question": "q", "answer": r}, "f") for r in references]
    for scorer in ("strict", "flexible"):
        mine = [float(files.judge(p, t, scorer).exact) for p, t in zip(problems, texts, strict=True)]
        wrong = [(t, r) for t, r, a, b in zip(texts, references, mine, theirs[scorer], strict=True) if a != b]
        assert wrong == []
        assert 0.05 < sum(mine) / len(mine) < 0.95


def test_filters_of_the_harness_by_hand() -> None:
    problem = files.problem_of("x", {"question": "q", "answer": "so\n#### 1,234"}, "f")
    for text, strict, flexible in [
        ("#### 1234", True, True),
        ("it is $1,234.", False, True),
        ("1234 or 3", False, False),
    ]:
        assert files.judge(problem, text, "strict").exact is strict
        assert files.judge(problem, text, "flexible").exact is flexible

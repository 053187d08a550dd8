"""Make the built-in calibration set again: python calibration_data/generate.py [FOLDER]

Writes reasoning.jsonl (one `{"prompt", "completion"}` a line) and manifest.json. The same code gives the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections import Counter
from dataclasses import asdict
from pathlib import Path

from deepseek_compress import tasks

SEED, COUNT, SPLIT = 1, 4096, "calibration"
FILE = "reasoning.jsonl"


def generate(folder: Path) -> None:
    """Write the set and its manifest into `folder`."""
    problems = tasks.mixture(SEED, COUNT, SPLIT)
    lines = [json.dumps({"prompt": problem.prompt, "completion": problem.solution}) for problem in problems]
    content = ("\n".join(lines) + "\n").encode()
    (folder / FILE).write_bytes(content)
    manifest = {
        "generator": "calibration_data/generate.py",
        "seed": SEED,
        "split": SPLIT,
        "difficulty": asdict(tasks.DEFAULT),
        "problems": COUNT,
        "words": sum(len(f"{problem.prompt} {problem.solution}".split()) for problem in problems),
        "families": dict(sorted(Counter(problem.family for problem in problems).items())),
        "kinds": dict(sorted(Counter(problem.kind for problem in problems).items())),
        "files": {FILE: {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}},
    }
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)

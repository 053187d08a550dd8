"""The folder of target genai in the real onnxruntime-genai, which lives in an environment of its own."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_compress.models.runtime import Model
from tests.export.conftest import write_quantised

ROOT = Path(__file__).parents[2]
PYTHON = Path(os.environ.get("DSC_GENAI_PYTHON", ROOT / ".venv-genai" / "bin" / "python"))
SCRIPT = """
import json, sys
from pathlib import Path
from deepseek_compress.generation.backends.genai import GenaiBackend
folder, ids = sys.argv[1], json.loads(sys.argv[2])
backend = GenaiBackend(Path(folder), 1)
def greedy(ids, count):
    tokens = [int(backend.prefill(ids).argmax())]
    while len(tokens) < count:
        tokens.append(int(backend.step(tokens[-1]).argmax()))
    return tokens
first = greedy(ids, 64)
again = greedy(ids + first[:9], 20)
print(json.dumps([first, again]))
"""
pytestmark = [
    pytest.mark.verify,
    pytest.mark.skipif(not PYTHON.exists(), reason=f"no {PYTHON}: make verify sets it up"),
]


@pytest.mark.parametrize("family", ["tiny_qwen2", "tiny_qwen3", "tiny_llama"])
@pytest.mark.parametrize("scheme", ["w4a16", "w4a8-attention"])
def test_it_says_what_the_runtime_says(
    request: pytest.FixtureRequest, tmp_path: Path, exported: Callable[..., Path], family: str, scheme: str
) -> None:
    """Prefill, 64 tokens, and a second text that begins like the first: genai goes back in its cache."""
    source = write_quantised(request.getfixturevalue(family), tmp_path / "w4", scheme)
    folder, ids = exported(source, "genai", accuracy_level=0), [3, 30, 300, 77, 12]
    env = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    command = [str(PYTHON), "-c", SCRIPT, str(folder), json.dumps(ids)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert done.returncode == 0, done.stderr
    first, again = json.loads(done.stdout)
    (want,) = Model.load(source).generate([ids], 64, eos=())
    if scheme == "w4a16":
        assert first == want
    assert again == first[9:29]

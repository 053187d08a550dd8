"""A built wheel carries everything and works away from the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel."""
    pytest.importorskip("hatchling")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return next(out.glob("*.whl"))


def test_the_wheel_has_recipes_data_model_and_kernel_sources(built: Path) -> None:
    names = set(zipfile.ZipFile(built).namelist())
    data = "deepseek_compress/_data"
    assert f"{data}/recipes/quickstart.yaml" in names
    assert f"{data}/builtin/nano/config.json" in names
    assert any(name.startswith(f"{data}/builtin/nano/") and name.endswith(".safetensors") for name in names)
    assert any(name.startswith(f"{data}/calibration_data/") and name.endswith(".jsonl") for name in names)
    assert "deepseek_compress/py.typed" in names
    native = {str(path.relative_to(ROOT)) for path in (ROOT / "cuda_ops" / "native").iterdir() if path.is_file()}
    assert {name for name in native if not name.endswith(".so")} <= names
    assert not any(name.startswith("tests/") or name.endswith(".so") for name in names)


def test_the_wheel_works_away_from_the_checkout(built: Path, tmp_path: Path) -> None:
    zipfile.ZipFile(built).extractall(tmp_path / "site")
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONDONTWRITEBYTECODE": "1"}
    code = (
        "import deepseek_compress, sys\n"
        "assert 'site' in deepseek_compress.__file__, deepseek_compress.__file__\n"
        "from deepseek_compress.cli import main\nsys.argv = ['dsc', *sys.argv[1:]]\nmain()"
    )

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *words]
        return subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

    listed = run("list", "--json")
    assert listed.returncode == 0, listed.stderr
    assert "quickstart" in {entry["name"] for entry in json.loads(listed.stdout)["recipes"]}
    planned = run("plan", "builtin:nano", "-r", "quickstart", "--json")
    assert json.loads(planned.stdout)["problems"] == [], planned.stdout


def test_the_constraints_pin_every_dependency() -> None:
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (ROOT / "constraints.txt").read_text().split("\n")
    }
    metadata = (ROOT / "pyproject.toml").read_text()
    dependencies = metadata.split("dependencies = [")[1].split("\n]")[0]
    names = (line.strip(' ",').split(">=")[0] for line in dependencies.splitlines() if ">=" in line)
    wanted = {name.lower().replace("_", "-") for name in names}
    assert wanted - pinned <= {"onnxruntime"}  # stands for onnxruntime-gpu off Linux x86-64


def test_a_source_archive_can_be_built(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "sdist", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        names = archive.getnames()
    assert any(name.endswith("/recipes/quickstart.yaml") for name in names)

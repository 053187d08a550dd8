"""What the CUDA compiler makes of the kernels: no warning, no spill, no local memory, loads of 16 bytes."""

from __future__ import annotations

import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import pytest

from cuda_ops import build

SOURCE = build.NATIVE / "softmax.cu"
CAPABILITIES = ["80", "86", "89", "90", "100", "120"]
FAST = ["80"]  # `make test`; the others are part of `make verify`


def nvcc() -> str:
    found = build.cuda_compiler()
    if found is None:
        pytest.skip("nvcc is not installed")
    return found


def disassembler() -> str:
    """nvdisasm from the path, or of the package nvidia-cuda-nvdisasm."""
    try:
        files = metadata.files("nvidia-cuda-nvdisasm") or []
    except metadata.PackageNotFoundError:
        files = []
    found = shutil.which("nvdisasm") or next((str(f.locate()) for f in files if f.name == "nvdisasm"), None)
    if found is None:
        pytest.skip("nvdisasm is not installed (python -m pip install nvidia-cuda-nvdisasm)")
    return found


@pytest.fixture(
    scope="module", params=[c if c in FAST else pytest.param(c, marks=pytest.mark.verify) for c in CAPABILITIES]
)
def compiled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """The compiler's report on registers and memory, and the machine code; every warning is an error."""
    output = tmp_path_factory.mktemp("nvcc") / f"sm_{request.param}.cubin"
    flags = ["-std=c++20", "-O3", f"-arch=sm_{request.param}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = [nvcc(), *flags, "-Xcompiler", "-Wall", "-cubin", str(SOURCE), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stderr, output


def test_no_warning_no_spill_no_local_memory(compiled: tuple[str, Path]) -> None:
    report = compiled[0]
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) >= 4 * 7  # four inputs: naive, and three kernels for aligned rows and ragged ones
    assert set(frames) == {("0", "0", "0")}, re.findall(r"(?s)Compiling entry.*?Used \d+", report)
    assert "lmem" not in report
    assert "warning" not in report


def test_loads_are_16_bytes_wide(compiled: tuple[str, Path]) -> None:
    command = [disassembler(), "-c", str(compiled[1])]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    functions = re.findall(r"^\.text\.(\S+):(.*?)(?=^\.text\.|\Z)", sass, flags=re.S | re.M)
    assert len(functions) >= 4 * 7
    for name, code in functions:
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        if "Lb1E" in name or name == "dsc_softmax_float16":  # the kernels for aligned rows
            assert re.search(r"LDG\.E(\.\w+)*\.128", code), f"{name} has no 16-byte load"


@pytest.mark.verify
def test_ptx_for_the_tensorrt_plugin() -> None:
    """The plain entry point is there with its three parameters, and reads 16 bytes at a time."""
    nvcc()
    entry = re.search(r"\.entry dsc_softmax_float16\((.*?)\)(.*?)\n}", build.softmax_ptx("89").read_text(), flags=re.S)
    assert entry is not None
    assert len(re.findall(r"\.param", entry[1])) == 3
    assert "ld.global.nc.v4.u32" in entry[2]

"""What the CUDA compiler makes of the kernels: no warning, no spill, no local memory, few registers, wide loads."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

import pytest

from cuda_ops import build

CAPABILITIES = ["80", "86", "89", "90", "100", "120"]
FAST = ["80"]  # `make test`; the others are part of `make verify`
# The kernels of each source, how many of each there are, and the most registers a thread may take: with these, the
# threads that a multiprocessor's 65,536 registers hold ask for more bytes, or have more to compute, than it needs to be
# busy. softmax: four inputs, aligned rows and ragged ones.
KERNELS = {
    "softmax.cu": {
        "naive_kernel": (4, 255), "warp_kernel": (8, 255), "block_kernel": (8, 64), "online_kernel": (8, 64),
        "dsc_softmax_float16": (1, 64),
    },
    "pack.cu": {"naive_pack": (5, 64), "warp_pack": (20, 96), "block_pack": (5, 168)},
    "gptq.cu": {"naive_search": (1, 80), "tile_search": (1, 80), "naive_feed": (2, 64), "tile_feed": (4, 168)},
}  # fmt: skip


class Compiled(NamedTuple):
    """The compiler's report on registers and memory, and the machine code."""

    source: str
    report: str
    cubin: Path


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


@pytest.fixture(scope="module", params=KERNELS)
def source(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(
    scope="module", params=[c if c in FAST else pytest.param(c, marks=pytest.mark.verify) for c in CAPABILITIES]
)
def compiled(request: pytest.FixtureRequest, source: str, tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Every warning is an error."""
    output = tmp_path_factory.mktemp("nvcc") / f"sm_{request.param}.cubin"
    flags = ["-std=c++20", "-O3", f"-arch=sm_{request.param}", "-Xptxas", "-v", "-Werror", "all-warnings"]
    command = [nvcc(), *flags, "-Xcompiler", "-Wall", "-cubin", str(build.NATIVE / source), "-o", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return Compiled(source, done.stderr, output)


def test_no_warning_no_spill_no_local_memory(compiled: Compiled) -> None:
    expected = sum(count for count, _ in KERNELS[compiled.source].values())
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", compiled.report)
    assert len(frames) == expected
    assert set(frames) == {("0", "0", "0")}, re.findall(r"(?s)Compiling entry.*?Used \d+", compiled.report)
    assert "lmem" not in compiled.report
    assert "warning" not in compiled.report


def test_registers(compiled: Compiled) -> None:
    used = re.findall(r"(?s)Compiling entry function '(\S+)'.*?Used (\d+) registers", compiled.report)
    for kernel, (count, most) in KERNELS[compiled.source].items():
        registers = [int(number) for name, number in used if kernel in name]
        assert len(registers) == count, kernel
        assert max(registers) <= most, (kernel, registers)


def machine_code(compiled: Compiled) -> dict[str, str]:
    command = [disassembler(), "-c", str(compiled.cubin)]
    sass = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(re.findall(r"^\.text\.(\S+):(.*?)(?=^\.text\.|\Z)", sass, flags=re.S | re.M))


def check_softmax(name: str, code: str) -> None:
    if "Lb1E" in name or name == "dsc_softmax_float16":  # the kernels for aligned rows
        assert re.search(r"LDG\.E(\.\w+)*\.128", code), f"{name} has no 16-byte load"


def check_pack(name: str, code: str) -> None:
    """A word's stored bytes are one load, two for float32; each row's is asked for before the first is used."""
    if "naive" in name:
        return
    encoding = int(re.search(r"EncodingE(\d)", name)[1])  # type: ignore[index]
    loads = len(re.findall(r"LDG\.E(?:\.\w+)*" + {3: r"\.64", 4: ""}.get(encoding, r"\.128"), code))
    assert loads >= (16 if encoding == 0 else 8), name
    assert "warp" not in name or "BAR.SYNC" not in code


def check_gptq(name: str, code: str) -> None:
    """A product and a sum stay two roundings, and the first of two zeros is kept."""
    if "feed" not in name:
        return
    assert re.search(r"\bFMUL\b", code) and re.search(r"\bFADD\b", code)
    assert not re.search(r"\bFMNMX\b", code), name
    if "Unrounded" in name:  # where nothing is divided
        assert not re.search(r"\bFFMA2?\b", code), name
    if "tile" in name:
        assert re.search(r"LDS(\.\w+)*\.128", code), f"{name} reads shares one by one"


def test_machine_code(compiled: Compiled) -> None:
    checks: dict[str, Callable[[str, str], None]] = {
        "softmax.cu": check_softmax,
        "pack.cu": check_pack,
        "gptq.cu": check_gptq,
    }
    functions = machine_code(compiled)
    assert len(functions) == sum(count for count, _ in KERNELS[compiled.source].values())
    for name, code in functions.items():
        assert not re.search(r"\b(LDL|STL)\b", code), f"{name} uses local memory"
        checks[compiled.source](name, code)


@pytest.mark.verify
def test_the_operators_compile(tmp_path: Path) -> None:
    """torch_cuda.cpp against torch's headers, which a torch without CUDA has too; it is linked where there is a GPU."""
    flags = [flag for flag in build.torch_flags() if not flag.startswith(("-l", "-L", "-W"))]
    sources = str(build.NATIVE / "torch_cuda.cpp"), "-c", "-o", str(tmp_path / "torch_cuda.o")
    command = [nvcc(), *(f for f in build.cuda_flags("90") if f != "-shared"), *flags, *sources]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    symbols = subprocess.run(["nm", "-u", str(tmp_path / "torch_cuda.o")], capture_output=True, text=True, check=True)
    wanted = {f"dsc_{name}_cuda" for name in ("pack", "search", "round", "unrounded", "softmax")}
    assert wanted <= set(symbols.stdout.split())


@pytest.mark.verify
def test_the_kernels_are_one_library_with_a_function_each() -> None:
    nvcc()
    symbols = subprocess.run(
        ["nm", "-D", "--defined-only", str(build.cuda_kernels("80"))], capture_output=True, text=True, check=True
    )
    wanted = {f"dsc_{name}_cuda" for name in ("pack", "search", "round", "unrounded", "softmax")}
    assert wanted <= set(symbols.stdout.split())


@pytest.mark.verify
def test_ptx_for_the_tensorrt_plugin() -> None:
    """The plain entry point is there with its three parameters, and reads 16 bytes at a time."""
    nvcc()
    entry = re.search(r"\.entry dsc_softmax_float16\((.*?)\)(.*?)\n}", build.softmax_ptx("89").read_text(), flags=re.S)
    assert entry is not None
    assert len(re.findall(r"\.param", entry[1])) == 3
    assert "ld.global.nc.v4.u32" in entry[2]

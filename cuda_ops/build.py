"""Compile the native code on first use and keep it: no wheel, no Python headers, one compiler call.

A library is a few C++ files that register operators on torch's stable ABI, or export plain C functions. It is compiled
into the user's cache, into a file named by a hash of everything that decides its bytes: sources, flags, compiler and
torch version. Two processes that want the same file at once wait for one another; the file appears by a rename, so a
build that is killed leaves nothing that loads. Beside it stands its hash: what does not match, or others may write, is
not loaded but compiled again.

Nothing here is tuned to the processor that compiles (no -march=native): the code chooses its instructions at run time.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path

NATIVE = Path(__file__).parent / "native"
EMULATION = Path(__file__).parent / "emulation"
CUDA_SOURCES = ("pack.cu", "gptq.cu", "softmax.cu")
TIMEOUT_S = 600

# Features of torch 2.10 are enough, so one source builds with 2.10 and everything later.
TORCH_TARGET = "-DTORCH_TARGET_VERSION=0x020a000000000000"
# Contraction to fused multiply-add would change the last bit of what must equal the reference.
HOST_FLAGS = (
    *("-std=c++20", "-O3", "-fPIC", "-shared", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-Wno-uninitialized", "-Wno-maybe-uninitialized"),  # GCC 12 says so of its own AVX-512 header
)


class BuildError(Exception):
    """The native code could not be compiled: one line with the reason."""


def cache_directory() -> Path:
    """Where compiled libraries live: $DSC_CACHE, else $XDG_CACHE_HOME/dsc, else ~/.cache/dsc."""
    base = os.environ.get("DSC_CACHE")
    if base:
        return Path(base) / "native"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dsc" / "native"


def torch_directory() -> Path:
    """Return the installed torch package, found without importing it."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise BuildError("torch is not installed")
    return Path(found.origin).parent


def host_compiler() -> str:
    """$CXX, else g++, c++ or clang++ from the path."""
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and shutil.which(name):
            return str(shutil.which(name))
    raise BuildError("no C++ compiler: none of $CXX, g++, c++, clang++ is on the path")


def cuda_compiler() -> str | None:
    """nvcc from $CUDA_HOME, the path or /usr/local/cuda; None where there is none."""
    homes = [Path(home) / "bin" / "nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((str(path) for path in homes if path.is_file()), None) or shutil.which("nvcc")


@functools.cache
def compiler_version(compiler: str) -> str:
    """Return the compiler's own description; part of the cache key."""
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, timeout=60, check=False).stdout


def cpu_library() -> Path:
    """Return the CPU operators (pack, softmax, GPTQ), built if need be. Raises BuildError."""
    return build(
        "cpu", host_compiler(), ["torch_cpu.cpp", "pack.cpp", "gptq.cpp", "softmax.cpp"], (*HOST_FLAGS, *torch_flags())
    )


def cuda_library(capability: str) -> Path:
    """Return the CUDA operators for one architecture such as "90", built if need be. Raises BuildError."""
    flags = [f for f in torch_flags() if not f.startswith("-Wl")]  # torch is loaded by then: no need to find it
    flags = [*cuda_flags(capability), *flags, "-ltorch_cuda"]
    return build(f"cuda{capability}", _nvcc(), ["torch_cuda.cpp", *CUDA_SOURCES], flags)


def cuda_kernels(capability: str) -> Path:
    """Return the CUDA kernels alone, behind a C function for `harness`; needs no torch headers. Raises BuildError."""
    return build(f"kernels{capability}", _nvcc(), CUDA_SOURCES, cuda_flags(capability))


def softmax_ptx(capability: str) -> Path:
    """PTX of the kernels, for a TensorRT plugin: entry `dsc_softmax_float16(logits, columns, out)`, a row a block of
    512 threads. Built if need be. Raises BuildError."""
    flags = ("-std=c++20", "-O3", "-ptx", f"-arch=compute_{capability}")
    return build(f"softmax{capability}", _nvcc(), ["softmax.cu"], flags, ".ptx")


def cuda_flags(capability: str) -> tuple[str, ...]:
    """Return nvcc's flags for a shared library of the kernels."""
    return ("-std=c++20", "-O3", "-shared", f"-arch=sm_{capability}", "-Xcompiler=-fPIC,-fvisibility=hidden")


def _nvcc() -> str:
    nvcc = cuda_compiler()
    if nvcc is None:
        raise BuildError("no CUDA compiler: nvcc is not on the path and $CUDA_HOME is not set")
    return nvcc


def emulated_library() -> Path:
    """Return the CUDA kernels compiled for the CPU, one fiber per CUDA thread; for tests. Raises BuildError."""
    # _FORTIFY_SOURCE refuses the longjmp from one stack to another that switches fibers.
    flags = ("-U_FORTIFY_SOURCE", "-fno-strict-aliasing", "-Wno-unknown-pragmas", f"-I{EMULATION}", f"-I{NATIVE}")
    host = [flag for flag in HOST_FLAGS if flag != "-O3"]
    sources = [str(EMULATION / source.replace(".cu", "_emulated.cpp")) for source in CUDA_SOURCES]
    return build("emulated", host_compiler(), sources, (*host, "-O1", *flags))


def torch_flags() -> tuple[str, ...]:
    """Where torch's headers and libraries are."""
    torch = torch_directory()
    lib = torch / "lib"
    return (TORCH_TARGET, "-isystem", str(torch / "include"), f"-L{lib}", "-ltorch_cpu", "-lc10", f"-Wl,-rpath,{lib}")


def build(name: str, compiler: str, sources: Sequence[str], flags: Sequence[str], suffix: str = ".so") -> Path:
    """Compile `sources` (of native/, or absolute) into one file in the cache and return its path."""
    directory = cache_directory()
    target = directory / f"{name}-{_key(compiler, sources, flags)}{suffix}"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        if (found := os.lstat(directory)).st_uid == os.getuid() and found.st_mode & 0o022:
            directory.chmod(stat.S_IMODE(found.st_mode) & ~0o022)  # ours, made with a generous umask
        if not _private(directory):
            raise BuildError(f"{directory}: others may write there; set DSC_CACHE to a directory of yours")
        if _sound(target):
            return target
        with _locked(target.with_suffix(".lock")):
            if not _sound(target):
                if target.exists():
                    print(f"{target}: not what was compiled; compiled again", file=sys.stderr)
                else:
                    print(f"compiling kernels ({name}), once: about 20 seconds", file=sys.stderr)
                _compile(target, [compiler, *(str(NATIVE / s) for s in sources), *flags])
    except OSError as error:
        raise BuildError(f"cannot write {directory}: {error.strerror}") from error
    return target


def _private(path: Path) -> bool:
    """Whether a file or directory is ours, or the system's, and nobody else may change it."""
    found = os.lstat(path)
    return found.st_uid in (os.getuid(), 0) and not found.st_mode & 0o022 and not stat.S_ISLNK(found.st_mode)


def _sound(library: Path) -> bool:
    """Whether a library is the file that was compiled: a damaged one ends the process, another's may do anything."""
    seal = _seal(library)
    if not (library.is_file() and seal.is_file() and _private(library) and _private(seal)):
        return False
    return hashlib.sha256(library.read_bytes()).hexdigest() == seal.read_text()


def _seal(library: Path) -> Path:
    """Where the SHA-256 of a library stands."""
    return library.with_name(library.name + ".sha256")


def _write(target: Path, content: bytes) -> None:
    """Write a temporary file, sync, rename; nobody else may write it."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    with os.fdopen(fd, "wb") as file:
        os.fchmod(file.fileno(), 0o644)
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, target)


def _key(compiler: str, sources: Sequence[str], flags: Sequence[str]) -> str:
    """Return a hash of everything that decides the bytes of the library."""
    digest = hashlib.sha256()
    for text in (compiler_version(compiler), metadata.version("torch"), *sources, *flags):
        digest.update(text.encode() + b"\0")
    for path in sorted(p for folder in (NATIVE, EMULATION) if folder.is_dir() for p in folder.iterdir() if p.is_file()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:20]


def _compile(target: Path, command: list[str]) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as scratch:
        made = Path(scratch) / target.name
        try:
            done = subprocess.run(
                [*command, "-o", str(made)], capture_output=True, text=True, timeout=TIMEOUT_S, cwd=scratch, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{command[0]} took more than {TIMEOUT_S} s") from error
        if done.returncode:
            text = done.stderr or done.stdout
            reason = next((line for line in text.splitlines() if "error" in line), text.strip()[-200:])
            raise BuildError(f"{command[0]} failed: {reason.strip()}")
        content = made.read_bytes()
        target.unlink(missing_ok=True)  # a process may have it mapped: it keeps the old file
        _write(_seal(target), hashlib.sha256(content).hexdigest().encode())
        _write(target, content)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield

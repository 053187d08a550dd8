"""The compiler runs once for one source, whoever asks; where it fails the reference serves and says why, once."""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cuda_ops import build


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that takes its time, notes each call and writes its arguments as the library."""
    monkeypatch.setenv("DSC_CACHE", str(tmp_path / "cache"))
    script = tmp_path / "fake++"
    script.write_text(
        "#!/bin/sh\n"
        'if [ "$1" = --version ]; then echo fake 1.0; exit; fi\n'
        f"echo call >> {tmp_path}/calls; sleep 0.2\n"
        'for last; do :; done; echo "$@" > "$last"\n'
    )
    script.chmod(0o755)
    build.compiler_version.cache_clear()
    return script


def test_built_once_by_many(compiler: Path, tmp_path: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        made = {pool.submit(build.build, "x", str(compiler), ["pack.cpp"], ["-O1"]).result() for _ in range(4)}
    assert len(made) == 1
    assert (tmp_path / "calls").read_text().count("call") == 1
    assert "-O1" in made.pop().read_text()


def test_other_flags_are_another_file(compiler: Path) -> None:
    one = build.build("x", str(compiler), ["pack.cpp"], ["-O1"])
    assert one != build.build("x", str(compiler), ["pack.cpp"], ["-O2"])


def test_a_changed_source_is_another_file(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = tmp_path / "native"
    source.mkdir()
    monkeypatch.setattr(build, "NATIVE", source)
    (source / "a.cpp").write_text("1")
    one = build.build("x", str(compiler), ["a.cpp"], [])
    (source / "a.cpp").write_text("2")
    assert one != build.build("x", str(compiler), ["a.cpp"], [])


def test_a_failed_build_leaves_nothing(compiler: Path) -> None:
    half = 'for last; do :; done; [ "$last" = --version ] || echo half > "$last"'  # where the library would be
    compiler.write_text(f'#!/bin/sh\n{half}\necho "x.cpp:3: error: no such thing" >&2; exit 1\n')
    with pytest.raises(build.BuildError, match="error: no such thing"):
        build.build("x", str(compiler), ["pack.cpp"], [])
    left = [p.name for p in build.cache_directory().iterdir() if not p.name.endswith(".lock")]
    assert left == []


def test_unwritable_cache_is_one_line(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DSC_CACHE", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match="cannot write"):
        build.build("x", str(compiler), ["pack.cpp"], [])


@pytest.mark.parametrize(
    "how", ["truncated", "empty", "a flipped bit", "without its hash", "writable by others", "a link"]
)
def test_a_library_that_is_not_what_was_compiled_is_compiled_again(
    how: str, compiler: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    made = build.build("x", str(compiler), ["pack.cpp"], [])
    content = made.read_bytes()
    seal = made.with_name(made.name + ".sha256")
    if how == "without its hash":
        seal.unlink()
    elif how == "writable by others":
        made.chmod(0o666)
    elif how == "a link":
        made.rename(tmp_path / "elsewhere")
        made.symlink_to(tmp_path / "elsewhere")
    else:
        made.write_bytes({"truncated": content[:9], "empty": b"", "a flipped bit": b"\x01" + content[1:]}[how])
    assert build.build("x", str(compiler), ["pack.cpp"], []) == made
    assert (tmp_path / "calls").read_text().count("call") == 2
    assert made.read_bytes()[:20] == content[:20]
    assert not made.is_symlink()
    assert capfd.readouterr().err.count("compiled again") == 1
    build.build("x", str(compiler), ["pack.cpp"], [])
    assert (tmp_path / "calls").read_text().count("call") == 2


def test_a_cache_that_others_own_is_refused(compiler: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)  # the directory is another's then, and root's alone is trusted
    (tmp_path / "cache" / "native").mkdir(parents=True)
    os.chmod(tmp_path / "cache" / "native", 0o777)
    with pytest.raises(build.BuildError, match="others may write there; set DSC_CACHE"):
        build.build("x", str(compiler), ["pack.cpp"], [])


FALLBACK = """
import logging, torch
import cuda_ops
w = torch.linspace(-1, 1, 64).view(2, 32)
first = cuda_ops.pack_weights(w, group_size=32)
again = cuda_ops.pack_weights(w, group_size=32)
assert torch.equal(first.packed, again.packed) and first.packed[0, 0].item() & 15 == 0
p, scale = cuda_ops.softmax(torch.zeros(2, 4))
assert torch.equal(p, torch.full((2, 4), 0.25)), p
print(cuda_ops.instructions())
"""


def test_without_a_compiler_the_reference_serves_and_says_so_once(tmp_path: Path) -> None:
    root = Path(build.__file__).parent.parent
    environment = os.environ | {"CXX": "/bin/false", "DSC_CACHE": str(tmp_path), "PYTHONPATH": str(root)}
    done = subprocess.run(
        [sys.executable, "-c", FALLBACK], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["reference"]
    notices = [line for line in done.stderr.splitlines() if "native kernels not available" in line]
    assert len(notices) == 1
    assert "/bin/false failed" in notices[0]


def test_importing_costs_nothing() -> None:
    root = Path(build.__file__).parent.parent
    code = "import sys, cuda_ops, cuda_ops.build; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert done.stdout.strip() == "False"

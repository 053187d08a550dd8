"""The output directory of a run: ours or not, finished or damaged, made of the same source or of another."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deepseek_compress import limits, workspace
from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.checkpoint.owned import announce, forget
from deepseek_compress.errors import DscError

LARGE = 2 << 20  # bytes that --quick does not read


def silent(text: str) -> None:
    return None


def finished(out: Path) -> Path:
    """A stage's output with a small and a large file, and the user's notes, of before and of meanwhile."""
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    announce(out, ["large.bin", "small.json"])
    (out / "large.bin").write_bytes(bytes(LARGE))
    (out / "small.json").write_text("{}")
    entry = {"fingerprint": "f", "kind": "artifact", "output": ".", "sources": {}}
    write_sealed(out / "dsc_manifest.json", {"schema": 2})
    (out / "during.txt").write_text("mine")
    workspace.finish(out, entry)
    forget(out)
    return out


@pytest.mark.parametrize("left", [(), (".dsc_run",), (".dsc_run/lock",), (".dsc_run/.state.json.tmp",)])
def test_a_run_killed_before_its_state_is_ours(left: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "out"
    for name in left:
        path = out / name
        if name == ".dsc_run":
            path.mkdir(parents=True)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")
    workspace.check_ours(out)
    (out / "of the user").parent.mkdir(exist_ok=True)
    (out / "of the user").write_text("")
    with pytest.raises(DscError, match="was not written by dsc"):
        workspace.check_ours(out)


def test_an_output_without_its_state_is_ours_by_its_manifest(tmp_path: Path) -> None:
    """But not with files that the manifest does not list."""
    out = tmp_path / "out"
    out.mkdir()
    for name in ("model.onnx", "dsc_run.json", ".dsc_partial"):
        (out / name).write_text("")
    with pytest.raises(DscError, match="was not written by dsc"):
        workspace.check_ours(out)
    write_sealed(out / "dsc_manifest.json", {"schema": 2, "files": {"model.onnx": {"bytes": 0, "blake3": ""}}})
    workspace.check_ours(out)
    (out / "of the user").write_text("")
    with pytest.raises(DscError, match="was not written by dsc"):
        workspace.check_ours(out)


def test_a_damaged_state_is_written_anew(tmp_path: Path) -> None:
    told: list[str] = []
    with workspace.lock(tmp_path):
        workspace.agree(tmp_path, {"a": 1}, told.append)
        (tmp_path / "output").write_text("")
        with pytest.raises(DscError, match="made with a 1, now 2"):
            workspace.agree(tmp_path, {"a": 2}, told.append)
        (tmp_path / ".dsc_run" / "state.json").write_text("{")
        workspace.agree(tmp_path, {"a": 1}, told.append)
        workspace.agree(tmp_path, {"a": 1}, told.append)
    assert [line.rpartition(": ")[2] for line in told] == ["damaged, written anew"]


@pytest.mark.parametrize("name", ["large.bin", "small.json"])
def test_finished_means_verified(name: str, tmp_path: Path) -> None:
    out = finished(tmp_path / "out")
    assert workspace.finished(out, "f", False, silent) is not None
    assert workspace.finished(out, "g", False, silent) is None
    (out / "notes.txt").write_text("other notes")  # not recorded
    assert workspace.finished(out, "f", False, silent) is not None
    content = bytearray((out / name).read_bytes())
    content[1] ^= 4
    (out / name).write_bytes(content)
    with pytest.raises(DscError, match=f"{name}: not the bytes that were written; remove"):
        workspace.finished(out, "f", False, silent)
    if name == "large.bin":
        assert workspace.finished(out, "f", True, silent) is not None
        (out / name).write_bytes(content[1:])
    with pytest.raises(DscError, match=name):
        workspace.finished(out, "f", True, silent)
    (out / name).unlink()
    assert workspace.finished(out, "f", False, silent) is None


def test_a_damaged_manifest_is_no_finished_stage(tmp_path: Path) -> None:
    out, told = finished(tmp_path / "out"), list[str]()
    file = out / "dsc_manifest.json"
    file.write_text(file.read_text().replace('"f"', '"e"'))
    assert workspace.finished(out, "e", False, told.append) is None
    assert "dsc_manifest.json: not the bytes that were written: the stage runs again" in told[0]


def test_an_interrupted_stage_starts_over_when_its_source_changes(tmp_path: Path) -> None:
    house, out, source, told = tmp_path / "house", tmp_path / "out", tmp_path / "source", list[str]()
    for path in (house, out / ".dsc_partial", out / ".dsc_run", source):
        path.mkdir(parents=True)
    (source / "a").write_text("1")
    workspace.Sources(house, "stage", {"model": source}).begin(out, told.append)
    workspace.Sources(house, "stage", {"model": source}).begin(out, told.append)
    assert (out / ".dsc_partial").is_dir()
    times = (source / "a").stat()
    (source / "a").write_text("2")
    os.utime(source / "a", ns=(times.st_atime_ns, times.st_mtime_ns))
    workspace.Sources(house, "stage", {"model": source}).begin(out, told.append)
    assert told == ["what it reads has changed since it was stopped: it starts over"]
    assert [path.name for path in out.iterdir()] == [".dsc_run"]


def test_a_source_that_changes_meanwhile_leaves_nothing(tmp_path: Path) -> None:
    house, out, source = tmp_path / "house", tmp_path / "out", tmp_path / "source"
    for path in (house, out, source):
        path.mkdir()
    (source / "a").write_text("1")
    (out / "notes.txt").write_text("mine")
    sources = workspace.Sources(house, "stage", {"model": source})
    sources.check(out)
    announce(out, ["config.json"])
    (out / "config.json").write_text("{}")
    (out / "during.txt").write_text("mine")
    (source / "a").write_text("2")
    with pytest.raises(DscError, match="changed while it was read"):
        sources.check(out)
    assert sorted(path.name for path in out.iterdir()) == ["during.txt", "notes.txt"]


def test_a_finished_output_of_another_source(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(bytes(1 << 20))
    hashes = workspace.source_hashes(tmp_path, {})
    workspace.same_source(tmp_path, hashes, tmp_path / "out")
    (tmp_path / "notes.json").write_text("{}")  # nothing was made of it
    workspace.same_source(tmp_path, hashes, tmp_path / "out")
    with (tmp_path / "model.safetensors").open("r+b") as file:
        file.seek(300_001)  # between what a fingerprint samples
        file.write(b"x")
    with pytest.raises(DscError, match=r"model.safetensors: not what .*out was made of"):
        workspace.same_source(tmp_path, hashes, tmp_path / "out")


def test_pages_of_others_are_kept(tmp_path: Path) -> None:
    home, page = tmp_path / "r.dsc", tmp_path / "r.md"
    (home / ".dsc_run").mkdir(parents=True)
    (home / "report.md").write_text("one")
    workspace.Pages(home, {"report.md": page}).publish()
    (home / "report.md").write_text("two")
    workspace.Pages(home, {"report.md": page}).publish()
    assert page.read_text() == "two"
    page.write_text("mine")
    with pytest.raises(DscError, match="was not written by this command"):
        workspace.Pages(home, {"report.md": page})


@pytest.mark.parametrize(
    "text",
    ["(a+)+$", "(a|a)*b", "(.*)(.*)(.*)(.*)(.*)x", "(a?){50}a{50}", "(?P<x>a)(?P=x)", "a?" * 40, "(", "((a+)b?)+c"],
)
def test_expressions_that_may_take_forever(text: str) -> None:
    with pytest.raises(DscError):
        limits.pattern(text)


@pytest.mark.parametrize("text", [r".*o_proj$", r"model\.layers\.(0|1|2)\..*mlp\..*", r"^(?:a|b)\d+\.x{2,3}$"])
def test_expressions_that_serve(text: str) -> None:
    assert limits.pattern(text).pattern == text

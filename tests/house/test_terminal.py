"""What a person reads in the terminal: times, limits, shares, usage lines, in words and with units."""

from __future__ import annotations

import re
import socket
import threading
from pathlib import Path

import pytest

from deepseek_compress import console, machine
from deepseek_compress.planning import rates
from tests.house.conftest import QUICK, Dsc
from tests.house.short import TEXT
from tests.house.test_cli import COMMANDS

DEAD = "127.0.0.1:1"


@pytest.mark.parametrize("command", COMMANDS)
def test_a_usage_line_names_arguments_as_they_are_typed(dsc: Dsc, command: str) -> None:
    usage = re.search(r"Usage: (.*)", dsc(command, "--help").output)
    assert usage is not None
    assert "{" not in usage[1]
    assert "......" not in usage[1]


@pytest.fixture
def measured(dsc: Dsc, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The devices that were measured."""
    found: list[str] = []
    monkeypatch.setattr(rates, "_measured", lambda device: found.append(device) or QUICK)
    return found


def test_the_built_in_run_measures_the_machine_once_and_plan_has_times(
    dsc: Dsc, tiny_llama: Path, measured: list[str]
) -> None:
    Path("quickstart.yaml").write_text("stages: [compress: {weights: {rtn: {group_size: 32}}}]\n")
    Path("mine.yaml").write_text(Path("quickstart.yaml").read_text())
    words = ["--model", tiny_llama, "-o"]
    assert dsc("run", "mine.yaml", *words, "a").exit_code == 0
    assert measured == []
    assert "time unknown" in dsc("plan", tiny_llama, "-r", "w4a16", "--group-size", 32).stdout
    for out in ("b", "c"):
        assert dsc("run", "quickstart.yaml", *words, out).exit_code == 0
    assert measured == ["cpu"]
    planned = dsc("plan", tiny_llama, "-r", "w4a16", "--group-size", 32)
    assert "time unknown" not in planned.stdout
    (row,) = [line for line in planned.stdout.splitlines() if line.startswith("compress  compress")]
    assert re.search(r"  \d+(\.\d)? (s|min)$", row), row
    assert "time not foreseen" not in planned.stdout
    exported = dsc("plan", tiny_llama, "-r", "export").stdout
    assert "time not foreseen: export" in exported.splitlines()


@pytest.mark.parametrize(("load", "said"), [(9.4, True), (0.5, False)])
def test_rates_of_a_busy_machine_are_said_to_be_that(
    dsc: Dsc, tiny_llama: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, load: float, said: bool
) -> None:
    monkeypatch.setattr("os.getloadavg", lambda: (load, load, load))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    done = dsc("plan", tiny_llama, "-r", "w4a16-fast", "--group-size", 32, "--measure")
    line = "measured while this machine was busy (load 9.4 on 2 cores): run --measure again when it is not"
    assert (line in done.stderr.splitlines()) == said
    assert measured == ["cpu"]


def test_more_workers_than_cores_are_answered_by_what_limits_them(dsc: Dsc, tiny_llama: Path) -> None:
    cores = machine.cores()
    line = f"--workers {cores}, not 99: this machine has {cores} cores"
    words = [tiny_llama, "-r", "w4a16-fast", "--group-size", 32, "--workers", 99]
    assert line in dsc("plan", *words).stdout.splitlines()
    done = dsc("quantize", *words, "-o", "q")
    assert done.exit_code == 0, done.output
    assert f"  {line}" in done.stderr.splitlines()


def test_a_dead_cluster_is_one_line_before_work_starts(dsc: Dsc, tiny_llama: Path) -> None:
    words = [tiny_llama, "-r", "w4a16-fast", "--group-size", 32, "--ray"]
    for command in (["plan"], ["quantize", "-o", "q"]):
        done = dsc(*command, *words, DEAD)
        assert done.exit_code == 1
        assert done.stderr.splitlines() == [
            f"error: --ray {DEAD}: nobody listens at {DEAD}; "
            "give the address of a running cluster (`ray status`), or auto"
        ]
    assert not Path("q").exists()
    done = dsc("plan", *words, "no-such-host.invalid:6379")
    assert "unknown host no-such-host.invalid" in done.stderr


@pytest.mark.parametrize("answer", [b"HTTP/1.0 400 Bad request\r\n\r\n", b""])
def test_what_is_no_cluster_is_one_line(dsc: Dsc, tiny_llama: Path, answer: bytes) -> None:
    """Ray itself would try it for minutes."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def reply() -> None:
            with server.accept()[0] as asked:
                asked.recv(100)
                asked.sendall(answer)

        threading.Thread(target=reply, daemon=True).start()
        place = f"127.0.0.1:{server.getsockname()[1]}"
        done = dsc("plan", tiny_llama, "-r", "w4a16-fast", "--group-size", 32, "--ray", place)
    assert [line.partition(";")[0] for line in done.stderr.splitlines()] == [
        f"error: --ray {place}: what listens at {place} is not a Ray cluster"
    ]


def test_shares_that_do_not_add_up_are_told(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    Path("more.jsonl").write_bytes(text.read_bytes())
    words = ["-o", "q", "--group-size", 32, *TEXT, "--calibration", f"{text}=0.5", "--calibration", "more.jsonl=0.3"]
    done = dsc("quantize", tiny_llama, *words)
    assert "  shares add up to 0.8, not 1; taken as text.jsonl 0.625, more.jsonl 0.375" in done.stderr.splitlines()


def test_a_value_that_was_not_set_before_is_said_in_words(dsc: Dsc, tiny_llama: Path, text: Path) -> None:
    words = [tiny_llama, "-o", "q", "--group-size", 32, *TEXT, "--calibration", text]
    assert dsc("quantize", *words).exit_code == 0
    done = dsc("quantize", *words, "--seed", 7)
    assert done.stderr.splitlines() == [
        "error: q: made without recipe.seed, now 7; choose another -o, or remove that directory"
    ]


def test_numbers_of_a_table_are_never_broken_in_two(capsys: pytest.CaptureFixture[str]) -> None:
    headers = ["Size", "Exact match", "Of ref.", "KL", "Top-1", "Perplexity", "tok/s"]
    rows = [["a-student-sparse24-w4a8", "6.26 MB", "92.7 %", "100.0 %", "0.000162", "100.0 %", "1.006", "126"]]
    console.table("", ["model", *headers], rows, right=headers)
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1].split() == " ".join(rows[0]).split()
    assert [len(lines), max(map(len, lines)) <= 80] == [3, True]  # "Exact match" alone takes two lines

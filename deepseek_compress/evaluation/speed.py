"""Speed of models in their own runtimes, each in a quiet process of its own, in turns.

`python -m deepseek_compress.evaluation.speed TARGET PROMPT NEW` opens a target as `dsc generate` does, writes a line
that says so, and then, for each line that comes, one prompt and its answer, token by token: a line of JSON with the
seconds of the prompt and of each token, and CPU seconds. The processes take turns, so that what else the machine does
meets all of them alike; medians have bootstrap intervals over the rounds.

Left out: batches, and energy; CPU seconds a token stand for it.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from deepseek_compress.errors import DscError
from deepseek_compress.evaluation.statistics import Interval
from deepseek_compress.processes import start_python

PROMPT, NEW, ROUNDS = 128, 32, 7  # tokens read, tokens written, turns of which the first does not count
PYTORCH = "PyTorch, weights unpacked to float32"


class Timed:
    """A process that has opened `target` and waits for its turn."""

    def __init__(self, name: str, target: str, prompt: int, new: int) -> None:
        self.name = name
        self._process = start_python("-m", __name__, target, str(prompt), str(new), stderr=-1, text=True)  # -1: a pipe
        self.about = self._line()

    def turn(self) -> dict[str, Any]:
        """One prompt and its answer. Raises `DscError` with the last line of a process that died."""
        _pipe(self._process.stdin).write("\n")
        _pipe(self._process.stdin).flush()
        return self._line()

    def close(self) -> None:
        """End the process."""
        _pipe(self._process.stdin).close()
        self._process.kill()
        self._process.wait()

    def _line(self) -> dict[str, Any]:
        line = _pipe(self._process.stdout).readline()
        if not line:
            said = _pipe(self._process.stderr).read().strip().splitlines() or ["it said nothing"]
            what = f"{self.name}: its speed could not be measured: {said[-1][:200]}"
            raise DscError(what, "free memory, or set efficiency: false")
        found: dict[str, Any] = json.loads(line)
        return found


def measure(
    targets: Mapping[str, str],
    prompt: int = PROMPT,
    new: int = NEW,
    rounds: int = ROUNDS,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, dict[str, Any]]:
    """Return the entry `speed` of each target's row, all of them in turns."""
    open_: list[Timed] = []
    turns: dict[str, list[dict[str, Any]]] = {name: [] for name in targets}
    try:
        for name, target in targets.items():
            open_.append(Timed(name, target, prompt, new))
        for number in range(rounds):
            for timed in open_ if number % 2 else reversed(open_):  # nobody is always the one after the slowest
                turns[timed.name].append(timed.turn())
            progress(number + 1, rounds)
        return {
            timed.name: summary(timed.about["runtime"], turns[timed.name][1:] or turns[timed.name]) for timed in open_
        }
    finally:
        for timed in open_:
            timed.close()


def summary(runtime: str, turns: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Medians over turns, with 95 % intervals; the slow token is the 95th percentile over all."""
    prefill = [turn["prompt"] / turn["prefill_s"] for turn in turns]
    decode = [len(turn["tokens_s"]) / sum(turn["tokens_s"]) for turn in turns]
    every = [seconds for turn in turns for seconds in turn["tokens_s"]]
    return {
        "runtime": runtime, "batch": 1, "prompt": turns[0]["prompt"], "new": len(turns[0]["tokens_s"]),
        "turns": len(turns),
        "prefill_tokens_per_s": statistics.median(prefill), "decode_tokens_per_s": statistics.median(decode),
        "intervals": {"prefill_tokens_per_s": _interval(prefill), "decode_tokens_per_s": _interval(decode)},
        "first_token_s": statistics.median(turn["prefill_s"] for turn in turns),
        "token_p95_s": float(np.quantile(every, 0.95)),
        "cpu_seconds_per_token": None if turns[0]["cpu_s"] is None
        else statistics.median(turn["cpu_s"] / (len(turn["tokens_s"]) + 1) for turn in turns),
        "peak_bytes": turns[-1]["peak_bytes"],
    }  # fmt: skip


def _interval(values: Sequence[float]) -> Interval | None:
    """Of the median, by the bootstrap."""
    if len(values) < 3:
        return None
    picked = np.random.default_rng(0).integers(0, len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(np.asarray(values)[picked], axis=1), [0.025, 0.975])
    return float(low), float(high)


def _pipe(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream


def _serve(target: str, prompt: int, new: int) -> None:
    """Run the process: open, then one answer a line."""
    from deepseek_compress.evaluation.efficiency import peak
    from deepseek_compress.generation.speaker import Local
    from deepseek_compress.generation.targets import open_target

    speaker = open_target(target)
    if not isinstance(speaker, Local):
        raise DscError(f"{target}: the speed of a server depends on who else asks it", "measure it with its own tool")
    backend = speaker.backend
    room = (backend.context or prompt + new) - new
    count = max(1, min(prompt, room))
    vocabulary = speaker.tokenizer.vocab_size
    ids = np.random.default_rng(0).integers(0, vocabulary, count).tolist()
    print(json.dumps({"runtime": PYTORCH if backend.name == "runtime" else backend.name}), flush=True)
    for _ in sys.stdin:
        backend.truncate(0)
        backend.prefill(ids[:1])  # what a new cache costs is no part of a token
        cpu, began = time.process_time(), time.perf_counter()
        token = int(backend.prefill(ids).argmax())
        first = time.perf_counter()
        seconds = []
        for _ in range(new):
            before = time.perf_counter()
            token = int(backend.step(token).argmax())
            seconds.append(time.perf_counter() - before)
        turn = {
            "prompt": max(count - 1, 1),
            "prefill_s": first - began,
            "tokens_s": seconds,
            "cpu_s": time.process_time() - cpu,
        }
        print(json.dumps({**turn, "peak_bytes": peak()}), flush=True)


if __name__ == "__main__":
    try:
        _serve(str(Path(sys.argv[1])) if "://" not in sys.argv[1] else sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    except DscError as error:
        sys.exit(str(error))

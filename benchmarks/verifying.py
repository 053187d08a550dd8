"""What verifying costs: a data-free 4-bit run whose source is verified before it is read, and one with `--quick`.

    python -m benchmarks.verifying [--layers N] [--repeats N] [--scratch DIR]

A random checkpoint of DeepSeek-V2-Lite's shape (3 layers: 1.67 G parameters) goes through `dsc export --target bf16`
and so gets a manifest. Checked first: both commands write the same shards, and a flipped bit of the source is refused
without `--quick` and not seen with it, so that what is measured is verification. The runs take turns. CPU seconds of
the whole command, imports included, the least of the repeats, since other work on the machine only adds. `hashes`:
BLAKE3 of source and output alone, which is what all hashing of a run could cost. `again`: the finished command once
more. Bar: verifying takes at most 10 % more CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.common import Cost, measure, present
from benchmarks.data_free import DSC, OURS, PYTHON, run, settle, warm
from benchmarks.make_checkpoint import make

BAR = 1.10
COLUMNS = ("what", "wall s", "CPU s", "CPU s, all repeats", "of --quick")
HASHES = "import sys; from pathlib import Path; from deepseek_compress.checkpoint.files import hash_file\n"
HASHES += "for name in sys.argv[1:]: [hash_file(file) for file in sorted(Path(name).glob('*.safetensors'))]"
WAYS = {"verified": [], "--quick": ["--quick"]}


def command(source: Path, out: Path, way: str) -> list[str]:
    return [DSC, "quantize", str(source), "-o", str(out), "-r", "w4a16-fast", *WAYS[way]]


def hashes_of(directory: Path) -> dict[str, str]:
    files = json.loads((directory / "dsc_manifest.json").read_text())["files"]
    return {name: facts["blake3"] for name, facts in files.items() if name.endswith(".safetensors")}


def check(source: Path, scratch: Path) -> None:
    """The same bytes both ways; a flipped bit is refused by one, and read by the other."""
    written = {}
    for way in WAYS:
        run(command(source, scratch / "out", way))
        written[way] = hashes_of(scratch / "out")
        settle(scratch / "out")
    assert written["verified"] == written["--quick"], "verification changes the output"
    shard = max(source.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    flip(shard)
    for way, code in {"verified": 1, "--quick": 0}.items():
        found = measure(command(source, scratch / "out", way))
        assert found.returncode == code, (way, found.output[-500:])
        assert code == 0 or shard.name in found.output, found.output[-500:]
        settle(scratch / "out")
    flip(shard)


def flip(file: Path) -> None:
    """One bit of the last tensor's."""
    with file.open("r+b") as opened:
        opened.seek(-1000, os.SEEK_END)
        byte = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([byte ^ 1]))


def measured(source: Path, out: Path, repeats: int) -> dict[str, list[Cost]]:
    """Costs of each way, in turns; of the hashes alone, and of the imports."""
    found: dict[str, list[Cost]] = {way: [] for way in (*WAYS, "again", "again --quick", "hashes", "imports")}
    for _ in range(repeats):
        for way in WAYS:
            settle(out)
            found[way].append(run(command(source, out, way)))
        for way, more in {"again": "verified", "again --quick": "--quick"}.items():  # which is finished already
            found[way].append(run(command(source, out, more)))
        found["hashes"].append(run([PYTHON, "-c", HASHES, str(source), str(out)]))
        found["imports"].append(run([PYTHON, "-c", OURS]))
    settle(out)
    return found


def main() -> None:
    """Check, measure, table and record."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=None)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as name:
        scratch = Path(name)
        facts: dict[str, Any] = make(scratch / "made", "bf16", options.layers)
        run([DSC, "export", str(scratch / "made"), "-o", str(scratch / "source"), "--target", "bf16"])
        shutil.rmtree(scratch / "made")
        for file in (scratch / "source").glob("*.safetensors"):
            warm(file)
        check(scratch / "source", scratch)
        load = os.getloadavg()[0]
        found = measured(scratch / "source", scratch / "out", options.repeats)
    least = {way: min(costs, key=lambda cost: cost.cpu_s) for way, costs in found.items()}
    base = least["--quick"].cpu_s
    table = [
        [way, cost.wall_s, cost.cpu_s, " ".join(f"{each.cpu_s:.2f}" for each in found[way]), cost.cpu_s / base]
        for way, cost in least.items()
    ]
    more = least["verified"].cpu_s / base
    facts |= {"layers": options.layers, "load": round(load, 2), "verified / --quick": round(more, 3)}
    present("verifying", COLUMNS, table, {**facts, "bar": {f"at most {BAR:g}": more <= BAR}})


if __name__ == "__main__":
    main()

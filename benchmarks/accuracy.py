"""Accuracy against cost at 4 bits: dsc beside llm-compressor, auto-round, GPTQModel, HQQ and ModelOpt.

    python -m benchmarks.accuracy [--cases moe smollm2 nano nano-plain] [--only PATTERN ...] [--reuse] [--scratch DIR]

W4A16, asymmetric, groups of 32 (`moe`) or 64; the same calibration tokens for everybody, each rival in its own
environment; one OpenMP thread; CPU seconds, wall seconds and memory of the whole command from start to saved
checkpoint, imports included. Every result is decoded by its maker's code to float32 weights and judged by one evaluator
on two texts that nobody calibrated on, one of the same kind and one of another: KL to the original, perplexity,
agreement on the likeliest token. `--use tuning` takes other windows of the same texts, which a method may be tuned on.
Embedding and head stay as they are on all sides, and count as 16 bits whatever a loader made of them. Each decoded
weight is checked: how many values a group has, and whether zero is one of the steps.

A row is kept, as soon as it is measured, with everything that decided it; `--reuse` takes it from there when nothing of
that has changed. Ratios of two rows have 95 % intervals by the paired bootstrap over windows. Bars, on both texts: the
default recipe reaches 0.85 of the best peer GPTQ's KL (0.8 on `smollm2`) in at most 0.6 of its CPU seconds, the best
recipe 0.65 of the best peer's KL in at most that peer's. It has 8 bits in some linears: so has one row of a peer.
"""

from __future__ import annotations

import argparse
import atexit
import functools
import hashlib
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.cases import DSC, NAMES, USES, Case, case
from benchmarks.common import REPORTS, ROOT, measure, present
from benchmarks.peers import RIVALS, PeerError, cache, fingerprint, peer, pins
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.evaluation.divergence import Sample, record
from deepseek_compress.evaluation.divergence import measure as divergence
from deepseek_compress.evaluation.statistics import Bootstrap
from deepseek_compress.evaluation.trace import Trace
from deepseek_compress.models.runtime import Model

DISK = 6 << 30  # bytes that must be free: checkpoints of one row, packed and decoded, with room
DEFAULT_BAR, DEFAULT_SHARE, BEST_BAR, BEST_SHARE = {"smollm2": 0.8}, 0.6, 0.65, 1.0
PACKAGES = {
    "llmcompressor": "llmcompressor",
    "autoround": "auto-round",
    "gptqmodel": "GPTQModel",
    "hqq": "hqq",
    "modelopt": "nvidia-modelopt",
}
WARM_UP = {"gptqmodel": "from gptqmodel import extension; extension.load('pack_block_cpu')"}  # compiled once, not timed
COLUMNS = (
    "model", "method", "version", "samples", "KL like", "KL other", "perplexity", "top-1", "CPU s", "wall s",
    "peak GB", "MB on disk", "values a group", "whole zero points", "load", "measured", "note",
)  # fmt: skip


class Row(NamedTuple):
    """A way to make 4-bit weights: the tool, what its script (or dsc's -r) is told, and what kind of method it is."""

    label: str
    tool: str
    method: str
    kind: str = ""
    share: float = 1.0  # of the calibration text
    note: str = ""


ROWS = (
    Row("dsc w4a16-fast", "dsc", "w4a16-fast", share=0),
    Row("dsc w4a16", "dsc", "w4a16", "default"),
    Row("dsc w4a16-best", "dsc", "w4a16-best", "best"),
    Row("dsc w4a16-best, four times the text", "dsc", "w4a16-best", share=4),
    Row("llm-compressor GPTQ", "llmcompressor", "gptq", "gptq"),
    Row("llm-compressor GPTQ, mse", "llmcompressor", "gptq-mse", "gptq"),
    Row("llm-compressor GPTQ, mse, 8 bits as w4a16-best", "llmcompressor", "gptq-mse-8", "same bits"),
    Row("llm-compressor SmoothQuant, GPTQ, mse", "llmcompressor", "smooth-gptq-mse", "gptq"),
    Row("llm-compressor AWQ, a quarter of the text", "llmcompressor", "awq", share=0.25),  # all takes it 50 minutes
    Row("GPTQModel GPTQ, mse, act group aware", "gptqmodel", "gptq", "gptq"),
    Row("HQQ", "hqq", "hqq", share=0),
    Row("ModelOpt AWQ", "modelopt", "awq", note="symmetric; scales of inputs kept apart, so not one grid a group"),
    Row("auto-round, 50 iterations", "autoround", "50"),
)


@functools.cache
def version(tool: str) -> str:
    """Of a rival's package; of ours, what its sources and recipes hash to."""
    if tool != "dsc":
        return pins(tool)[PACKAGES[tool]]
    digest = hashlib.sha256()
    for folder in ("deepseek_compress", "cuda_ops", "recipes"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".cpp", ".h", ".yaml"):
                digest.update(file.read_bytes())
    return digest.hexdigest()[:8]


def keep(row: Row, case: Case, use: str) -> Path:
    """Where a row's result is kept, named by everything that decided it."""
    decided = [version("dsc") if row.tool == "dsc" else fingerprint(row.tool), row.method, str(row.share), use]
    files = [case.ids(case.samples), *case.texts.values(), *sorted(case.model.glob("*.safetensors"))]
    if row.tool != "dsc":
        files += [RIVALS / "plain.py", RIVALS / f"by_{row.tool}.py"]
    digest = hashlib.sha256("\n".join(decided).encode())
    for file in files:
        digest.update(file.read_bytes())
    return cache() / "accuracy" / "rows" / f"{case.name}-{row.tool}-{row.method}-{digest.hexdigest()[:12]}.json"


def run(row: Row, case: Case, use: str, work: Path) -> dict[str, Any]:
    """Quantise, decode, check, judge; a side that fails is a result with the reason and keeps its files in `work`."""
    result: dict[str, Any] = {"measured": time.strftime("%Y-%m-%d %H:%M"), "load": round(os.getloadavg()[0], 1)}
    out, plain, log = work / "out", work / "plain", work / "log"
    timed = work / "timed.json"
    if not timed.exists():
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        try:
            if row.tool in WARM_UP:
                measure([str(peer(row.tool)), "-c", WARM_UP[row.tool]])
            settings = {"DSC_GROUP": str(case.group), "PYTHONPATH": str(ROOT) if row.tool == "dsc" else ""}
            cost = measure(command(row, case, out), settings)
        except PeerError as error:
            return {**result, "note": str(error).splitlines()[0]}
        log.write_text(cost.output)
        result |= {"CPU s": round(cost.cpu_s, 1), "wall s": round(cost.wall_s, 1)}
        result["peak GB"] = round(cost.peak_bytes / 1e9, 2)
        if cost.returncode:
            return {**result, "note": f"failed: {last_line(cost.output)}"}
        result["MB on disk"] = round(sum(map(size, out.rglob("*"))) / 1e6, 2)
        timed.write_text(json.dumps(result))
    result = json.loads(timed.read_text())
    if row.tool == "dsc":
        plain = out
    else:
        python, script = str(peer(row.tool)), str(RIVALS / f"by_{row.tool}.py")
        settings = {"DSC_GROUP": str(case.group), "PYTHONPATH": ""}
        decoded = measure([python, script, "plain", str(case.model), str(out), str(plain)], settings)
        if decoded.returncode:
            log.write_text(decoded.output)
            return {**result, "note": f"its output could not be read: {last_line(decoded.output)}"}
    result |= {**structure(case, plain), **judge(plain, case, use)}
    shutil.rmtree(work)
    return result


def size(file: Path) -> int:
    """Bytes of the tensors in a file; float32 counts as 16 bits, which is what the original has."""
    if file.suffix == ".pt":
        return file.stat().st_size
    if file.suffix != ".safetensors":
        return 0
    with file.open("rb") as content:
        header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    tensors = [value for name, value in header.items() if name != "__metadata__"]
    return sum(
        2 * math.prod(t["shape"]) if t["dtype"] == "F32" else t["data_offsets"][1] - t["data_offsets"][0]
        for t in tensors
    )


def samples(row: Row, case: Case) -> int:
    """Windows of calibration text."""
    return round(row.share * case.samples)


def command(row: Row, case: Case, out: Path) -> list[str]:
    """What is timed."""
    count = samples(row, case)
    if row.tool == "dsc":
        text = ["--calibration", str(case.calibration), "--samples", str(count), "--length", str(case.length)]
        text = text if count else []
        size = ["--group-size", str(case.group)]
        return [*DSC, "quantize", str(case.model), "-o", str(out), "-r", row.method, *size, *text]
    script, ids = str(RIVALS / f"by_{row.tool}.py"), str(case.ids(count or case.samples))
    return [str(peer(row.tool)), script, "quantize", str(case.model), ids, str(out), row.method]


def last_line(output: str) -> str:
    """The reason a program gave: its last line that says something."""
    return next((line.strip()[:200] for line in reversed(output.splitlines()) if line.strip()), "no output")


def structure(case: Case, plain: Path, rows: int = 32) -> dict[str, Any]:
    """Are the decoded weights on 4-bit grids? Looks at the first rows of every weight that changed."""
    before, after = open_checkpoint(case.model), open_checkpoint(plain)
    most, whole, groups, left = 0, 0.0, 0, []
    for name, info in before.header.tensors.items():
        if len(info.shape) != 2 or name.startswith(("model.embed_tokens", "lm_head")) or name.endswith("gate.weight"):
            continue
        made = after.read(name)
        if torch.equal(made, before.read(name)):
            left.append(name)
            continue
        values = made[:rows].reshape(-1, case.group)
        most = max(most, *(len(group.unique()) for group in values))
        whole += sum(zero_is_a_step(group) for group in values)
        groups += len(values)
    note = f"{len(left)} of its linears left at 16 bits, e.g. {left[0]}" if left else ""
    return {
        "values a group": most,
        "whole zero points": round(whole / groups, 3) if groups else None,
        "note": note,
    }


def zero_is_a_step(group: torch.Tensor) -> bool:
    """Is 0 a whole number of steps away from the least value?"""
    values = group.double().unique()
    if len(values) < 3:
        return True
    gaps = values.diff()
    step = gaps[gaps > gaps.max() * 1e-3].min()
    span = (values[-1] - values[0]) / step
    step = (values[-1] - values[0]) / span.round()
    offset = values[0] / step
    return bool((offset - offset.round()).abs() < 0.02)


def original(case: Case, kind: str = "like", use: str = "judging") -> tuple[list[Sample], Trace]:
    """The judging windows of a text and what the original model says to them: run once for all rows."""
    return _original(case.name, kind, use)


@functools.cache
def _original(name: str, kind: str, use: str) -> tuple[list[Sample], Trace]:
    subject = case(name)
    windows = [Sample(tokens, 1) for tokens in subject.judging_windows(kind, use)]
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder)
    return windows, record(Model.load(subject.model), windows, folder)[0]


def judge(path: Path, case: Case, use: str) -> dict[str, Any]:
    """KL to the original on each text, a window at a time too, and the rest on the text of the same kind."""
    found: dict[str, Any] = {"windows": {}}
    model = Model.load(path)
    for kind in reversed(case.texts):  # perplexity and top-1 are those of the first
        seen = divergence(model, *original(case, kind, use))
        assert seen.kl is not None
        found[f"KL {kind}"] = float(f"{seen.kl_divergence:.4g}")
        found["windows"][kind] = [kl / tokens for kl, tokens in zip(seen.kl, seen.tokens, strict=True)]
        found |= {"perplexity": round(seen.perplexity, 3), "top-1": round(seen.top1_agreement or 0.0, 4)}
    return found


def line(row: Row, case: Case, result: dict[str, Any]) -> list[Any]:
    """A row of the table."""
    note = "; ".join(filter(None, (row.note, result.get("note"))))
    known = {"model": case.name, "method": row.label, "version": version(row.tool), "samples": samples(row, case)}
    return [{**result, **known, "note": note}.get(column) for column in COLUMNS]


def told(case: Case) -> str:
    """How a model was calibrated and judged."""
    return (
        f"{case.samples} x {case.length} tokens, the same for every side, groups of {case.group}; "
        f"judged on {case.windows} windows of each text"
    )


def bars(name: str, found: Sequence[tuple[Row, dict[str, Any]]]) -> dict[str, Any]:
    """How ours stands to the best peer GPTQ and the best peer on each text of a model."""
    judged = [(row, result) for row, result in found if "windows" in result]
    verdict: dict[str, Any] = {}
    for title, ours_kind, kinds, kl_bar, cpu_bar in (
        ("default", "default", ("gptq",), DEFAULT_BAR.get(name, 0.85), DEFAULT_SHARE),
        ("best", "best", ("gptq", ""), BEST_BAR, BEST_SHARE),
        ("best at the same bits", "best", ("same bits",), 1.0, 1.0),
    ):
        ours = next((result for row, result in judged if row.kind == ours_kind), None)
        theirs = [(row, result) for row, result in judged if row.tool != "dsc" and row.kind in kinds]
        if ours is None or not theirs:
            continue
        for text, own in ours["windows"].items():
            row, best = min(theirs, key=lambda pair: pair[1][f"KL {text}"])
            share, cost = sum(own) / sum(best["windows"][text]), ours["CPU s"] / best["CPU s"]
            verdict[f"{title}, {text}"] = {
                "against": row.label,
                "share_of_kl": round(share, 3),
                "interval": [round(end, 3) for end in Bootstrap(len(own)).ratio(own, best["windows"][text]) or ()],
                "bar_kl": kl_bar,
                "share_of_cpu": round(cost, 3),
                "bar_cpu": cpu_bar,
                "passed": bool(share <= kl_bar and cost <= cpu_bar),
            }
    return verdict


def picture(record: Mapping[str, Any], path: Path) -> None:
    """KL against CPU seconds, a panel a model, two side by side; lower left is better."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "accuracy"
    from matplotlib import pyplot

    rows = [dict(zip(record["columns"], values, strict=True)) for values in record["rows"]]
    rows = [row for row in rows if row.get("KL like") is not None]
    names = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = pyplot.subplots(-(-len(names) // 2), 2, figsize=(11, 4.2 * -(-len(names) // 2)), squeeze=False)
    for panel, name in zip(panels.flat, names, strict=False):
        _panel(panel, name, sorted((row for row in rows if row["model"] == name), key=lambda row: -row["KL like"]))
    for panel in list(panels.flat)[len(names) :]:
        panel.axis("off")
    figure.supxlabel("CPU seconds, imports included", fontsize=10)
    figure.supylabel("KL to the original on text of the same kind, nats a token", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panel(panel: Any, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Draw one model's methods, from the highest KL down."""
    from matplotlib.ticker import LogLocator, NullFormatter

    last = max(row["CPU s"] for row in rows)
    placed: list[tuple[float, float]] = []
    for row in rows:
        x, y = row["CPU s"], row["KL like"]
        crowd = sum(1 / 4 < x / a < 4 and y / b > 0.8 for a, b in placed)  # labels that would lie over this one
        placed.append((x, y))
        colour, left = ("#c0392b" if row["method"].startswith("dsc") else "#34495e"), x > last / 4
        panel.plot(x, y, "o", color=colour, markersize=7)
        panel.annotate(row["method"], (x, y), xytext=(-7 if left else 7, 4 - 11 * crowd), textcoords="offset points",
                       ha="right" if left else "left", fontsize=9, color=colour)  # fmt: skip
    panel.set(xscale="log", yscale="log", title=name)
    panel.margins(x=0.12, y=0.15)
    for axis in (panel.xaxis, panel.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.set_major_formatter(lambda value, _: f"{value:.4g}")
        axis.set_minor_formatter(NullFormatter())
    panel.grid(True, which="major", alpha=0.3)


def main() -> int:
    """Run the rows asked for, present all that are known, draw them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", nargs="*", default=list(NAMES))
    parser.add_argument("--use", choices=USES, default="judging", help="which windows; tuning ones decide on methods")
    parser.add_argument("--only", nargs="*", default=["*"], help="patterns of names; other rows come from before")
    parser.add_argument("--reuse", action="store_true", help="take rows measured before with the same versions")
    parser.add_argument("--scratch", type=Path, help="where checkpoints lie until they are judged")
    parser.add_argument("--picture", action="store_true", help="draw reports/accuracy.json anew; measure nothing")
    options = parser.parse_args()
    if options.picture:
        picture(json.loads((REPORTS / "accuracy.json").read_text()), REPORTS / "accuracy.svg")
        return 0
    if options.scratch is not None:
        options.scratch.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(options.scratch or cache()).free < DISK:
        raise SystemExit(f"less than {DISK >> 30} GiB free for checkpoints; name another folder with --scratch")
    work = options.scratch or cache() / "accuracy" / "work"
    torch.set_num_threads(1)
    found: dict[str, list[tuple[Row, dict[str, Any]]]] = {}
    lines, now = [], 0
    for name in options.cases:
        subject = case(name)
        for row in ROWS:
            kept = keep(row, subject, options.use)
            asked = any(fnmatch(row.label, pattern) for pattern in options.only)
            if kept.exists() and (options.reuse or not asked):
                result = json.loads(kept.read_text())
            elif asked:
                if not options.reuse:
                    shutil.rmtree(work / kept.stem, ignore_errors=True)
                result = run(row, subject, options.use, work / kept.stem)
                kept.parent.mkdir(parents=True, exist_ok=True)
                if "windows" in result:
                    kept.write_text(json.dumps(result))
                now += 1
                print(f"{name}, {row.label}: {line(row, subject, result)}", file=sys.stderr, flush=True)
            else:
                continue
            found.setdefault(name, []).append((row, result))
            lines.append(line(row, subject, result))
    verdicts = {name: bars(name, pairs) for name, pairs in found.items()}
    facts = {
        "calibration": {name: told(case(name)) for name in found},
        "judged_on": f"{options.use} windows, which no calibration and no training saw",
        "arithmetic": "every side computes in float32 with one thread and is decoded to float32",
        "rows_measured_in_this_run": f"{now} of {len(lines)}; the column `measured` says when each was",
        "bars": verdicts,
        "passed": all(verdict["passed"] for bar in verdicts.values() for verdict in bar.values()),
    }
    present("accuracy" if options.use == "judging" else "accuracy_tuning", COLUMNS, lines, facts)
    picture({"columns": COLUMNS, "rows": lines}, REPORTS / "accuracy.svg")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

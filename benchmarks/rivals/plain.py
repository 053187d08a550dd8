"""What every rival's script shares; it runs in the rival's environment and imports nothing of ours.

A script has two verbs. `quantize MODEL IDS OUT METHOD` is what gets timed: load, calibrate on the token ids of an .npy
file (samples, length), save as the rival saves. `plain MODEL OUT PLAIN` writes what the rival's file means as ordinary
float32 tensors under the names of MODEL, decoded by the rival's own code, so that one evaluator judges everybody.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

GROUP = int(os.environ.get("DSC_GROUP", "64"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def load(model: Path):  # a transformers model
    """The model in float32: on a processor without BF16 products the faster type, and the more accurate one."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def tokenizer(model: Path):  # a transformers tokenizer
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def ids(file: Path) -> Tensor:
    """int64 (samples, length): the same tokens for everybody."""
    return torch.from_numpy(np.load(file).astype(np.int64))


def tensors(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint as it is stored."""
    found = {}
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(shard, "pt") as content:
            found.update({name: content.get_tensor(name) for name in content.keys()})  # noqa: SIM118
    return found


def write(source: Path, weights: Mapping[str, Tensor], out: Path) -> None:
    """`weights` as a float32 checkpoint beside the config and tokenizer of `source`; refuses to leave one out."""
    original = tensors(source)
    missing = sorted(set(original) - set(weights))
    if missing:
        raise SystemExit(f"{len(missing)} tensors have no counterpart: {', '.join(missing[:4])}")
    wrong = [name for name in original if weights[name].shape != original[name].shape]
    if wrong:
        raise SystemExit(f"{wrong[0]}: {tuple(weights[wrong[0]].shape)} instead of {tuple(original[wrong[0]].shape)}")
    out.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if (
            file.is_file()
            and not file.name.startswith(("model", "dsc_"))
            and file.suffix in (".json", ".jinja", ".txt")
        ):
            shutil.copy(file, out / file.name)
    config = json.loads((source / "config.json").read_text())
    config.pop("quantization_config", None)
    for key in {"dtype", "torch_dtype"} & set(config):
        config[key] = "float32"
    (out / "config.json").write_text(json.dumps(config, indent=1))
    # clone: a tied or sliced tensor shares its storage, which the format refuses
    save_file({name: weights[name].float().contiguous().clone() for name in original}, out / "model.safetensors")


def main(
    quantize: Callable[[Path, Path, Path, str], None], plain: Callable[[Path, Path, Path], Mapping[str, Tensor]]
) -> None:
    """Do the verb of the command line."""
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    verb, *rest = sys.argv[1:]
    if verb == "quantize":
        model, file, out, method = rest
        quantize(Path(model), Path(file), Path(out), method)
    elif verb == "plain":
        model, quantized, out = map(Path, rest)
        write(model, plain(model, quantized, out), out)
    else:
        raise SystemExit(f"{verb}: neither quantize nor plain")

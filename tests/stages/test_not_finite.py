"""Weights that break the model's own computation: one line that names the linear, and nothing that loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from processes import OPTIONS, loads
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from deepseek_compress.cli import app
from deepseek_compress.compress.accumulate import Accumulator
from deepseek_compress.errors import DscError
from deepseek_compress.streaming.paired_forward import pairs

EXPERT = "model.layers.1.mlp.experts"


def damaged(model: Path, out: Path, name: str, value: float) -> Path:
    """A copy of `model` whose tensor `name` has one other value."""
    shutil.copytree(model, out)
    state = load_file(out / "model.safetensors")
    state[name].view(-1)[5] = value
    save_file(state, out / "model.safetensors", metadata={"format": "pt"})
    return out


def quantize(model: Path, out: Path, text: Path, *more: str) -> str:
    """The one line with which `dsc quantize` gives up."""
    command = ["quantize", str(model), "-o", str(out), *OPTIONS, "--calibration", str(text), "--workers", "1", *more]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 1
    assert not loads(out)
    (line,) = [line for line in shown.stderr.splitlines() if line.startswith("error: ")]
    return line


@pytest.mark.parametrize("recipe", ["w4a16", "w4a16-best", "sparse24-w4a16"])
@pytest.mark.parametrize(
    ("name", "told"),
    [
        (f"{EXPERT}.3.up_proj.weight", f"{EXPERT}.3.down_proj"),
        ("model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.o_proj"),
        ("model.layers.0.mlp.down_proj.weight", "model.layers.1.self_attn.q_proj"),
    ],
)
def test_one_weight_far_too_large(recipe: str, name: str, told: str, tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    model = damaged(tiny_v2, tmp_path / "model", name, 3e38)
    line = quantize(model, tmp_path / "out", text, "-r", recipe)
    assert line.startswith(f"error: {told}: NaN, infinite or too large inputs from batch 1 of 1 on; check the model")


def test_a_solver_that_fails_names_the_linear(
    tiny_v2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As statistics do that were saved before they were checked."""
    monkeypatch.setattr(Accumulator, "_mark", lambda self: None)
    model = damaged(tiny_v2, tmp_path / "model", f"{EXPERT}.3.up_proj.weight", 3e38)
    line = quantize(
        model, tmp_path / "out", text, "-r", "sparse24-w4a16", "--set", "min_tokens=1", "--set", "sparsity=sparsegpt"
    )
    assert line.startswith(f"error: {EXPERT}.3.down_proj: the Hessian is NaN or infinite in 1 of 64 columns; ")


def test_an_expert_that_few_tokens_reach(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    """Both where it is solved from its tokens and where it is solved without."""
    model = damaged(tiny_v2, tmp_path / "model", f"{EXPERT}.3.up_proj.weight", torch.inf)
    for samples in ("1", "16"):
        line = quantize(model, tmp_path / samples, text, "--samples", samples, "--length", "4")
        what = f"{EXPERT}.3.up_proj.weight: 1 of 8192 values are NaN or infinite"
        assert line == f"error: {what}; download the file again"


def test_a_norm_that_is_not_a_number(tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    name = "model.layers.1.post_attention_layernorm.weight"
    line = quantize(damaged(tiny_v2, tmp_path / "model", name, torch.nan), tmp_path / "out", text)
    assert line == f"error: {name}: 1 of 128 values are NaN or infinite; download the file again"


@pytest.mark.parametrize(
    ("needs", "value"),
    [(needs, value) for needs in ("hessian", "input_absmax", "input_absmean") for value in (torch.nan, torch.inf)]
    + [("hessian", -torch.inf), ("hessian", 3e38)],  # finite, but its square is not
)
def test_the_first_batch_is_named(needs: str, value: float) -> None:
    sums, batches = Accumulator({needs}), torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    batches[2, 3, 4] = batches[4, 5, 6] = value
    for batch in batches:
        sums.add(batch)
    with pytest.raises(DscError, match=r"^layer\.up_proj: .* from batch 3 of 5 on"):
        sums.statistics("layer.up_proj")


@pytest.mark.parametrize("stream", [False, True])
def test_the_original_model_counts_too(stream: bool) -> None:
    """In pairs, what only the original computes reaches the target of the solver alone."""
    batches = torch.ones(3, 4, 2, 16)
    added = batches.clone()
    (added if stream else batches)[1, 1, 1, 3] = torch.inf  # odd samples are the original's
    sums = Accumulator({"hessian", "cross_covariance"})
    for x, h in zip(batches, added, strict=True):
        split = pairs(4)
        sums.add(x, split._replace(stream=h) if stream else split)
    with pytest.raises(DscError, match="from batch 2 of 3 on"):
        sums.statistics("layer.up_proj")

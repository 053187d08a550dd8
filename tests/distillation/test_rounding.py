"""Training what is stored: the student begins as the packed model, ends as what is saved, and gains on the way."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation.rounding import SCALE, Straight
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.stages.distill import Distill

NAME = "w"


def test_it_begins_as_the_packed_weight_and_turns_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    original = torch.randn(16, 64, generator=generator)
    packed = Rtn(num_bits=3, group_size=32)(original + 0.1 * torch.randn(16, 64, generator=generator), Statistics())
    straight = Straight({NAME: packed})
    starts, scales = straight.starts({NAME: original}), straight.scales()
    assert torch.equal(straight.present(starts, scales)[NAME], packed.dequantize())
    assert torch.equal(straight.stored(NAME, starts[NAME], scales).codes, packed.codes)
    assert float((starts[NAME] - original).square().mean()) < float((packed.dequantize() - original).square().mean())
    weight, scale = starts[NAME].clone().requires_grad_(), scales[SCALE + NAME].clone().requires_grad_()
    optimizer = torch.optim.Adam([weight, scale])
    losses = []
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 100)
        loss = (straight.present({NAME: weight}, {SCALE + NAME: scale})[NAME] - original).square().mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.95 * losses[0]
    stored = straight.stored(NAME, weight.detach(), {SCALE + NAME: scale.detach()})
    seen = straight.present({NAME: weight.detach()}, {SCALE + NAME: scale.detach()})[NAME]
    assert torch.allclose(stored.dequantize(), seen, atol=1e-6)
    assert torch.equal(stored.scale, stored.scale.bfloat16().float())
    assert bool((stored.codes != packed.codes).any())
    assert int(stored.codes.max()) <= 7


def context(out: Path, original: Path, text: Path) -> Context:
    calibration = {"sources": [str(text)], "samples": 4, "length": 48}
    return Context(out.name, out, "stages: []\n", 0, calibration, outputs={"model": original}, tell=lambda line: None)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_packed_student_learns_and_is_saved_as_it_was_trained(
    sparse: bool, tiny_llama: Path, text: Path, tmp_path: Path
) -> None:
    knobs = {"weights": {"rtn": {"num_bits": 3, "group_size": 32}}, "activations": "dynamic"}
    knobs |= {"sparsity": "magnitude"} if sparse else {}
    made = build(Compress, knobs, "compress").run(
        open_checkpoint(tiny_llama), context(tmp_path / "w3", tiny_llama, text)
    )
    packed = open_checkpoint(made.path)
    more = {"steps": 8, "documents": 24, "batch_tokens": 300, "validation": 0.2, "learning_rate": 2e-3}
    stage = build(Distill, more, "distill")
    assert stage.problems(packed.header) == []
    output = stage.run(packed, context(tmp_path / "qat", tiny_llama, text))
    new = open_checkpoint(output.path)
    validation = output.facts["validation"]
    best = min(validation, key=lambda found: found["loss"])
    assert best["kl"] < 0.8 * validation[0]["kl"]
    assert new.activations == packed.activations
    assert new.config["quantization_config"] == packed.config["quantization_config"]
    turned = 0
    for name in packed.header.tensors:
        before, after = packed.read_quantized(name), new.read_quantized(name)
        assert (before is None) == (after is None), name
        if before is not None and after is not None:
            turned += int((before.codes != after.codes).sum())
            assert torch.equal(before.zero_point, after.zero_point)
            if sparse:
                zeros = after.dequantize().view(len(after.codes), -1, 4) == 0
                assert bool((zeros.sum(-1) >= 2).all())
    assert turned > 0
    # judged again from the disk, with its rounded inputs, it is what the training saw
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        wanted, first, last = (torch.log_softmax(Model.load(it)(tokens), -1) for it in (tiny_llama, packed, new))
    assert float((wanted.exp() * (wanted - last)).sum()) < float((wanted.exp() * (wanted - first)).sum())


def test_packed_weights_are_not_cut(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    stage = build(Compress, {"weights": {"rtn": {"num_bits": 4, "group_size": 32}}}, "compress")
    packed = open_checkpoint(stage.run(open_checkpoint(tiny_llama), context(tmp_path / "w4", tiny_llama, text)).path)
    found = build(Distill, {"keep": 0.5, "precision": "bfloat16"}, "distill").problems(packed.header)
    assert [str(problem) for problem in found] == [
        "distill: packed weights cannot be made fewer; cut before the model is quantised",
        "distill.precision: bfloat16 cannot hold what packed weights learn; set mixed",
    ]

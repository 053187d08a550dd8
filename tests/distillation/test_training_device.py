"""Training, recording, resuming and answering on a second device that computes as the CPU does: the same bytes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.distillation import resume as resuming
from deepseek_compress.distillation.trainer import State
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import efficiency
from deepseek_compress.generation.backends.runtime import RuntimeBackend
from deepseek_compress.models.runtime import Model
from deepseek_compress.registry import build
from deepseek_compress.stages import load
from deepseek_compress.stages.base import Context
from tests.models.conftest import tiny_v4, tiny_v32
from tests.streaming.test_device import FAMILIES, both, contents, context
from tests.strict_device import SYNCHRONIZED, strict_device

__all__ = ["tiny_v4", "tiny_v32"]

SHORT: dict[str, Any] = {"steps": 2, "documents": 8, "length": 32, "batch_tokens": 128, "validation": 0.2}
TRAININGS: dict[str, dict[str, Any]] = {
    "experts": {"experts": 4, "experts_by": "activation"},
    "layers": {"layers": 2, "layers_by": "loss", "accumulate": 2},
    "inside": {"loss": {"forward_kl": 0.5, "hidden_states": 0.2, "router": 0.1, "contrastive": 0.1}},
    "low": {"precision": "bfloat16", "optimizer": "adafactor", "loss": {"cross_entropy": 0.5, "reverse_kl": 0.5}},
    # not precision: mixed, for which the second device would need autocast's rules
    "checkpointed": {"checkpointing": True, "experts": 4, "experts_by": "frequency"},
}


def trained(knobs: dict[str, Any], source: Path, text: Path, out: Path, **outputs: Path) -> None:
    """Train on each device: every byte but the losses told in the manifest, which are the same to six digits.

    The rounding of a product depends on how its operands lie in memory, on processors without AVX-512.
    """
    both("distill", knobs, source, text, out, "dsc_manifest.json", **outputs)
    cpu, strict = (json.loads((out / name / "dsc_manifest.json").read_text()) for name in ("cpu", "strict"))
    assert {**cpu, "checksum": "", "facts": {}} == {**strict, "checksum": "", "facts": {}}
    assert alike(cpu["facts"], strict["facts"])


def alike(one: Any, other: Any) -> bool:
    """Whether two JSON values are the same, but for the last digits of numbers."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(alike(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(alike, one, other))
    if isinstance(one, float) and isinstance(other, float):
        return bool(one == pytest.approx(other, rel=1e-4, abs=1e-6))
    return bool(one == other)


LONG = [pytest.param(name, marks=pytest.mark.verify) for name in FAMILIES if name != "tiny_v3"]


@pytest.mark.parametrize("name", ["tiny_v3", *LONG])
def test_distill(name: str, text: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(name)
    trained(SHORT, source, text, tmp_path, model=source)


@pytest.mark.verify
@pytest.mark.parametrize("how", TRAININGS)
def test_ways_to_train(how: str, tiny_v2: Path, text: Path, tmp_path: Path) -> None:
    trained({**SHORT, **TRAININGS[how]}, tiny_v2, text, tmp_path, model=tiny_v2)


@pytest.mark.verify
def test_packed_weights_are_trained(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    knobs = {"weights": {"rtn": {"group_size": 32}}, "sparsity": "magnitude", "activations": "dynamic"}
    packed = build(load("compress"), knobs, "compress").run(
        open_checkpoint(tiny_llama), context(tmp_path / "packed", text, "cpu")
    )
    trained(SHORT, packed.path, text, tmp_path, model=tiny_llama)


OTHERS = [pytest.param(form, marks=pytest.mark.verify) for form in ("top_k", "exact")]


@pytest.mark.parametrize("form", ["sampled", *OTHERS])
def test_recorded_words(form: str, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    """What is recorded differs in nothing but the device that the recording names, and teaches there."""
    knobs, said = {"kept": {"form": form, "count": 12}, "documents": 8, "length": 32}, {}
    for device in ("cpu", "strict"):
        with strict_device():
            at = context(tmp_path / f"words-{device}", text, device)
            build(load("record"), knobs, "record").run(open_checkpoint(tiny_v3), at)
        said[device] = {name: body for name, body in contents(at.out).items() if name.endswith(".safetensors")}
    assert said["strict"] == said["cpu"]
    words = tmp_path / "words-cpu"
    trained({**SHORT, "teacher": "words"}, tiny_v3, text, tmp_path, words=words)


def test_a_training_resumes_on_its_device(
    tiny_qwen2: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resuming, "EVERY", 0.0)
    monkeypatch.setattr(resuming, "LARGEST_SHARE", 1e9)
    stage = build(load("distill"), {**SHORT, "steps": 4}, "distill")
    source, outputs = open_checkpoint(tiny_qwen2), {"model": tiny_qwen2}
    stage.run(source, context(tmp_path / "whole", text, "cpu", **outputs))
    save = resuming.Keeper.save

    def stop(self: resuming.Keeper, state: State) -> None:
        save(self, state)
        if state.step == 2:
            raise KeyboardInterrupt

    def on(device: str) -> Context:
        return context(tmp_path / "cut", text, device, **outputs)

    with strict_device():
        with monkeypatch.context() as patched:
            patched.setattr(resuming.Keeper, "save", stop)
            with pytest.raises(KeyboardInterrupt):
                stage.run(source, on("strict"))
        with pytest.raises(DscError, match="other device"):
            stage.run(source, on("cpu"))
        stage.run(source, on("strict"))
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_a_step_waits_a_stated_number_of_times(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """What was the loss of a part, is there a weight at all; all else a training waits for does not grow with steps."""
    waits = {}
    for steps in (2, 6):
        stage = build(load("distill"), {**SHORT, "steps": steps, "validation": 0, "documents": 12}, "distill")
        with strict_device() as counts:
            stage.run(open_checkpoint(tiny_llama), context(tmp_path / str(steps), text, "strict", model=tiny_llama))
        waits[steps] = counts["waits"]
    assert waits[6] - waits[2] <= 4 * 2


@pytest.mark.parametrize("name", FAMILIES)
def test_answers(name: str, request: pytest.FixtureRequest) -> None:
    path, prompts = request.getfixturevalue(name), [[5, 9, 33, 7, 12], [8, 40, 11]]
    want = Model.load(path).generate(prompts, 6, eos=())
    with strict_device():
        assert Model.load(path, device="strict").generate(prompts, 6, eos=()) == want
        backend = RuntimeBackend(path, device="strict")
        tokens = [int(backend.prefill(prompts[0]).argmax())]
        while len(tokens) < 6:
            tokens.append(int(backend.step(tokens[-1]).argmax()))
    assert tokens == want[0]


def test_the_clock_is_read_when_the_device_is_done(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficiency, "PATIENCE", 0.0)
    before = SYNCHRONIZED.total()
    with strict_device():
        found = efficiency.measure(tiny_llama, prompt=8, new=2, device="strict")
    assert found["decode_tokens_per_s"] > 0
    assert SYNCHRONIZED.total() - before == 3, "before the prompt, after it, after the last token"
    torch.get_device_module(torch.device("cpu")).synchronize()

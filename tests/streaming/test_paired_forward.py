"""The statistics of a paired job against both models run whole, and what the correction is for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deepseek_compress.calibration.tokens import calibration_tokens
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.models.moe import by_expert, route
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.models.weights import HookedWeights
from deepseek_compress.numerics.gptaq import Gptaq
from deepseek_compress.numerics.types import Quantized, Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.streaming.paired_forward import pairs_first
from deepseek_compress.tasks import mixture

SAMPLES, LENGTH = 6, 48


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("text") / "calibration.jsonl"
    problems = mixture(seed=3, count=60, split="calibration")
    file.write_text("".join(json.dumps({"text": f"{p.prompt} {p.solution}"}) + "\n" for p in problems))
    return file


def compress(source: Path, out: Path, text: Path, **weights: object) -> Path:
    knobs = {"num_bits": 3, "group_size": 32, "mse": False, **weights}
    stage = build(Compress, {"weights": {"gptaq": knobs}, "min_tokens": 1}, "compress")
    calibration = {"sources": [str(text)], "samples": SAMPLES, "length": LENGTH}
    return stage.run(open_checkpoint(source), Context(out.name, out, "stages: []\n", 0, calibration)).path


def inputs(path: Path, tokens: Tensor) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The input (tokens, columns) of every linear outside the routed experts, and the hidden states between blocks."""
    model, seen = Model.load(path), {}

    def watched(layer: int) -> HookedWeights:
        def look(name: str, x: Tensor) -> None:
            if ".experts." not in name:
                seen[f"{model.family.prefix(layer)}.{name}"] = x.flatten(0, -2).double()

        return HookedWeights(model.blocks[layer], look)

    model.blocks = [watched(layer) for layer in range(len(model.blocks))]
    with torch.no_grad():
        return seen, [state.flatten(0, -2).double() for state in model.hidden_states(tokens)]


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, Statistics]]:
    """Every weight that is solved from here on, with its statistics."""
    given: list[tuple[Tensor, Statistics]] = []
    plain = Gptaq.__call__

    def record(self: Gptaq, weight: Tensor, statistics: Statistics) -> Quantized:
        given.append((weight, statistics))
        return plain(self, weight, statistics)

    monkeypatch.setattr(Gptaq, "__call__", record)
    return given


@pytest.fixture
def pair(
    text: Path, tmp_path: Path, request: pytest.FixtureRequest, given: list[tuple[Tensor, Statistics]]
) -> tuple[Path, Path, Tensor]:
    """The model that a test names, what is made of it, and the tokens that this was calibrated on."""
    path: Path = request.getfixturevalue(request.param)
    tokens = calibration_tokens([text], load_tokenizer(path), SAMPLES, LENGTH)
    return path, compress(path, tmp_path / "out", text), tokens


@pytest.mark.parametrize("pair", ["tiny_llama", "tiny_qwen2", "tiny_v3_bf16"], indirect=True)
def test_statistics_are_those_of_both_models(
    pair: tuple[Path, Path, Tensor], given: list[tuple[Tensor, Statistics]]
) -> None:
    path, out, tokens = pair
    source = open_checkpoint(path)
    (theirs, before), (ours, after) = inputs(path, tokens), inputs(out, tokens)
    weights = {key: source.read(key + ".weight") for key in ours}
    checked = 0
    for weight, statistics in given:
        found = [key for key, other in weights.items() if other.shape == weight.shape and torch.equal(other, weight)]
        if not found:
            continue  # a routed expert
        key, x = found[0], ours[found[0]]
        assert statistics.hessian is not None
        assert statistics.cross_covariance is not None, key
        assert statistics.tokens == len(x)
        assert close(statistics.hessian, x.t() @ x)
        assert close(statistics.cross_covariance, (theirs[key] - x).t() @ x, x.t() @ x)
        half = statistics.half
        assert half is not None
        assert half.hessian is not None
        assert half.tokens == len(x) // 2
        own = x[: half.tokens]  # all samples are one batch here, whose first half it is
        assert close(half.hessian, own.t() @ own)
        assert half.cross_covariance is not None
        missing = (theirs[key] - x)[: half.tokens]
        assert close(half.cross_covariance, missing.t() @ own, own.t() @ own)
        if key.endswith("o_proj"):
            layer = int(key.split(".")[2])
            assert statistics.residual_covariance is not None
            assert close(statistics.residual_covariance, (before[layer] - after[layer]).t() @ x, before[layer].t() @ x)
        elif key.endswith("mlp.down_proj"):
            layer = int(key.split(".")[2])
            outputs = [inputs_[key] @ open_checkpoint(at).read(key + ".weight").double().t() for inputs_, at in
                       ((theirs, path), (ours, out))]  # fmt: skip
            stream = (before[layer + 1] - outputs[0]) - (after[layer + 1] - outputs[1])
            assert statistics.residual_covariance is not None
            assert close(statistics.residual_covariance, stream.t() @ x, before[layer].t() @ x)
        else:
            assert statistics.residual_covariance is None or "shared_experts.down_proj" in key
        checked += 1
    assert checked == len(weights)


@pytest.mark.parametrize("pair", ["tiny_v2", "tiny_v3_bf16"], indirect=True)
def test_an_expert_sees_its_tokens_beside_what_the_original_has_for_them(
    pair: tuple[Path, Path, Tensor], given: list[tuple[Tensor, Statistics]]
) -> None:
    path, out, tokens = pair
    original, changed = Model.load(path), Model.load(out)
    (theirs, _), (ours, _) = inputs(path, tokens), inputs(out, tokens)
    moe, elsewhere, checked = original.cfg.moe, 0, 0
    assert moe is not None
    for layer in filter(original.cfg.is_moe, range(original.cfg.num_hidden_layers)):
        prefix = f"model.layers.{layer}.mlp"
        x, x_original = (seen[f"{prefix}.shared_experts.gate_proj"] for seen in (ours, theirs))
        routes = [by_expert(route(moe, model.blocks[layer], its.float()), moe.experts) for model, its in
                  ((changed, x), (original, x_original))]  # fmt: skip
        for expert in range(moe.experts):
            mine, others = (places[expert] // moe.top_k for places in routes)
            elsewhere += len(set(mine.tolist()) - set(others.tolist()))
            both = x[mine], x_original[mine]
            name = f"{prefix}.experts.{expert}"
            inner = [
                torch.nn.functional.silu(its @ model.weights[f"{name}.gate_proj.weight"].double().t())
                * (its @ model.weights[f"{name}.up_proj.weight"].double().t())
                for model, its in zip((changed, original), both, strict=True)
            ]
            for linear, (before, wanted) in (("gate_proj", both), ("up_proj", both), ("down_proj", inner)):
                weight = original.weights[f"{name}.{linear}.weight"]
                for statistics in (its for other, its in given if torch.equal(other, weight)):
                    assert statistics.hessian is not None
                    assert statistics.cross_covariance is not None
                    assert statistics.tokens == len(mine)
                    assert close(statistics.hessian, before.t() @ before)
                    assert close(statistics.cross_covariance, (wanted - before).t() @ before, before.t() @ before)
                    checked += 1
    assert checked == 3 * sum(map(original.cfg.is_moe, range(original.cfg.num_hidden_layers))) * moe.experts
    assert elsewhere, "the case where the original sends a token elsewhere is among these"


def close(value: Tensor, wanted: Tensor, size: Tensor | None = None) -> bool:
    """Within the rounding of sums whose terms are of the size of `size`."""
    bound = 1e-4 * float((wanted if size is None else size).abs().max())
    return bool(((value.double() - wanted).abs() <= bound).all())


def test_correction_brings_the_outputs_closer(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    tokens = calibration_tokens([text], load_tokenizer(tiny_llama), SAMPLES, LENGTH)
    wanted = inputs(tiny_llama, tokens)[1][-1]
    errors = []
    for strength in (0.0, 1.0):
        out = compress(tiny_llama, tmp_path / f"strength-{strength}", text, strength=strength)
        errors.append(float((inputs(out, tokens)[1][-1] - wanted).square().sum()))
    assert errors[1] < 0.9 * errors[0]


@pytest.mark.parametrize(("pairs", "rows"), [(3, 4), (0, 4), (1, 6), (5, 2), (4, 8)])
def test_every_piece_of_an_expert_is_split_like_the_whole(pairs: int, rows: int) -> None:
    """Also pieces that lie wholly behind the pairs, as of an expert that one model's router sends far more."""
    count = 16
    for start in range(0, count, rows):
        places = range(start, min(start + rows, count))
        split = pairs_first(places, pairs)
        expected = [place - start for place in places if place < 2 * pairs and place % 2 == 0]
        assert split.ours.tolist() == expected
        assert sorted([*split.ours.tolist(), *split.theirs.tolist()]) == list(range(len(places)))
        assert split.partners.tolist() == [place - start for place in places if place < 2 * pairs and place % 2 == 1]

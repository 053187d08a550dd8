"""The built-in model as it is stored, its tokenizer, and its calibration set."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch

from deepseek_compress import resources, tasks
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.resolve import resolve_model
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.tasks.vocabulary import words


def test_stored_as_deepseek_publishes() -> None:
    checkpoint = open_checkpoint(resolve_model("builtin:nano"))
    family = family_of(checkpoint.config)
    assert family.problems(checkpoint.header) == []
    files = list(checkpoint.path.glob("*.safetensors"))
    assert len(files) > 1 and sum(file.stat().st_size for file in checkpoint.path.iterdir()) <= 16 * 2**20
    infos = checkpoint.header.tensors
    scales_elsewhere = 0
    for name, info in infos.items():
        projection = "_proj" in name
        assert info.encoding == ("fp8_block" if projection else "plain"), name
        if projection:
            places = [place.file for place in info.parts.values()]
            assert info.parts["weight_scale_inv"].dtype == torch.float32
            scales_elsewhere += places[0] != places[1]
    assert scales_elsewhere >= 1
    assert infos["model.layers.1.mlp.gate.e_score_correction_bias"].dtype == torch.float32
    ragged = infos["model.layers.0.self_attn.kv_a_proj_with_mqa.weight"]
    assert ragged.shape == (576, 256) and ragged.parts["weight_scale_inv"].shape == (5, 2)
    assert checkpoint.config["topk_method"] == "noaux_tc" and checkpoint.config["scoring_func"] == "sigmoid"


def test_one_word_one_token_and_back() -> None:
    tokenizer = load_tokenizer(resolve_model("builtin:nano"))
    assert tokenizer.vocab_size == len(words()) == 512 and tokenizer.eos_ids == (2,)
    for problem in tasks.mixture(2, 40, "test"):
        text = f"{problem.prompt} {problem.solution}"
        ids = tokenizer.encode(text, special=True)
        assert ids[0] == 1 and len(ids) == 1 + len(text.split())
        assert tokenizer.decode(ids) == text
    assert tokenizer.encode("anna zebra") == [words().index("anna"), 3]


def test_tokenizer_files_are_those_of_the_vocabulary(tmp_path: Path) -> None:
    tasks.write_tokenizer(tmp_path)
    for file in tmp_path.iterdir():
        assert file.read_bytes() == (resolve_model("builtin:nano") / file.name).read_bytes()


def test_it_solves_unseen_problems_of_every_family() -> None:
    model = Model.load(resolve_model("builtin:nano"))
    tokenizer = load_tokenizer(resolve_model("builtin:nano"))
    problems = [p for family in tasks.FAMILIES for p in tasks.generate(family, 9, 8, "test")]
    prompts = tokenizer.encode_many([problem.prompt for problem in problems], special=True)
    answers = model.generate(prompts, 80)
    right = [tasks.verify(p, tokenizer.decode(ids)).exact for p, ids in zip(problems, answers, strict=True)]
    assert sum(right) >= 24  # of 32; the figure of record, over 1,000, is in reports/LOG.md


def test_calibration_set_is_what_its_manifest_and_the_generator_say() -> None:
    folder = resources.data("calibration_data")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "reasoning.jsonl").read_bytes()
    facts = manifest["files"]["reasoning.jsonl"]
    assert len(content) == facts["bytes"] and hashlib.sha256(content).hexdigest() == facts["sha256"]
    lines = [json.loads(line) for line in content.splitlines()]
    assert len(lines) == manifest["problems"] == len({line["prompt"] for line in lines})
    assert {tasks.split_of(line["prompt"]) for line in lines} == {"calibration"}
    again = tasks.mixture(manifest["seed"], manifest["problems"], manifest["split"])
    assert [{"prompt": p.prompt, "completion": p.solution} for p in again] == lines

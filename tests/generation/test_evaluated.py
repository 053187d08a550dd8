"""Exported files as models of a report: the runtime's answers and distribution, their own speed, tampering named."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.checkpoint.verified import described
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import deployed, speed
from deepseek_compress.evaluation.answering import FromGraph, FromModel, Request
from deepseek_compress.evaluation.record import Settings, evaluate
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer

Exported = Callable[..., Path]


def test_a_graph_answers_a_padded_batch_as_the_runtime_does(tiny_llama: Path, exported: Exported) -> None:
    opened = deployed.open_file(str(exported(tiny_llama, "onnx")))
    tokenizer = load_tokenizer(tiny_llama)
    mine = FromModel(Model.load(tiny_llama), tokenizer)
    assert isinstance(opened.answerer, FromGraph)
    asked = [Request([3, 4, 5, 6, 7][: 2 + i], "", 9, None, Sampling()) for i in range(3)]
    assert opened.answerer(asked) == mine(asked)
    drawn = [one._replace(sampling=Sampling(temperature=0.8, seed=i)) for i, one in enumerate(asked)]
    assert opened.answerer(drawn) == mine(drawn)
    stopped = asked[0]._replace(stop=mine([asked[0]])[0].text.split()[1])
    assert opened.answerer([stopped])[0].tokens <= 3


def test_a_report_of_a_checkpoint_and_its_file(
    tiny_llama: Path, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 2)
    folder = exported(tiny_llama, "onnx")
    lines = [{"question": f"two {i} ?", "answer": str(i)} for i in range(3)]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    turns = {"prompt": 4, "prefill_s": 0.5, "tokens_s": [0.1, 0.2], "cpu_s": 0.3, "peak_bytes": 5}
    monkeypatch.setattr(speed, "measure", lambda targets, progress: {n: speed.summary("x", [turns]) for n in targets})
    settings = Settings(suite=str(tmp_path / "q.jsonl"), problems=None, max_new_tokens=4, deployed={"ort": str(folder)})
    record = evaluate({"base": tiny_llama}, "base", settings)
    base, file = record["models"]
    assert (file["name"], file["about"]) == ("ort", "runs in onnxruntime")
    assert file["bytes"] == sum(f.stat().st_size for f in folder.glob("model.onnx*"))
    assert abs(file["metrics"]["kl_divergence"]) < 1e-8
    assert file["metrics"]["perplexity"] == pytest.approx(base["metrics"]["perplexity"], rel=1e-4)
    assert file["metrics"]["top1_agreement"] == 1.0
    assert file["process"]["tokens"] == base["process"]["tokens"]
    assert (file["flips"]["lost"], file["certainty"]["p"]) == (0, 1.0)
    assert file["speed"]["decode_tokens_per_s"] == pytest.approx(2 / 0.3)
    assert record["suite"]["families"] == {"q": 3}


def test_a_tampered_file_is_named(tiny_llama: Path, exported: Exported, tmp_path: Path) -> None:
    source, folder = exported(tiny_llama, "onnx"), tmp_path / "copy"
    folder.mkdir()
    for file in source.iterdir():
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    names = [file.name for file in folder.iterdir()]
    write_sealed(
        folder / "dsc_manifest.json", {"schema": 1, "files": described(folder, names), "lineage": [{"stage": "export"}]}
    )
    assert deployed.open_file(str(folder)).lineage == ({"stage": "export"},)
    data = max(folder.glob("model.onnx*"), key=lambda file: file.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(DscError, match=rf"{data.name}: not the bytes that were written"):
        deployed.open_file(str(folder))


@pytest.mark.verify
def test_processes_take_turns(tiny_llama: Path, exported: Exported) -> None:
    targets = {"base": str(tiny_llama), "ort": str(exported(tiny_llama, "onnx"))}
    found = speed.measure(targets, prompt=8, new=4, rounds=3)
    assert [entry["runtime"] for entry in found.values()] == [speed.PYTORCH, "onnxruntime"]
    for entry in found.values():
        assert (entry["turns"], entry["new"], entry["prompt"]) == (2, 4, 7)
        assert entry["decode_tokens_per_s"] > 0
    with pytest.raises(DscError, match="its speed could not be measured"):
        speed.measure({"none": str(tiny_llama.parent / "nothing-there")}, rounds=1)

"""Recorded teachers: what is kept is what was said, resumed equals uninterrupted, damage is told, servers are asked."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.calibration.settings import Source
from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.distillation import record as recording
from deepseek_compress.distillation.cache import CachedTeacher, bytes_a_token, read_index
from deepseek_compress.distillation.documents import Document, batch_of, read_documents
from deepseek_compress.distillation.record import Kept, ModelSpeaker, ResidentInputs, Settings, record
from deepseek_compress.distillation.server import Server
from deepseek_compress.distillation.teachers import LiveTeacher
from deepseek_compress.errors import DscError
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.distill import Distill
from deepseek_compress.stages.record import Record
from deepseek_compress.streaming.loop import silent

TEMPERATURE = 2.0


@pytest.fixture
def documents(tiny_v3: Path, text: Path) -> list[Document]:
    return read_documents([Source(path=str(text))], load_tokenizer(tiny_v3), 512, 14)


def context(out: Path, text: Path, **outputs: Path) -> Context:
    return Context(out.name, out, "", 5, {"sources": [str(text)]}, outputs=outputs, tell=lambda line: None)


def record_into(
    folder: Path, model: Path, documents: list[Document], form: str, progress: Any = silent
) -> CachedTeacher:
    settings = Settings(form, 512 if form == "exact" else 12, TEMPERATURE, 512, 3)
    speaker = ModelSpeaker(ResidentInputs(Model.load(model)), settings)
    record(speaker, documents, settings, folder, {"tokenizer": "t"}, progress)
    return CachedTeacher(folder)


@pytest.mark.parametrize("form", ["exact", "top_k", "sampled"])
def test_a_cache_says_what_the_teacher_said(
    form: str, tiny_v3: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    cached = record_into(tmp_path / "cache", tiny_v3, documents, form)
    assert len(list((tmp_path / "cache").glob("teacher-*.safetensors"))) > 2
    assert cached.documents() == documents
    batch = batch_of(documents, [9, 0, 5], 1.0)  # of several shards, in any order
    wanted = LiveTeacher(Model.load(tiny_v3), 512, TEMPERATURE).said(batch).target(slice(3, 40)).log_probs
    found = cached.said(batch).target(slice(3, 40))
    if form == "exact":
        assert torch.allclose(found.log_probs, wanted, atol=0.01)
        return
    assert found.ids is not None
    assert torch.allclose(found.log_probs, wanted.gather(1, found.ids), rtol=2e-3, atol=1e-3)
    if form == "top_k":
        assert torch.allclose(found.log_probs, wanted.topk(12).values, rtol=2e-3, atol=1e-3)
        return
    assert found.certain is not None
    best = wanted.sort(descending=True).values
    for row, certain in enumerate(found.certain.tolist()):
        assert torch.allclose(found.log_probs[row, :certain], best[row, :certain], rtol=2e-3, atol=1e-3)


def test_large_vocabularies_keep_their_ids_and_the_default_its_size(tmp_path: Path) -> None:
    assert bytes_a_token(22, 129_280, "sampled") <= 120
    logits = torch.randn(40, 129_280, generator=torch.Generator().manual_seed(0))

    class Inputs:
        head = torch.eye(1)

        def batches(self, batches: Any) -> Iterator[torch.Tensor]:
            for batch in batches:
                yield torch.arange(len(batch.places))[:, None].float()

    settings = Kept().settings(129_280, 1.0, 0)
    speaker = ModelSpeaker(Inputs(), settings)
    speaker._words = lambda final, draws: recording.words.sampled(logits.log_softmax(-1), 22, draws)  # type: ignore[method-assign]
    text = [Document(list(range(100_000, 100_041)), 0)]
    record(speaker, text, settings, tmp_path, {"tokenizer": "t"}, silent)
    cached = CachedTeacher(tmp_path)
    found = cached.said(batch_of(text, [0], 1.0)).target(slice(None))
    assert found.ids is not None
    assert int(found.ids.max()) > 1 << 16
    assert torch.allclose(found.log_probs, logits.log_softmax(-1).gather(1, found.ids), rtol=1e-3)
    assert cached.documents() == text


def test_a_recording_goes_on_and_is_refused_for_another(
    tiny_v3: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    record_into(tmp_path / "whole", tiny_v3, documents, "sampled")

    def stop(done: int, total: int, note: str) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_into(tmp_path / "halves", tiny_v3, documents, "sampled", stop)
    with pytest.raises(DscError, match="no finished recording of a teacher; run the recording to its end"):
        CachedTeacher(tmp_path / "halves")
    with pytest.raises(DscError, match="a recording with other form"):
        record_into(tmp_path / "halves", tiny_v3, documents, "top_k")
    record_into(tmp_path / "halves", tiny_v3, documents, "sampled")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "halves" / file.name).read_bytes() == file.read_bytes(), file.name
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(DscError, match="exists and is not a recording"):
        record_into(tmp_path / "other", tiny_v3, documents, "sampled")


def test_a_damaged_shard_is_told(tiny_v3: Path, documents: list[Document], tmp_path: Path) -> None:
    record_into(tmp_path, tiny_v3, documents, "sampled")
    (shard,) = tmp_path.glob("teacher-*.safetensors")
    content = bytearray(shard.read_bytes())
    shard.write_bytes(content[:-10])
    with pytest.raises(DscError, match=r"teacher-00001\.safetensors: \d+ bytes, \d+ were written"):
        CachedTeacher(tmp_path)
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)
    with pytest.raises(DscError, match="not the bytes that were written"):
        CachedTeacher(tmp_path)
    shard.unlink()
    with pytest.raises(DscError, match="missing"):
        CachedTeacher(tmp_path)


@pytest.mark.parametrize("damaged", ["teacher-00001.safetensors", "teacher-00002.safetensors", "recording.json"])
def test_a_damaged_piece_of_an_interrupted_recording_is_made_again(
    damaged: str, tiny_v3: Path, documents: list[Document], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recording, "SHARD_TOKENS", 100)
    record_into(tmp_path / "whole", tiny_v3, documents, "sampled")

    def stop(done: int, total: int, note: str) -> None:
        if done > 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        record_into(tmp_path / "halves", tiny_v3, documents, "sampled", stop)
    file = tmp_path / "halves" / damaged
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)
    record_into(tmp_path / "halves", tiny_v3, documents, "sampled")
    for file in sorted((tmp_path / "whole").iterdir()):
        assert (tmp_path / "halves" / file.name).read_bytes() == file.read_bytes(), file.name


def test_an_index_that_is_not_what_was_written(tiny_v3: Path, documents: list[Document], tmp_path: Path) -> None:
    record_into(tmp_path, tiny_v3, documents, "sampled")
    index, file = read_index(tmp_path), tmp_path / "teacher.json"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"temperature": 2.0', b'"temperature": 3.0'))
    with pytest.raises(DscError, match=r"teacher\.json: not the bytes that were written"):
        CachedTeacher(tmp_path)
    for key, value in (("vocabulary", "x"), ("temperature", 0), ("shards", [{"file": "../x"}]), ("form", [])):
        write_sealed(file, {**index, key: value})
        with pytest.raises(DscError, match=rf"teacher\.json: {key}[.0-9a-z, ]*: not what dsc writes there"):
            CachedTeacher(tmp_path)


def test_a_student_learns_without_its_teacher(tiny_llama: Path, tiny_v3: Path, text: Path, tmp_path: Path) -> None:
    """Record, remove the teacher, train; and what does not belong together is refused."""
    teacher = shutil.copytree(tiny_llama, tmp_path / "teacher")
    said = build(Record, {"documents": 12}, "record").run(open_checkpoint(teacher), context(tmp_path / "said", text))
    assert said.facts["form"] == "exact"  # 512 tokens
    student = shutil.copytree(tiny_llama, tmp_path / "student")
    shutil.rmtree(teacher)
    knobs = {
        "teacher": "record",
        "layers": 1,
        "steps": 6,
        "batch_tokens": 300,
        "learning_rate": 1e-3,
        "validation": 0.2,
    }
    stage = build(Distill, knobs, "distill")
    made = context(tmp_path / "out", text, model=student, record=said.path)
    facts = stage.run(open_checkpoint(student), made).facts
    validation = facts["validation"]
    assert min(found["kl"] for found in validation) < 0.95 * validation[0]["kl"]
    assert Model.load(tmp_path / "out").cfg.num_hidden_layers == 1
    hot = stage.model_copy(update={"temperature": 4.0})
    with pytest.raises(DscError, match=r"recorded at temperature 1, distill\.temperature is 4"):
        hot.run(open_checkpoint(student), replace(made, out=tmp_path / "hot"))
    inside = build(Distill, {**knobs, "loss": "hidden_states"}, "distill")
    with pytest.raises(DscError, match="no hidden states"):
        inside.run(open_checkpoint(student), replace(made, out=tmp_path / "inside"))
    index = read_index(said.path)
    write_sealed(said.path / "teacher.json", {**index, "tokenizer": "another"})
    with pytest.raises(DscError, match=r"other tokenizers \(vocabularies of 512 and 512 tokens\)"):
        stage.run(open_checkpoint(student), replace(made, out=tmp_path / "tokens"))


def test_padded_vocabularies_of_one_tokenizer_work(tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    """The teacher has eight more rows in its head than the tokenizer has tokens."""
    from tests.conftest import LLAMA_CONFIG, finish_directory, published_state, write_shards

    padded = tmp_path / "padded"
    padded.mkdir()
    write_shards(padded, published_state({**LLAMA_CONFIG, "vocab_size": 520}, seed=4), shards=1)
    finish_directory(padded, {**LLAMA_CONFIG, "vocab_size": 520})
    knobs = {"teacher": "teacher", "steps": 2, "documents": 8, "batch_tokens": 200, "cache": str(tmp_path / "said")}
    for cache in (None, knobs["cache"]):
        stage = build(Distill, {**knobs, "cache": cache}, "distill")
        made = context(tmp_path / f"out-{cache is None}", text, model=tiny_llama, teacher=padded)
        output = stage.run(open_checkpoint(tiny_llama), made)
        assert Model.load(output.path).cfg.vocab_size == 512
        assert output.facts["trained_steps"] == 2


class Vllm(BaseHTTPRequestHandler):
    """What of vLLM's API is asked: models, and prompt_logprobs of completions."""

    model: Model

    def do_GET(self) -> None:
        self.answer({"data": [{"id": "tiny"}]})

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        ids, count = asked["prompt"], asked["prompt_logprobs"]
        if len(ids) > 400:
            self.send_error(400, "too long")
            return
        with torch.no_grad():
            said = torch.log_softmax(self.model(torch.tensor([ids]))[0], -1)
        places: list[Any] = [None]
        for row, following in zip(said[:-1], ids[1:], strict=True):
            best = {int(token): float(row[token]) for token in row.topk(count).indices}
            places.append(
                {str(token): {"logprob": value} for token, value in {**best, following: float(row[following])}.items()}
            )
        self.answer({"choices": [{"text": "", "prompt_logprobs": places}]})

    def answer(self, body: Any) -> None:
        data = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *words: Any) -> None:
        return None


@pytest.fixture
def server(tiny_llama: Path) -> Iterator[str]:
    handler = type("Handler", (Vllm,), {"model": Model.load(tiny_llama)})
    with HTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}/v1"
        running.shutdown()


def test_a_server_is_recorded(server: str, tiny_llama: Path, text: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    made = replace(context(tmp_path / "said", text), tell=lines.append)
    stage = build(Record, {"documents": 5, "server": server, "kept": {"count": 8}}, "record")
    stage.run(open_checkpoint(tiny_llama), made)
    assert "8 likeliest tokens have" in lines[0]
    assert "tiny's probability" in lines[0]
    cached = CachedTeacher(tmp_path / "said")
    batch = batch_of(cached.documents(), range(5), 1.0)
    found = cached.said(batch).target(slice(None))
    wanted = LiveTeacher(Model.load(tiny_llama), 512, 1.0).said(batch).target(slice(None)).log_probs.topk(8).values
    assert torch.allclose(found.log_probs, wanted, rtol=2e-3, atol=1e-3)


def test_what_a_server_cannot_give_is_told(server: str, text: Path, tiny_llama: Path) -> None:
    with pytest.raises(DscError, match=r"/completions: HTTP 400 .*too long"):
        Server(server, 4, 512).words([Document([1] * 401, 0)], 0)
    with pytest.raises(DscError, match=r"says token [0-9]+, the tokenizer here has 3"):
        Server(server, 4, 3).words([Document([1, 2, 3], 0)], 0)
    with pytest.raises(DscError, match="give the address of a running server"):
        Server("http://127.0.0.1:1/v1", 4, 512)
    header = open_checkpoint(tiny_llama).header
    wrong = build(Record, {"server": server, "temperature": 2, "kept": {"form": "sampled"}}, "record")
    assert [str(problem) for problem in wrong.problems(header)] == [
        "record.temperature: servers give temperature 1; leave it out",
        "record.kept.form: sampled, servers give top_k; leave it out",
    ]

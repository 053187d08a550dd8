"""What answers: each form of one model says the same, and what does not answer says so in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from deepseek_compress import limits
from deepseek_compress.checkpoint.files import write_sealed
from deepseek_compress.errors import DscError
from deepseek_compress.generation.backends import engine, llama_cpp
from deepseek_compress.generation.backends.genai import GenaiBackend, installed
from deepseek_compress.generation.backends.graph import GraphBackend
from deepseek_compress.generation.backends.onnx import OnnxRunner
from deepseek_compress.generation.backends.runtime import RuntimeBackend
from deepseek_compress.generation.sampling import Sampling
from deepseek_compress.generation.speaker import Local, published_sampling
from deepseek_compress.generation.targets import open_target
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import load_tokenizer

Exported = Callable[..., Path]
IDS = list(np.random.default_rng(0).integers(10, 500, 40))
FAMILIES = ("tiny_v3", "tiny_v2", "tiny_qwen2", "tiny_qwen3", "tiny_llama")


def greedy(backend: RuntimeBackend | GraphBackend, ids: list[int], count: int) -> list[int]:
    tokens = [int(backend.prefill(ids).argmax())]
    while len(tokens) < count:
        tokens.append(int(backend.step(tokens[-1]).argmax()))
    return tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_every_form_says_what_the_runtime_says(request: pytest.FixtureRequest, exported: Exported, family: str) -> None:
    source = request.getfixturevalue(family)
    ids = [int(token) for token in IDS]
    (want,) = Model.load(source).generate([ids], 24, eos=())
    assert greedy(RuntimeBackend(source), ids, 24) == want
    for target in ("onnx", "onnxruntime"):
        file = exported(source, target) / "model.onnx"
        assert greedy(GraphBackend(OnnxRunner(file), chunk=16), ids, 24) == want, target


@pytest.mark.parametrize("family", ["tiny_v2", "tiny_llama"])
def test_a_text_that_begins_like_the_last_one_gives_the_same(
    request: pytest.FixtureRequest, exported: Exported, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = request.getfixturevalue(family)
    ids = [int(token) for token in IDS]
    other = [*ids[:30], 7, 8, 9]
    for make in (
        lambda: RuntimeBackend(source),
        lambda: GraphBackend(OnnxRunner(exported(source, "onnxruntime") / "model.onnx")),
    ):
        backend = make()
        backend.prefill(ids)
        with monkeypatch.context() as patched:
            fed = Mock(side_effect=backend.feed)
            patched.setattr(backend, "feed", fed)
            again = backend.prefill(other)
        assert [len(call.args[0]) for call in fed.call_args_list] == [3], "what both begin with is in the cache"
        assert np.abs(again - make().prefill(other)).max() < 1e-5 * np.abs(again).max()
        assert np.allclose(backend.prefill(other), again, atol=1e-4)


def test_a_call_that_is_stopped_leaves_no_half_cache(tiny_llama: Path) -> None:
    backend, ids = RuntimeBackend(tiny_llama), [int(token) for token in IDS]
    want = backend.prefill(ids)
    feed = backend.feed

    def stopped(new: list[int]) -> np.ndarray:  # type: ignore[type-arg]
        feed(new[:2])
        raise KeyboardInterrupt

    backend.feed = stopped  # type: ignore[method-assign,assignment]
    with pytest.raises(KeyboardInterrupt):
        backend.prefill([*ids, 5, 6])
    backend.feed = feed  # type: ignore[method-assign]
    assert np.allclose(backend.prefill(ids), want, atol=1e-5)


def test_an_answer_ends_with_the_end_token_or_the_limit(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    speaker = open_target(str(tiny_llama))
    assert isinstance(speaker, Local)
    prompt = speaker.tokenizer.decode(IDS[:8])
    answer, pieces = speaker.reply(prompt, Sampling(), 6)
    text = "".join(piece.text for piece in pieces)
    assert (answer.stopped, answer.tokens) == ("length", 6)
    ids = speaker.tokenizer.encode(prompt, special=True)
    (want,) = speaker.backend.model.generate([ids], 6, eos=())  # type: ignore[attr-defined]
    assert text == speaker.tokenizer.decode(want, skip_special=False)
    monkeypatch.setitem(vars(speaker.tokenizer), "eos_ids", (want[3],))
    answer, pieces = speaker.reply(prompt, Sampling(), 6)
    assert "".join(piece.text for piece in pieces) == speaker.tokenizer.decode(want[: want.index(want[3])], False)
    assert (answer.stopped, answer.tokens) == ("end", want.index(want[3]) + 1)


def test_the_models_own_sampling(tiny_llama: Path, tmp_path: Path) -> None:
    assert published_sampling(load_tokenizer(tiny_llama)) == Sampling()
    (tmp_path / "tokenizer.json").write_bytes((tiny_llama / "tokenizer.json").read_bytes())
    settings = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": None}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings))
    assert published_sampling(load_tokenizer(tmp_path)) == Sampling(temperature=0.6, top_p=0.95)
    (tmp_path / "generation_config.json").write_text(json.dumps({**settings, "temperature": "hot"}))
    with pytest.raises(DscError, match=r"generation_config.json\.temperature"):
        published_sampling(load_tokenizer(tmp_path))


def test_prompts_that_cannot_be_answered(tiny_llama: Path, exported: Exported) -> None:
    for target in (tiny_llama, exported(tiny_llama, "onnxruntime")):
        speaker = open_target(str(target))
        with pytest.raises(DscError, match=r"the prompt has 301 tokens, .* holds 256 with the answer"):
            speaker.reply(speaker.tokenizer.decode([30] * 300), Sampling(), 5)  # type: ignore[attr-defined]
        with pytest.raises(DscError, match="the prompt is empty"):
            speaker.reply("  ", Sampling(), 5)
        nearly, limit = speaker.tokenizer.decode([30] * 250), 99  # type: ignore[attr-defined]
        answer, pieces = speaker.reply(nearly, Sampling(), limit)
        list(pieces)
        assert answer.prompt_tokens + answer.tokens <= 256


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "not finished after"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "refuses"),
    ],
)
def test_a_template_that_loops_or_refuses(
    talker: Path, template: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:

    monkeypatch.setattr(limits, "TEMPLATE_SECONDS", 0.2)
    (talker / "chat_template.jinja").write_text(template)
    speaker = open_target(str(talker))
    with pytest.raises(DscError, match=said) as caught:
        speaker.reply([{"role": "user", "content": "hi"}], Sampling(), 5)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "what", "fix"),
    [
        ([], "nothing here that answers", "give a checkpoint"),
        (["model.gguf"], "no GGUF file", "export it again"),
        (["model.onnx"], "no tokenizer.json", "export it again"),
    ],
)
def test_what_does_not_answer(tmp_path: Path, files: list[str], what: str, fix: str) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DscError) as caught:
        open_target(str(tmp_path))
    assert what in caught.value.what
    assert fix in caught.value.fix
    with pytest.raises(DscError, match="no such file"):
        open_target(str(tmp_path / "nowhere"))


def engine_folder(folder: Path, **knobs: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "model.engine").write_bytes(b"engine")
    write_sealed(folder / "dsc_manifest.json", {"knobs": {"target": "tensorrt-rtx", **knobs}})
    return folder


def test_an_engine_of_another_capability(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = engine_folder(tmp_path / "e", compute_capabilities=["sm89", "sm120"])
    problem = engine.unusable(folder, (9, 0))
    assert problem is not None
    assert "built for sm89, sm120, this GPU is sm90" in problem.what
    assert "compute_capabilities=[sm90]" in problem.fix
    monkeypatch.setitem(engine.MODULES, "tensorrt-rtx", "no_such_package")
    problem = engine.unusable(folder, (8, 9))
    assert problem is not None
    assert "pip install 'deepseek-compress[tensorrt-rtx]'" in problem.fix


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_the_graph_beside_an_engine_answers(tmp_path: Path, tiny_llama: Path, exported: Exported) -> None:
    folder = engine_folder(tmp_path / "e")
    with pytest.raises(DscError, match="needs an NVIDIA GPU"):
        open_target(str(folder))
    for file in exported(tiny_llama, "onnx").iterdir():
        (folder / file.name).symlink_to(file)
    speaker = open_target(str(folder))
    assert isinstance(speaker, Local)
    assert speaker.backend.name == "onnxruntime"
    assert "needs an NVIDIA GPU: the graph next to" in speaker.note
    with pytest.raises(DscError, match="needs an NVIDIA GPU"):
        open_target(str(folder / "model.engine"))


@pytest.mark.skipif(installed(), reason="onnxruntime-genai is here")
def test_a_genai_folder_without_its_package(tiny_llama: Path, exported: Exported) -> None:
    folder = exported(tiny_llama, "genai")
    speaker = open_target(str(folder))
    assert "onnxruntime-genai is not installed" in speaker.note
    with pytest.raises(DscError, match="onnxruntime-genai is not installed"):
        GenaiBackend(folder)


def test_a_gguf_file_without_llama_cpp_or_of_another_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF and then nothing that llama.cpp knows")
    if llama_cpp.installed():
        with pytest.raises(DscError, match=r"llama\.cpp cannot load it"):
            open_target(str(file))
    monkeypatch.setattr(llama_cpp, "PACKAGE", "no_such_package")
    with pytest.raises(DscError, match=r"is run by llama\.cpp, which is not installed") as caught:
        open_target(str(tmp_path))
    assert "pip install 'deepseek-compress[llama-cpp]'" in caught.value.fix
    assert f"llama-server -m {file}" in caught.value.fix

"""GGUF files read back by gguf's own reader and by transformers, value by value."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.checkpoint.files import read_sealed, write_sealed
from deepseek_compress.errors import DscError
from deepseek_compress.export.gguf import export_gguf
from deepseek_compress.export.gguf_blocks import PACKED, bound
from deepseek_compress.export.vocabulary import CUTS, DEEPSEEK, read_vocabulary
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.runtime import Model
from deepseek_compress.numerics import WEIGHTS
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.export import Export

from .conftest import Quantise

QWEN2, LLAMA3 = (next(rules[0] for rules, name in CUTS.items() if name == wanted) for wanted in ("qwen2", "llama-bpe"))


def write_bpe(folder: Path, rule: str = LLAMA3, first: str = "<s>") -> None:
    """A small byte-level BPE tokenizer: ids 0 to 2 are special, 3 is added and ordinary."""
    tokenizer = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(rule), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    text = ["the quick brown fox counts 12345 apples, the slow one doesn't"] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<pad>", first, "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.add_tokens(["<think>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>", "chat_template": "{{ messages }}"}))


def with_bpe(source: Path, out: Path, **config: Any) -> Checkpoint:
    """A copy of a checkpoint with a tokenizer that GGUF takes and keys of config.json changed."""
    shutil.copytree(source, out)
    write_bpe(out)
    path = out / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    manifest = out / "dsc_manifest.json"
    if manifest.is_file():  # it would tell of the files that changed
        write_sealed(manifest, {**read_sealed(manifest), "files": {}})
    return open_checkpoint(out)


def tensors(path: Path) -> dict[str, gguf.ReaderTensor]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}


def value(path: Path, key: str) -> Any:
    field = gguf.GGUFReader(path).fields.get(key)
    return None if field is None else field.contents()


@given(
    st.integers(0, 10_000), st.sampled_from([32, 64, 96]), st.sampled_from([3, 4, 8]), st.booleans(), st.floats(-8, 3)
)
def test_blocks_come_back_within_the_bound(seed: int, size: int, bits: int, symmetric: bool, power: float) -> None:
    kind = "Q8_0" if bits == 8 else "Q4_0" if bits == 4 and symmetric else "Q4_1"
    weight = 10.0**power * torch.randn(3, 2 * size, generator=torch.Generator().manual_seed(seed))
    knobs = {"num_bits": bits, "group_size": size, "symmetric": symmetric or bits == 8}
    found = WEIGHTS["rtn"](**knobs)(weight, Statistics())
    data = PACKED[kind](found)
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind])
    error = np.abs(back.astype(np.float64) - found.dequantize().double().numpy())
    assert (error <= bound(found).double().numpy() * (1 + 1e-5)).all()


@pytest.mark.parametrize("scheme", ["w4a16", "w8a8", None])
@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_every_tensor_is_ours(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str, scheme: str | None
) -> None:
    folder = request.getfixturevalue(family)
    source = with_bpe(quantised(folder, scheme) if scheme else folder, tmp_path / "in")
    facts = export_gguf(source, tmp_path / "model.gguf")
    cfg = family_of(source.config).parse(source.config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH[cfg.model_type.upper()], cfg.num_hidden_layers)
    stored = tensors(tmp_path / "model.gguf")
    for name in source.header.tensors:
        tensor = stored.pop(names.get_name(name, try_suffixes=(".weight", ".bias")))
        have = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        if cfg.model_type == "llama" and ("q_proj" in name or "k_proj" in name):
            heads = cfg.num_attention_heads if "q_proj" in name else cfg.num_key_value_heads
            have = have.view(heads, -1, 2, have.shape[1]).transpose(1, 2).reshape(have.shape)
        packed = source.read_quantized(name)
        if packed is None:
            assert torch.equal(have, source.read(name)), name
        else:
            assert ((have - source.read(name)).abs() <= bound(packed) * (1 + 1e-5)).all(), name
    assert set(stored) == ({"rope_freqs.weight"} if family == "tiny_llama" else set())
    assert facts["types"].get({"w4a16": "Q4_1", "w8a8": "Q8_0", None: "BF16"}[scheme])
    assert facts["bytes"] == (tmp_path / "model.gguf").stat().st_size


@pytest.mark.parametrize("family", ["tiny_llama", "tiny_qwen2", "tiny_qwen3"])
def test_transformers_computes_the_same(
    tmp_path: Path, request: pytest.FixtureRequest, quantised: Quantise, family: str
) -> None:
    """transformers knows neither llama3's divisors nor yarn in a GGUF file: here without scaling."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    packed = quantised(request.getfixturevalue(family), "w4a16")
    source = with_bpe(packed, tmp_path / "in", rope_scaling=None, rope_parameters=None)
    export_gguf(source, tmp_path / "model.gguf")
    path = str(tmp_path / "model.gguf")  # what from_pretrained(gguf_file=...) does, which wants accelerate besides
    config = load_gguf_checkpoint(path)["config"]
    config["head_dim"] = family_of(source.config).parse(source.config).head_dim  # Qwen3's is taken for 128
    other = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    state = load_gguf_checkpoint(path, return_tensors=True, model_to_load=other)["tensors"]
    missing, unexpected = other.eval().load_state_dict(state, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if family == "tiny_qwen2" else [], [])  # tied
    tokens = torch.randint(0, 300, (2, 40), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        have, want = other(tokens).logits, Model.load(source).forward(tokens)
    assert float((have - want).abs().max()) < 5e-3 * float(want.abs().max())


def test_what_llama_cpp_must_know(tmp_path: Path, tiny_llama: Path, quantised: Quantise) -> None:
    source = with_bpe(quantised(tiny_llama, "w4a16"), tmp_path / "in")
    path = tmp_path / "model.gguf"
    export_gguf(source, path)
    wanted = {
        "general.architecture": "llama", "general.file_type": 3, "llama.block_count": 2, "llama.context_length": 256,
        "llama.embedding_length": 128, "llama.feed_forward_length": 256, "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2, "llama.rope.dimension_count": 32, "llama.rope.freq_base": 500000.0,
        "llama.vocab_size": 512, "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": "{{ messages }}",
    }  # fmt: skip
    assert {key: value(path, key) for key in wanted} == wanted
    tokens, types = value(path, "tokenizer.ggml.tokens"), value(path, "tokenizer.ggml.token_type")
    fast = Tokenizer.from_file(str(source.path / "tokenizer.json"))
    assert len(tokens) == len(types) == 512
    assert all(tokens[index] == word for word, index in fast.get_vocab().items())
    assert (types[:3], types[fast.token_to_id("<think>")], types[-1]) == ([3, 3, 3], 4, 5)
    assert value(path, "tokenizer.ggml.merges")[0].count(" ") == 1
    divisors = tensors(path)["rope_freqs.weight"].data
    assert divisors[0] == 1.0  # short waves stay, long ones are stretched by the factor
    assert divisors[-1] == pytest.approx(8.0)
    assert (np.diff(divisors) >= -1e-6).all()


def test_the_cut_has_llama_cpps_name(tmp_path: Path) -> None:
    write_bpe(tmp_path, QWEN2)
    (tmp_path / "config.json").write_text('{"bos_token_id": 1}')
    assert read_vocabulary(tmp_path, 512).pre == "qwen2"
    write_bpe(tmp_path, QWEN2, DEEPSEEK)
    assert read_vocabulary(tmp_path, 512).pre == "deepseek-r1-qwen"
    write_bpe(tmp_path, QWEN2 + "|x")
    with pytest.raises(DscError, match="no known name"):
        read_vocabulary(tmp_path, 512)
    write_bpe(tmp_path)
    with pytest.raises(DscError, match="no row in an embedding of 100"):
        read_vocabulary(tmp_path, 100)


def test_the_first_token_is_the_tokenizers(tmp_path: Path) -> None:
    """config.json of R1-Distill-Qwen says 151643, which ends a text; its tokenizer adds 151646."""
    write_bpe(tmp_path)
    (tmp_path / "config.json").write_text('{"bos_token_id": 2, "eos_token_id": 2}')
    found = read_vocabulary(tmp_path, 512)
    assert (found.bos, found.adds_bos, found.eos) == (2, False, 2)
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": {"content": "<s>"}}')
    assert read_vocabulary(tmp_path, 512).bos == 1
    fast = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    fast.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").unlink()
    found = read_vocabulary(tmp_path, 512)
    assert (found.bos, found.adds_bos, found.template) == (1, True, None)


def test_the_target_and_what_it_refuses(
    tmp_path: Path, tiny_v3: Path, tiny_llama: Path, quantised: Quantise, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, told = Export.model_validate({"target": "gguf"}), list[str]()
    source = with_bpe(quantised(tiny_llama, "w8a8"), tmp_path / "in")
    monkeypatch.setattr(Checkpoint, "activations", property(lambda self: {"num_bits": 8}))  # its manifest is gone
    context = Context(name="export", out=tmp_path / "out", recipe_text="", seed=0, tell=told.append)
    assert not stage.problems(source.header)
    output = stage.run(source, context)
    assert (output.kind, output.path.name, output.facts["status"]) == ("artifact", "model.gguf", "read back")
    visible = sorted(file.name for file in output.path.parent.glob("[!.]*"))  # the pipeline forgets its notes
    assert visible == ["dsc_manifest.json", "model.gguf"]
    assert "8-bit activations" in told[0]

    sparse = {"model_type": "deepseek_v32", "index_n_heads": 2, "index_head_dim": 32, "index_topk": 8}
    header = open_checkpoint(tiny_v3).header
    (family,) = stage.problems(dataclasses.replace(header, config=header.config | sparse))
    assert "deepseek_v32" in family.what and "onnx" in family.fix
    broken = with_bpe(tiny_llama, tmp_path / "broken")
    write_bpe(broken.path, "x")
    (words,) = stage.problems(broken.header)
    assert "pre-tokenizer" in words.what
    with pytest.raises(DscError):
        export_gguf(broken, tmp_path / "broken.gguf")
    assert not list(tmp_path.glob("broken.gguf*"))
    lineage = [{"knobs": {"sparsity": {"magnitude": {}}}}]
    monkeypatch.setattr(Checkpoint, "manifest", property(lambda self: {"lineage": lineage}))
    with pytest.raises(DscError, match="2:4"):
        stage.run(source, context)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "deepseek-compress[gguf]" in stage.problems(source.header)[0].fix

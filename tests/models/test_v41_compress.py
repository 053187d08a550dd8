"""DeepSeek-V4.1 through the compress stage: what changes, what keeps its bytes, what the output says of itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from deepseek_compress.checkpoint import Checkpoint, open_checkpoint
from deepseek_compress.compress.job import rounded_rows
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import divergence, efficiency, streamed
from deepseek_compress.models import Architecture
from deepseek_compress.models.carried import carried
from deepseek_compress.models.config import Role
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.tokenizer import Tokenizer
from deepseek_compress.numerics.rtn import Rtn
from deepseek_compress.numerics.types import Statistics
from deepseek_compress.registry import build
from deepseek_compress.stages.base import Context
from deepseek_compress.stages.compress import Compress
from deepseek_compress.streaming.loop import Progress, silent
from deepseek_compress.tasks import mixture
from tests import v41
from tests.conftest import finish_directory

TABLES = ("layers.0.engram.embed.weight", "layers.1.engram.embed.weight")
TOKENS = torch.arange(4, 44)[None]
TABLED = [("rtn", False), ("rtn", True), pytest.param("gptq", False, marks=pytest.mark.verify)]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """As published, with drafts and images, and the tokenizer of the built-in tasks."""
    out = tmp_path_factory.mktemp("v41")
    given = v41.config(drafts=True, vision=True)
    finish_directory(out, given)
    given["text_config"]["engram_compressed_vocab_size"] = 512  # no two of its words differ in case alone
    return open_checkpoint(v41.write_published(out, given))


def compressed(
    source: Checkpoint, out: Path, told: list[str], workers: int = 1, progress: Progress = silent, **knobs: Any
) -> Checkpoint:
    text = out.parent / "text.txt"
    text.write_text("\n".join(f"{p.prompt} {p.solution}" for p in mixture(seed=4, count=30, split="calibration")))
    calibration = {"sources": [str(text)], "samples": 8, "length": 48}
    context = Context("out", out, "", 0, calibration=calibration, tell=told.append, workers=workers, progress=progress)
    stage = build(Compress, {"weights": {"rtn": {"group_size": 32}}, **knobs}, "compress")
    assert stage.problems(source.header) == []
    return open_checkpoint(stage.run(source, context).path)


def same_bytes(ours: Checkpoint, theirs: Checkpoint, name: str) -> bool:
    first, second = ours.read_raw(name), theirs.read_raw(name)
    assert first.keys() == second.keys()
    return all(torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8)) for key in first)


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_what_servers_read_as_published_keeps_its_bytes(method: str, source: Checkpoint, tmp_path: Path) -> None:
    told: list[str] = []
    done = compressed(source, tmp_path / "out", told, weights={method: {"group_size": 32}})
    architecture = Architecture.of(done)
    assert architecture.problems() == []
    for name, info in done.header.tensors.items():
        role = architecture.family.role(name)
        if role in (Role.MTP, Role.VISION) or name in TABLES:
            assert same_bytes(done, source, name), name
        elif role is Role.EXPERT:
            assert info.encoding == "mxfp4" and torch.equal(done.read(name), source.read(name))
        elif name.endswith(("wq_a.weight", "wq_b.weight", "wkv.weight", "wo_b.weight")) or "shared_experts" in name:
            kept = "indexer" in name or "compressor" in name or "engram" in name
            assert info.encoding == ("plain" if kept else "packed"), name
        else:
            assert torch.equal(done.read(name), source.read(name)), name
    quantization = done.config["quantization_config"]
    assert quantization["quant_method"] == "compressed-tensors"
    assert quantization["weight_block_size"] == [32, 32]  # of the tensors that keep their bytes
    assert any("mtp" in pattern for pattern in quantization["ignore"])
    assert "MTP block kept byte for byte" in told and "image encoder kept byte for byte" in told
    assert any(line.startswith("Engram tables kept byte for byte") for line in told)
    with torch.no_grad():
        ours, theirs = Model.load(done).forward(TOKENS), Model.load(source).forward(TOKENS)
    assert 0 < float((ours - theirs).square().mean() / theirs.var()) < 0.9


def test_drafts_and_images_are_dropped_and_the_config_says_so(source: Checkpoint, tmp_path: Path) -> None:
    told: list[str] = []
    done = compressed(source, tmp_path / "out", told, mtp="drop", vision="drop")
    assert not any(name.startswith(("mtp.", "vision.", "aligner.", "image_")) for name in done.header.tensors)
    text = done.config["text_config"]
    assert text["num_nextn_predict_layers"] == 0
    assert not any(key.startswith("dspark_") for key in text) and len(text["compress_ratios"]) == 6
    assert "vision_config" not in done.config
    assert Architecture.of(done).problems() == []
    assert "MTP block left out" in told and "image encoder left out" in told


@pytest.mark.parametrize(("method", "symmetric"), TABLED)
def test_tables_in_four_bits(
    method: str, symmetric: bool, source: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Piece by piece, the bits that rounding the whole table gives; its rows are then read one by one."""
    monkeypatch.setattr("deepseek_compress.compress.row_tables.PIECE", 32 * 64)
    engram = {"num_bits": 4, "group_size": 32, "symmetric": symmetric}
    done = compressed(source, tmp_path / "out", told := [], weights={method: {"group_size": 32}}, engram=engram)
    for name in TABLES:
        assert done.header.tensors[name].encoding == "packed"
        whole = Rtn(group_size=32, symmetric=symmetric)(source.read(name), Statistics()).dequantize()
        assert torch.equal(done.read(name), whole)
        places = torch.tensor([9, 0, 659, 9, 8, 7])
        assert torch.equal(done.read_rows(name, places), whole[places])
    before, after = (sum(model.header.tensors[name].bytes for name in TABLES) / 1e6 for model in (source, done))
    line = f"Engram tables in 4 bits: {before:,.2f} MB become {after:,.2f} MB; read by dsc, by no server yet"
    assert line in told
    assert done.manifest is not None
    facts = {fact["name"]: fact for fact in done.manifest["facts"]["tables"]}
    fact = facts[TABLES[0].removesuffix(".weight")]
    exact = source.read(TABLES[0])
    error = float((done.read(TABLES[0]) - exact).square().sum() / exact.square().sum())
    assert fact["weight_error"] == pytest.approx(error, rel=1e-4)  # a table this small is measured whole
    assert fact["bytes_after"] == done.header.tensors[TABLES[0]].bytes < fact["bytes_before"]
    assert not any("embed$" in pattern for pattern in done.config["quantization_config"]["ignore"])
    with torch.no_grad():
        assert bool(torch.isfinite(Model.load(done).forward(TOKENS)).all())


def test_calibration_meets_the_rows_of_the_output(source: Checkpoint, tmp_path: Path) -> None:
    """The block loop looks up rounded rows: the engram part of the finished model gives the same."""
    table, how = source.read(TABLES[0]), Rtn(group_size=32)
    whole = how(table, Statistics()).dequantize()
    places = torch.tensor([3, 3, 500])
    assert torch.equal(rounded_rows(lambda rows: table[rows], how, places), whole[places])
    assert rounded_rows(lambda rows: table[rows], how, places[:0]).shape == (0, 32)


@pytest.mark.verify
def test_experts_are_solved_on_request(source: Checkpoint, tmp_path: Path) -> None:
    done = compressed(source, tmp_path / "out", [], weights={"gptq": {"group_size": 32}}, requantize=True, min_tokens=1)
    name = "layers.2.ffn.experts.1.w2.weight"
    assert done.header.tensors[name].encoding == "packed"
    assert 0 < float((done.read(name) - source.read(name)).square().mean() / source.read(name).var()) < 0.1
    drafts = "mtp.0.ffn.experts.1.w2.weight"
    assert same_bytes(done, source, drafts)


@pytest.mark.verify
def test_two_workers_write_the_same(source: Checkpoint, tmp_path: Path) -> None:
    knobs = {"weights": {"gptq": {"group_size": 32}}, "engram": {"num_bits": 4}, "requantize": True, "min_tokens": 1}
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    one = compressed(source, tmp_path / "one" / "out", [], **knobs)
    two = compressed(source, tmp_path / "two" / "out", [], workers=2, **knobs)
    assert one.header.tensors.keys() == two.header.tensors.keys()
    assert all(same_bytes(one, two, name) for name in one.header.tensors)


def test_tables_of_models_that_have_none(tiny_v3: Path) -> None:
    found = build(Compress, {"engram": {"num_bits": 4}}, "compress").problems(open_checkpoint(tiny_v3).header)
    assert [str(line) for line in found] == ["engram: deepseek_v3 has no Engram tables; leave engram out"]


def test_groups_that_do_not_fit_rows(source: Checkpoint) -> None:
    found = build(Compress, {"engram": {"group_size": 64}}, "compress").problems(source.header)
    assert [str(line) for line in found] == [
        "engram: rows of 32 columns do not divide into groups of 64; set group_size: 32"
    ]


def test_a_tokenizer_that_folds_otherwise_is_refused_before_any_row_is_read(source: Checkpoint, tmp_path: Path) -> None:
    given = v41.config()
    path = v41.write_published(tmp_path, given)
    finish_directory(path, given)  # whose words fold to another number
    with pytest.raises(DscError, match=r"config\.json says engram_compressed_vocab_size 256"):
        Model.load(path).forward(TOKENS)
    assert Tokenizer(path).vocab_size == 512


@pytest.mark.verify
def test_how_far_the_choice_of_entries_moves(source: Checkpoint, tmp_path: Path) -> None:
    """By block, of the entries that the original's queries see, the share that the compressed model's see too: the same
    whether both run whole or block by block."""
    done = compressed(source, tmp_path / "out", [])
    samples = [divergence.Sample(((torch.arange(60) * 7 + 13 * i) % 500 + 4).tolist(), 1) for i in range(3)]
    (tmp_path / "trace").mkdir()
    trace, _ = divergence.record(Model.load(source), samples, tmp_path / "trace")
    found = divergence.measure(Model.load(done), samples, trace)
    assert found.choice_by_layer is not None
    assert [share is None for share in found.choice_by_layer] == [True, False, True, False, True, False]
    shares = [share for share in found.choice_by_layer if share is not None]
    assert all(0.3 < share < 1 for share in shares)
    with torch.no_grad():
        tokens, cfg = torch.tensor([sample.tokens for sample in samples]), Architecture.of(source).cfg
        states = [Model.load(model).hidden_states(tokens)[4] for model in (done, source)]
    same = total = 0
    for mine, other in zip(*(carried(cfg, state).chosen.flatten(0, 1) for state in states), strict=True):
        expected = {int(j) for j in other if j >= 0}
        same, total = same + len(expected & {int(j) for j in mine}), total + len(expected)
    assert found.choice_by_layer[3] == pytest.approx(same / total)
    subjects = {"original": streamed.Subject(source), "compressed": streamed.Subject(done)}
    block_by_block = streamed.measure(subjects, samples, tmp_path / "work", streamed.NO_LIMITS, silent)["compressed"]
    assert block_by_block.choice_by_layer == pytest.approx(found.choice_by_layer, abs=0.01)
    assert block_by_block.error_by_layer == pytest.approx(found.error_by_layer, rel=1e-3)


@pytest.mark.verify
@pytest.mark.parametrize("stop", [2, 5])
def test_a_stopped_run_goes_on_to_the_same_bytes(stop: int, source: Checkpoint, tmp_path: Path) -> None:
    knobs = {"weights": {"gptq": {"group_size": 32}}, "engram": {"num_bits": 4}}
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
    whole = compressed(source, tmp_path / "whole" / "out", [], **knobs)

    def stopping(done: int, total: int, note: str) -> None:
        if note == f"block {stop}":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(source, tmp_path / "cut" / "out", [], progress=stopping, **knobs)
    assert not (tmp_path / "cut" / "out" / "config.json").exists()
    resumed = compressed(source, tmp_path / "cut" / "out", [], **knobs)
    for file in sorted((tmp_path / "whole" / "out").iterdir()):
        if file.suffix == ".safetensors":
            assert (resumed.path / file.name).read_bytes() == file.read_bytes()
    assert resumed.manifest is not None and whole.manifest is not None
    assert resumed.manifest["facts"]["tables"] == whole.manifest["facts"]["tables"]


def test_a_table_with_a_value_that_is_none_is_refused(tmp_path: Path) -> None:
    given = v41.config(engram_compressed_vocab_size=512)
    state = v41.published(given)
    state[TABLES[1]].view(torch.uint8)[700, 3] = 0x7F
    source = open_checkpoint(finish_directory(v41.written(tmp_path / "in", given, state), given))
    with pytest.raises(DscError, match=r"layers\.1\.engram\.embed\.weight"):
        compressed(source, tmp_path / "out", [], engram={"num_bits": 4})
    assert not (tmp_path / "out" / "config.json").exists()


def test_its_speed_is_measured_without_a_cache(source: Checkpoint) -> None:
    found = efficiency.measure(source.path, prompt=8, new=2)
    assert found["prefill_tokens_per_s"] > 0 and found["decode_tokens_per_s"] > 0

"""DeepSeek-V4.1 against numbers that were computed elsewhere, and block by block against plain loops.

The golden logits are those of the published formulas in float64 with weights by a formula (`tests.v41`); printed with
five decimals, and reproduced by float32 activations to 4e-6.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.models import Architecture
from deepseek_compress.models.carried import carried
from deepseek_compress.models.runtime import Model
from deepseek_compress.models.token_map import token_map
from tests import v41
from tests.models.reference_v41 import Reference

P = torch.arange(97)
TOKENS = ((7 * P * P + 13 * P + 5) % 512)[None]
GOLDEN = {
    False: ({0: ([-.28353, -.71921, -.96133, -.35100], 346), 1: ([-.69700, -.29401, -1.10571, -1.17858], 130),
             48: ([-.34907, -.40012, -.44216, -.44938], 112), 96: ([.83693, 1.91075, .22213, -.50662], 352)},
            39722.127, [.63550, .97325, 1.13014, 1.35745, 1.51628, 1.63329]),
    True: ({0: ([-.13206, -.63643, -1.08919, -.34157], 346), 1: ([-.55414, -.30254, -1.32595, -1.12152], 130),
            48: ([-.04316, -.30113, -.90073, -.64251], 75), 96: ([.70301, 2.12231, .36037, -.19524], 352)},
           39694.659, [.63583, .97262, 1.12682, 1.35220, 1.51037, 1.62064]),
}  # fmt: skip
CHOSEN = {
    (1, 96): {1, 5, 6, 28, 31, 33, 37, 41}, (3, 96): {0, 5, 8, 9, 20, 38, 52, 72}, (5, 96): {4, 5, 6, 7, 9, 10, 11, 96},
    (1, 40): {1, 4, 6, 7, 8, 12, 16, 18}, (3, 40): {1, 10, 14, 20, 29, 32, 36, 38},
    (5, 40): {32, 33, 34, 35, 37, 38, 39, 40},
}  # fmt: skip


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = v41.write_plain(tmp_path_factory.mktemp("v41_plain"), v41.config())
    v41.write_paired_tokenizer(out)
    return out


def loaded(path: Path, dtype: torch.dtype, rounded: bool) -> Model:
    model = Model.load(path, dtype)
    assert model.cfg.entries is not None and model.cfg.entries.rounded  # part of the model, so on by default
    model.cfg = dataclasses.replace(model.cfg, entries=dataclasses.replace(model.cfg.entries, rounded=rounded))
    return model


def logits(model: Model, state: Tensor) -> Tensor:
    """In the model's own type."""
    return functional.linear(model.family.final_hidden(model.cfg, model.top, state), model.head)


def test_the_weights_are_those_of_the_golden_numbers() -> None:
    values = v41.values(v41.config())
    names = sorted(values)
    assert len(names) == 230
    probes = {0: [-.09228515625, -.055908203125, .162109375], 11: [-.375, -.25, -.40625], 229: [1.078125],
              131: [.0400390625, .059326171875, -.1259765625]}  # fmt: skip
    for k, expected in probes.items():
        assert values[names[k]].flatten()[: len(expected)].tolist() == expected
    assert values[names[2]][:3].tolist() == pytest.approx([0.88706475, 0.02046462, -0.48019093], abs=1e-8)


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 6e-6), (torch.float32, 9e-6)])
def test_golden_logits(plain: Path, dtype: torch.dtype, bound: float, rounded: bool) -> None:
    model, (rows, total, sizes) = loaded(plain, dtype, rounded), GOLDEN[rounded]
    with torch.no_grad():
        states = model.hidden_states(TOKENS)
        found = logits(model, states[-1])[0]
    assert found.dtype == dtype
    for place, (first, best) in rows.items():
        assert found[place, :4].tolist() == pytest.approx(first, abs=bound)
        assert int(found[place].argmax()) == best
    # In float32 a key halfway between two steps of its cache may fall either way, by processor: one did, by 0.024.
    most = 0.05 if rounded and dtype == torch.float32 else 0.01
    assert float(found.double().abs().sum()) == pytest.approx(total, abs=most)
    streams = [model.family.residual(model.cfg, state) for state in states[1:]]
    assert [float(s.square().mean().sqrt()) for s in streams] == pytest.approx(sizes, abs=1e-5)
    if not rounded:
        for (block, place), expected in CHOSEN.items():
            seen = carried(model.cfg, states[block + 1]).chosen[0, place].long().tolist()
            assert set(seen) == expected


@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("length", [1, 2, 21, 40])  # none or one entry; a last token without an entry; even
def test_each_block_is_that_of_the_plain_loops(plain: Path, length: int, rounded: bool) -> None:
    """Every kind of block: window alone, Full with two tokens an entry and with one, Reuse, Reindex; Engram."""
    model = loaded(plain, torch.float64, rounded)
    both = torch.stack((TOKENS[0, :length], TOKENS[0, 50 : 50 + length]))  # what is carried belongs to a text
    with torch.no_grad():
        states = model.hidden_states(both)
        final = logits(model, states[-1])
    given = v41.config()
    weights = {name: value.double().numpy() for name, value in v41.values(given).items()}
    reference = Reference(given["text_config"], weights, [index // 2 for index in range(512)], rounded)
    for row, text in enumerate(both.tolist()):
        handed = reference.begin(text)
        for block in range(6):
            handed = reference.block(block, handed, text)
            ours = carried(model.cfg, states[block + 1][row : row + 1])
            expected = torch.from_numpy(handed.streams).transpose(0, 1)
            torch.testing.assert_close(ours.streams[0], expected, rtol=0, atol=2e-5)  # angles are float32 there
            torch.testing.assert_close(ours.pre[0], torch.from_numpy(handed.pre).T, rtol=0, atol=2e-5)
            if handed.chosen:
                mine = [{int(j) for j in places if j >= 0} for places in ours.chosen[0]]
                assert mine == [set(places) for places in handed.chosen]
        torch.testing.assert_close(final[row], torch.from_numpy(reference.logits(handed)), rtol=0, atol=5e-5)


def test_streamed_blocks_read_rows_and_weights_as_they_are_used(plain: Path) -> None:
    """Tensors read at each access, Engram rows gathered from the file: the bits of the model in memory."""
    source = open_checkpoint(plain)
    architecture, model = Architecture.of(source), Model.load(source)
    assert not any(name.endswith("engram.embed.weight") for name in model.weights)
    with torch.no_grad():
        states = model.hidden_states(TOKENS)
        for block in architecture.blocks:
            found = block.run(block.weights(), states[block.layer], TOKENS)
            assert torch.equal(found, states[block.layer + 1])


def test_a_token_changes_nothing_before_it(plain: Path) -> None:
    model, other = Model.load(plain), TOKENS.clone()
    other[0, 60] = (other[0, 60] + 2) % 512
    with torch.no_grad():
        ours, theirs = model.hidden_states(TOKENS)[-1], model.hidden_states(other)[-1]
    torch.testing.assert_close(ours[:, :60], theirs[:, :60], rtol=0, atol=1e-5)
    assert (ours[:, 60:] - theirs[:, 60:]).abs().amax() > 0.1


def test_the_encodings_of_a_checkpoint_give_one_model(tmp_path: Path) -> None:
    """FP8 in blocks of 32 or 128 with FP4 experts, and the values that they hold in BF16."""
    for block in (32, 128):
        given = v41.config(block=block)
        path = v41.write_published(tmp_path / str(block), given)
        v41.write_paired_tokenizer(path)
        source = open_checkpoint(path)
        kinds = {info.encoding for info in source.header.tensors.values()}
        assert kinds == {"plain", "fp8_block", "mxfp4"}
        assert Architecture.of(source).problems() == []
        model = Model.load(source)
        values = {name: source.read(name) for name in source.header.tensors}
        same = Model(model.family, model.cfg, values)
        with torch.no_grad():
            assert torch.equal(model.forward(TOKENS), same.forward(TOKENS))
        expected = v41.values(given)
        for name, value in values.items():
            assert float((value - expected[name]).abs().max()) <= 0.26 * float(expected[name].abs().max()), name


def test_bf16_weights_run(plain: Path) -> None:
    found, exact = Model.load(plain, torch.bfloat16), Model.load(plain)
    with torch.no_grad():
        near, true = found.forward(TOKENS[:, :8]), exact.forward(TOKENS[:, :8])
    assert 0 < float((near - true).square().mean() / true.square().mean()) < 0.02


def test_folded_tokens_of_the_golden_tokenizer(plain: Path) -> None:
    assert token_map(plain, 256).tolist() == [index // 2 for index in range(512)]

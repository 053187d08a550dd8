"""The mechanisms of DeepSeek-V4.1 one by one, against numbers computed elsewhere from the published formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import v41_layout
from deepseek_compress.errors import DscError
from deepseek_compress.models import engram, hyper, round_trip, two_level
from deepseek_compress.models.config import HyperConnections
from deepseek_compress.models.families.table import family_of
from deepseek_compress.models.rope import frequencies
from deepseek_compress.models.token_map import token_map
from deepseek_compress.models.weights import ResidentWeights
from tests import v41

PUBLISHED = family_of(v41_layout.CONFIG).parse(v41_layout.CONFIG)
PRIMES = {
    0: [57, 79, 81, 97, 121, 129, 133, 183, 189, 207, 211, 253, 277, 289, 307,
        321, 339, 381, 393, 399, 403, 409, 447, 463],
    1: [477, 487, 499, 507, 511, 573, 609, 627, 667, 669, 693, 697, 711, 729, 759,
        769, 781, 799, 813, 819, 841, 877, 879, 889],
}  # fmt: skip
ROWS = {  # layer, place -> columns 0, 7, 8, 16, 23 and the sum of all 24, for folded ids [0, 5, 17, 99091, 40000]
    (1, 0): ([5702652, 121476532, 131476717, 257520185, 380066193], 4630246670),
    (1, 4): ([12815006, 126280314, 136913916, 267336773, 379440521], 4645209873),
    (14, 0): ([14361964, 120604547, 132225184, 261362261, 372375971], 4608340352),
    (14, 4): ([12734087, 122453822, 141649530, 264777700, 374831920], 4638060462),
}


def test_primes_and_rows_of_the_published_tables() -> None:
    assert PUBLISHED.engram is not None
    found = engram.primes(PUBLISHED.engram)
    assert [[prime - 16_000_000 for prime in column] for column in found] == [PRIMES[0], PRIMES[1]]
    assert tuple(map(sum, found)) == PUBLISHED.engram.rows == (384006168, 384016682)
    folded = torch.tensor([[0, 5, 17, 99091, 40000]])
    for (layer, place), (columns, total) in ROWS.items():
        rows = engram.hashed_rows(PUBLISHED.engram, layer, folded, pad=2)[0, place]
        assert rows[[0, 7, 8, 16, 23]].tolist() == columns
        assert int(rows.sum()) == total


def test_multipliers_are_those_the_generator_draws() -> None:
    for (layer, tokens), expected in engram.PUBLISHED.items():
        assert engram.drawn(layer, tokens, 4) == expected
    assert engram.multipliers(0, 256, 4) == (22948963341361471, 9720090748611819, 1476226777048821, 595470825660793)
    assert engram.multipliers(1, 256, 4) == (29662608052400909, 1873410163432121, 13919202536988139, 28638879857136817)


def test_rows_of_the_tiny_tables() -> None:
    given = v41.config()
    tiny = family_of(given).parse(given).engram
    assert tiny is not None
    folded = torch.tensor([[0, 5, 17, 255, 40]])
    expected = {
        (0, 0): [36, 166, 295, 378, 529, 600], (0, 4): [33, 141, 258, 344, 509, 542],
        (1, 0): [122, 192, 397, 432, 576, 836], (1, 4): [5, 207, 353, 464, 620, 728],
    }  # fmt: skip
    for (layer, place), rows in expected.items():
        assert engram.hashed_rows(tiny, layer, folded, pad=1)[0, place].tolist() == rows


def test_hyper_connections_of_golden_numbers() -> None:
    """m after its norm is given: fn is the identity on streams of unit mean square."""
    m = torch.tensor(
        [0.1 * i - 1.2 for i in range(8)] + [((7 * i) % 16) / 8 - 1 for i in range(16)], dtype=torch.float64
    )
    m[:8] = torch.tensor([0.1 * i - 1.2 for i in range(8)])
    streams = torch.ones(1, 1, 4, 6, dtype=torch.float64)
    fn = (m / 24)[:, None].expand(24, 24)
    weights = {"hc_fn": fn, "hc_base": torch.zeros(24), "hc_scale": torch.tensor([1.0, 0.5, 2.0])}
    mixed = hyper.mixing(HyperConnections(4, 20, 1e-6), ResidentWeights(weights), "hc", streams, 1e-20)
    assert mixed.pre[0, 0].tolist() == pytest.approx([0.231476, 0.249741, 0.268942, 0.289051], abs=1e-6)
    assert mixed.post[0, 0].tolist() == pytest.approx([0.802625, 0.826765, 0.851115, 0.875647], abs=1e-6)
    rows = [[0.040810, 0.130068, 0.699052, 0.130068], [0.699052, 0.040809, 0.219328, 0.040810],
            [0.130068, 0.414561, 0.040809, 0.414560], [0.130068, 0.414561, 0.040809, 0.414560]]  # fmt: skip
    for found, expected in zip(mixed.comb[0, 0].tolist(), rows, strict=True):
        assert found == pytest.approx(expected, abs=1.5e-6)
    assert mixed.comb[0, 0].sum(0).tolist() == pytest.approx([1.0] * 4, abs=1e-5)


def test_rounding_of_golden_numbers() -> None:
    x = torch.tensor([((11 * i) % 32 - 15.5) / 4 for i in range(32)], dtype=torch.float64)
    expected = {
        round_trip.fp8: [-4, -1.125, 1.625, -3.5, -0.875, 1.875, -3.5, -0.625],
        round_trip.fp4: [-4, -1, 1.5, -4, -1, 2, -3, -0.5],
        round_trip.fp4_e4m3: [-3.75, -1.25, 1.875, -3.75, -0.9375, 1.875, -3.75, -0.625],
    }
    for rounding, values in expected.items():
        for dtype in (torch.float64, torch.float32):
            assert rounding(x.to(dtype))[:8].tolist() == values


def test_ties_of_four_bits_go_to_the_even_code() -> None:
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, -2.5, 7.0])
    assert round_trip.e2m1(ties).tolist() == [0, 1, 1, 2, 2, 4, 4, -2, 6]


def test_yarn_of_blocks_with_entries() -> None:
    found, factor = frequencies(PUBLISHED.rope)
    expected = {0: 1.0, 1: 0.6876560, 14: 5.286856e-3, 15: 3.635539e-3, 16: 2.265625e-3, 20: 2.969778e-4,
                24: 1.953125e-5, 25: 5.372313e-6, 31: 5.680529e-7}  # fmt: skip
    assert {i: pytest.approx(float(found[i]), rel=1e-6) for i in expected} == expected
    assert factor == 1.0
    assert PUBLISHED.compressed is not None and PUBLISHED.compressed.rope_window.kind == "default"


def test_scores_in_pieces_are_those_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, keys, share = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 9, 8), (2, 9, 8), (2, 9, 4)))
    visible = (torch.arange(9) + 1).expand(2, -1)
    whole = two_level.scores(q, keys, share, visible)
    monkeypatch.setattr(two_level, "SCORES_AT_ONCE", 2 * 4 * 9 * 2)
    torch.testing.assert_close(two_level.scores(q, keys, share, visible), whole)
    assert torch.isinf(whole[:, 0, 1:]).all() and torch.isfinite(whole[:, -1]).all()


def test_the_newest_block_is_always_a_candidate() -> None:
    entries = PUBLISHED.entries
    assert entries is not None
    how = entries.__class__((0,), (0,), 0, candidate_blocks=2, candidate_block_size=2)
    scored = torch.tensor([[[5.0, 0, 9, 0, 7, 0, 1.0, float("-inf")]]])
    assert two_level.candidates(scored, torch.tensor([[7]]), how).tolist() == [[[1, 3]]]
    assert two_level.best(two_level.within(scored, torch.tensor([[[1, 3]]]), how), 4).tolist() == [[[-1, 2, 3, 6]]]


def test_folding_knows_case_accents_spaces_and_broken_bytes(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models

    words = ["a", "A", "\u00e9", "E", "ﬁ", "FI", " ", "  ", "\t", " a", "\u0301", "<0xFF>", "<0xFE>"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.ByteFallback()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    # a combining accent alone folds to nothing and stands for itself; bytes that are no text are told apart by name
    assert token_map(tmp_path, 7).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 3, 0, 4, 5, 6]
    with pytest.raises(DscError, match="engram_compressed_vocab_size 5"):
        token_map(tmp_path, 5)

"""DeepSeek-V4.1's own fields of config.json, and the checks on them.

A wrong list of sources or sizes of tables would run without a sign; so each is checked against the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from deepseek_compress.errors import DscError
from deepseek_compress.models.config import Drafts, Engram, Fields, ModelConfig, SharedEntries, Vision
from deepseek_compress.models.engram import primes

RATIOS = (0, 1, 2)
COLUMNS, LARGEST = 1024, 1 << 30  # of all Engram tables, and of a prime: finding them must end
AGAIN = "give the published config.json"


def nested(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the object `text_config`."""
    text = config.get("text_config")
    if not isinstance(text, Mapping):
        what = "missing" if text is None else f"{str(text)[:80]!r}"
        raise DscError(f"config.json: text_config is {what}", "deepseek_v41 has its sizes there: " + AGAIN)
    return text


def parse_ratios(text: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Tokens of an entry in each block, 0 for a window alone; drafting blocks come after those of the model."""
    found = text.get("compress_ratios")
    if not isinstance(found, list) or len(found) < layers or any(type(v) is not int for v in found):
        raise DscError(f"config.json: compress_ratios {str(found)[:80]} for {layers} blocks", AGAIN)
    unknown = sorted(set(found) - set(RATIOS))
    if unknown:
        raise DscError(f"config.json: compress_ratios has {unknown}", f"known: {', '.join(map(str, RATIOS))}")
    return tuple(found[:layers])


def parse_entries(fields: Fields, layers: int) -> SharedEntries:
    """Who makes entries, and who chooses."""
    return SharedEntries(
        sources=fields.wholes("kv_source_layer_ids", layers),
        index_sources=fields.wholes("index_source_layer_ids", layers),
        candidate_source=fields.whole("candidate_source_layer_id"),
        candidate_blocks=fields.whole("candidate_topk_blocks"),
        candidate_block_size=fields.whole("candidate_block_size"),
    )


def parse_engram(fields: Fields, layers: int) -> Engram | None:
    """Return the tables; None where no block has one."""
    mine = fields.wholes("engram_layer_ids", layers) if fields.config.get("engram_layer_ids") else ()
    rows = fields.config.get("engram_num_embeddings")
    if not mine:
        return None
    if not isinstance(rows, list) or len(rows) != len(mine) or any(type(n) is not int or n < 1 for n in rows):
        raise DscError(f"config.json: engram_num_embeddings {str(rows)[:80]} for blocks {list(mine)}", AGAIN)
    return Engram(
        layers=mine,
        rows=tuple(rows),
        ngrams=fields.whole("engram_max_ngram_size"),
        vocabulary=fields.whole("engram_vocab_size"),
        heads=fields.whole("engram_n_heads"),
        head_dim=fields.whole("engram_head_dim"),
        pad_token=fields.whole("engram_pad_token_id"),
        tokens=fields.whole("engram_compressed_vocab_size"),
    )


def parse_vision(config: Mapping[str, Any]) -> Vision | None:
    """Return the image encoder; None where there is none."""
    found = config.get("vision_config")
    if found is None:
        return None
    if not isinstance(found, Mapping):
        raise DscError(f"config.json: vision_config is {str(found)[:80]!r}", AGAIN)
    fields = Fields(found)
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "patch_size", "downsample_ratio")
    return Vision(*(fields.whole(name) for name in sizes))


def parse_drafts(fields: Fields) -> Drafts | None:
    """Return the drafting blocks; None where there are none."""
    if not fields.whole("num_nextn_predict_layers", 0):
        return None
    targets = fields.config.get("dspark_target_layer_ids")
    if not isinstance(targets, list) or not targets:
        raise DscError(f"config.json: dspark_target_layer_ids is {str(targets)[:80]!r}", AGAIN)
    return Drafts(fields.whole("dspark_n_routed_experts"), len(targets), fields.whole("dspark_markov_rank"))


def config_problems(cfg: ModelConfig) -> list[DscError]:
    """Everything in which the parts disagree."""
    return [*_sizes(cfg), *_sources(cfg), *([] if cfg.engram is None else _engram(cfg, cfg.engram))]


def _sizes(cfg: ModelConfig) -> Iterator[DscError]:
    kinds, indexer, streams, moe = cfg.compressed, cfg.indexer, cfg.streams, cfg.moe
    assert kinds is not None and indexer is not None and streams is not None and moe is not None
    if cfg.tie_word_embeddings:
        yield DscError("config.json: tie_word_embeddings is true", "deepseek_v41 has a head of its own")
    for name, value in (("o_groups", kinds.o_groups), ("hc_mult", streams.streams), ("index_topk", indexer.top_k)):
        if not value:
            yield DscError(f"config.json: {name} is 0", AGAIN)
    if kinds.o_groups and cfg.num_attention_heads % kinds.o_groups:
        yield DscError(f"config.json: {cfg.num_attention_heads} heads in o_groups {kinds.o_groups}", AGAIN)
    if not 0 < moe.top_k <= moe.experts:
        yield DscError(f"config.json: num_experts_per_tok {moe.top_k} of n_routed_experts {moe.experts}", AGAIN)
    rope = cfg.rope.dim
    for name, size in (("head_dim", cfg.head_dim), ("index_head_dim", indexer.head_dim)):
        if size % 32:
            yield DscError(f"config.json: {name} {size} is not groups of 32, in which it is rounded", AGAIN)
        if rope % 2 or not 0 < rope <= size:
            yield DscError(f"config.json: qk_rope_head_dim {rope} of {name} {size}", AGAIN)


def _sources(cfg: ModelConfig) -> Iterator[DscError]:
    """Each block with entries needs a source of them, and a choice among just these."""
    how, kinds, indexer = cfg.entries, cfg.compressed, cfg.indexer
    assert how is not None and kinds is not None and indexer is not None
    where = f"kv_source_layer_ids {list(how.sources)}, index_source_layer_ids {list(how.index_sources)}"
    wrong: dict[str, list[int]] = {}
    for layer, rate in enumerate(kinds.rates):
        source = max((s for s in how.sources if s <= layer), default=-1)
        choice = max((s for s in how.index_sources if s <= layer), default=-1)
        if not rate and layer in (source, choice):
            wrong.setdefault("are sources with compress_ratios 0", []).append(layer)
        elif rate and (source < 0 or kinds.rates[source] != rate):
            wrong.setdefault(f"read entries of {rate} tokens, which no source before them makes", []).append(layer)
        elif rate and choice < source:
            wrong.setdefault("read entries of which nobody chose", []).append(layer)
    for what, layers in wrong.items():
        yield DscError(f"config.json: blocks {str(layers)[:80]} {what} ({where})", AGAIN)
    later = [s for s in how.index_sources if s > how.candidate_source]
    own = max((s for s in how.sources if s <= how.candidate_source), default=-1)
    if how.candidate_source not in how.index_sources or any(own < s for s in how.sources if later and s <= later[-1]):
        yield DscError(f"config.json: candidate_source_layer_id {how.candidate_source} ({where})", AGAIN)
    if not how.candidate_block_size or how.candidate_blocks * how.candidate_block_size < indexer.top_k:
        what = f"config.json: candidate_topk_blocks {how.candidate_blocks} of {how.candidate_block_size}"
        yield DscError(f"{what} hold fewer than index_topk {indexer.top_k}", AGAIN)


def _engram(cfg: ModelConfig, engram: Engram) -> Iterator[DscError]:
    columns = (engram.ngrams - 1) * engram.heads
    if engram.ngrams < 2 or not engram.heads or columns * len(engram.layers) > COLUMNS:
        yield DscError(f"config.json: {engram.heads} Engram heads, n-grams up to {engram.ngrams}", AGAIN)
    elif not 1 < engram.vocabulary <= LARGEST:
        yield DscError(f"config.json: engram_vocab_size is {engram.vocabulary}", AGAIN)
    else:
        for layer, rows, moduli in zip(engram.layers, engram.rows, primes(engram), strict=True):
            if rows != sum(moduli):
                what = f"config.json: engram_num_embeddings of block {layer} is {rows}, its hashes reach {sum(moduli)}"
                yield DscError(what, AGAIN)
    if not engram.head_dim or engram.head_dim % 32:
        yield DscError(f"config.json: engram_head_dim {engram.head_dim} is not groups of 32", AGAIN)
    if not 0 < engram.tokens <= cfg.vocab_size or engram.pad_token >= cfg.vocab_size:
        what = f"config.json: engram_compressed_vocab_size {engram.tokens}, engram_pad_token_id {engram.pad_token}"
        yield DscError(f"{what}, vocab_size {cfg.vocab_size}", AGAIN)

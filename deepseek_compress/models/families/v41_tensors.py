"""Which tensors a DeepSeek-V4.1 checkpoint has, by name and logical shape."""

from __future__ import annotations

from deepseek_compress.models.config import Linear, ModelConfig, Moe, Role
from deepseek_compress.models.family import Shape
from deepseek_compress.models.shared_entries import parts

ENGRAM_IN = "engram.in"  # the rows of the table, side by side


def block_tensors(cfg: ModelConfig, layer: int) -> dict[str, Shape]:
    """Tensors of block `layer`, by their name within it."""
    kinds, indexer, how = parts(cfg)
    hidden, head_dim = cfg.hidden_size, cfg.head_dim
    found = _site_tensors(cfg)
    if layer in how.sources:
        compressor, width = "attn.compressor", (head_dim, hidden)
        found |= {f"{compressor}.wkv.weight": width, f"{compressor}.norm.weight": (head_dim,)}
        found |= {f"{compressor}.wgate.weight": width} if kinds.rates[layer] > 1 else {}
        found |= {"attn.indexer.wk.weight": (indexer.head_dim, head_dim)}
        found |= {"attn.indexer.k_norm.weight": (indexer.head_dim,)}
    if layer in how.index_sources:
        found |= {"attn.indexer.weights_proj.weight": (indexer.heads, hidden)}
    if cfg.engram is not None and layer in cfg.engram.layers:
        assert cfg.streams is not None
        n = cfg.streams.streams
        rows = cfg.engram.rows[cfg.engram.layers.index(layer)]
        found |= {"engram.embed.weight": (rows, cfg.engram.head_dim)}
        found |= {"engram.q_weight": (n, hidden), "engram.k_weight": (n, hidden)}
    return found | {linear.name + ".weight": (linear.rows, linear.columns) for linear in linears(cfg, layer)}


def _site_tensors(cfg: ModelConfig, experts: int | None = None) -> dict[str, Shape]:
    """Norms, hyper-connections, the output projection by groups and the router, which every kind of block has."""
    kinds, _, _ = parts(cfg)
    assert cfg.streams is not None and cfg.moe is not None
    n, hidden, heads = cfg.streams.streams, cfg.hidden_size, cfg.num_attention_heads
    found: dict[str, Shape] = {"attn_norm.weight": (hidden,), "ffn_norm.weight": (hidden,)}
    for name in ("hc_attn", "hc_ffn"):
        found |= {f"{name}_fn": ((2 + n) * n, n * hidden), f"{name}_base": ((2 + n) * n,), f"{name}_scale": (3,)}
    found |= {"attn.q_norm.weight": (kinds.q_lora_rank,), "attn.kv_norm.weight": (cfg.head_dim,)}
    found |= {"attn.attn_sink": (heads,)}
    found |= {"attn.wo_a.weight": (kinds.o_groups * kinds.o_lora_rank, heads * cfg.head_dim // kinds.o_groups)}
    count = cfg.moe.experts if experts is None else experts
    found |= {cfg.moe.names.router: (count, hidden)}
    return found | {cfg.moe.names.bias: (count,), cfg.moe.names.bias + "_vl": (count,)}  # `_vl`: of image tokens


def linears(cfg: ModelConfig, layer: int) -> list[Linear]:
    """Return what a recipe may change of block `layer`, in the order in which it runs."""
    _, indexer, how = parts(cfg)
    assert cfg.moe is not None
    found = []
    if cfg.engram is not None and layer in cfg.engram.layers:
        assert cfg.streams is not None
        rows = (cfg.streams.streams + 1) * cfg.hidden_size
        columns = (cfg.engram.ngrams - 1) * cfg.engram.heads * cfg.engram.head_dim
        found.append(Linear("engram.wkv", Role.ENGRAM, rows, columns, ENGRAM_IN))
    extra = []
    if layer in how.index_sources:
        rows = indexer.heads * indexer.head_dim
        extra = [Linear("attn.indexer.wq_b", Role.INDEXER, rows, parts(cfg)[0].q_lora_rank, "attn.wq_b")]
    return [*found, *_attention(cfg, extra), *_ffn(cfg.moe, cfg.hidden_size, cfg.moe.experts)]


def _attention(cfg: ModelConfig, indexer: list[Linear]) -> list[Linear]:
    kinds, _, _ = parts(cfg)
    hidden, role = cfg.hidden_size, Role.ATTENTION
    return [
        Linear("attn.wq_a", role, kinds.q_lora_rank, hidden, "attn.in", "wq_a+wkv"),
        Linear("attn.wkv", role, cfg.head_dim, hidden, "attn.in", "wq_a+wkv"),
        Linear("attn.wq_b", role, cfg.num_attention_heads * cfg.head_dim, kinds.q_lora_rank, "attn.wq_b"),
        *indexer,
        Linear("attn.wo_b", role, hidden, kinds.o_groups * kinds.o_lora_rank, "attn.wo_b"),
    ]


def _ffn(moe: Moe, hidden: int, experts: int) -> list[Linear]:
    found = []
    if moe.shared:
        found += _mlp(moe, moe.names.shared, Role.SHARED_EXPERT, hidden, moe.intermediate * moe.shared)
    for expert in range(experts):
        found += _mlp(moe, f"{moe.names.experts}.{expert}", Role.EXPERT, hidden, moe.intermediate)
    return found


def _mlp(moe: Moe, name: str, role: Role, hidden: int, width: int) -> list[Linear]:
    shared, names = "experts" if role is Role.EXPERT else None, moe.names
    return [
        Linear(f"{name}.{names.gate}", role, width, hidden, f"{name}.in", shared or "gate_up"),
        Linear(f"{name}.{names.up}", role, width, hidden, f"{name}.in", shared or "gate_up"),
        Linear(f"{name}.{names.down}", role, hidden, width, f"{name}.{names.down}", shared),
    ]


def draft_tensors(cfg: ModelConfig) -> dict[str, Shape]:
    """Tensors of the blocks that draft tokens, by their names in the checkpoint."""
    found: dict[str, Shape] = {}
    drafts, moe, hidden = cfg.drafts, cfg.moe, cfg.hidden_size
    count = cfg.num_nextn_predict_layers
    if not count or drafts is None or moe is None:
        return found
    for number in range(count):
        block = _site_tensors(cfg, drafts.experts)
        own = [*_attention(cfg, []), *_ffn(moe, hidden, drafts.experts)]
        block |= {linear.name + ".weight": (linear.rows, linear.columns) for linear in own}
        if number == 0:
            block |= {"main_proj.weight": (hidden, drafts.targets * hidden), "main_norm.weight": (hidden,)}
        if number == count - 1:
            rank = (cfg.vocab_size, drafts.markov_rank)
            block |= {"norm.weight": (hidden,), "markov_head.embed.weight": rank, "markov_head.head.weight": rank}
            block |= {"confidence_head.proj.weight": (1, hidden + drafts.markov_rank)}
        found |= {f"mtp.{number}.{name}": shape for name, shape in block.items()}
    return found


def vision_tensors(cfg: ModelConfig) -> dict[str, Shape]:
    """Tensors of the image encoder, of the aligner, and the embeddings around an image."""
    vision, text = cfg.vision, cfg.hidden_size
    if vision is None:
        return {}
    wide, inner = vision.hidden, vision.intermediate
    found: dict[str, Shape] = {
        "vision.patch_embed.proj.weight": (wide, 3 * vision.patch**2),
        "vision.patch_embed.proj.bias": (wide,),
        "vision.norm.weight": (wide,),
        "aligner.w1.weight": (text, wide * vision.downsample**2),
        "aligner.w1.bias": (text,),
        "aligner.w2.weight": (text, text),
        "aligner.w2.bias": (text,),
        **{f"image_{place}": (text,) for place in ("start", "newline", "end")},
    }
    block: dict[str, Shape] = {
        "norm1.weight": (wide,), "norm2.weight": (wide,), "attn.wqkv.weight": (3 * wide, wide),
        "attn.wqkv.bias": (3 * wide,), "attn.wo.weight": (wide, wide), "attn.wo.bias": (wide,),
        "mlp.w1.weight": (2 * inner, wide), "mlp.w2.weight": (wide, inner),
    }  # fmt: skip
    return found | {
        f"vision.blocks.{layer}.{name}": shape for layer in range(vision.layers) for name, shape in block.items()
    }

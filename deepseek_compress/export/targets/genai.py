"""A folder that onnxruntime-genai opens: `onnxruntime_genai.Model(folder)` answers.

The graph is that of target `onnxruntime`: caches by layer (past.0.key, present.0.key), which GroupQueryAttention keeps
in one buffer that both names share; logits of every token, since genai pads a batch at the right. Source: the
`genai_config.json` that its own model builder writes, version 0.18.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal

from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import write_json
from deepseek_compress.errors import DscError
from deepseek_compress.export.target import Job
from deepseek_compress.export.targets.graph import ONNX, GraphTarget
from deepseek_compress.models import Architecture
from deepseek_compress.models.config import ModelConfig
from deepseek_compress.models.tokenizer import load_tokenizer

CONFIG = "genai_config.json"
TYPES = ("llama", "qwen2", "qwen3")


class Genai(GraphTarget, frozen=True, extra="forbid"):
    """`provider`: cpu, cuda or NvTensorRtRtx (TensorRT-RTX inside onnxruntime); FP16 on the latter two.

    `accuracy_level` of MatMulNBits, `embedding_bits`: as in target onnxruntime; level 4 is for CPUs.
    """

    name: ClassVar[str] = "genai"
    lowering: ClassVar[str] = "matmulnbits"
    loads: ClassVar[str] = CONFIG
    provider: Literal["cpu", "cuda", "NvTensorRtRtx"] = "cpu"
    accuracy_level: Literal[0, 1, 2, 3, 4] | None = None  # None: 4 on a CPU, else 0
    embedding_bits: Literal[8, 16] = 16

    def problems(self, header: Header) -> list[DscError]:
        """Return a family whose cache or tokenizer genai has no form for."""
        cfg = Architecture.of(header).cfg
        if cfg.model_type not in TYPES:
            what = f"{cfg.model_type}: onnxruntime-genai's cache has keys and values by head, not latents"
            return [DscError(what, "use --target onnxruntime, which `dsc chat` runs")]
        return super().problems(header)

    def dtype(self) -> str:
        """FP16 on a GPU where none is asked for."""
        return super().dtype() if self.precision != "auto" or self.provider == "cpu" else "float16"

    def options(self) -> dict[str, Any]:
        """Of the graph."""
        level = (4 if self.provider == "cpu" else 0) if self.accuracy_level is None else self.accuracy_level
        return {"accuracy_level": level, "embedding_bits": self.embedding_bits}

    def finish(self, source: Checkpoint, folder: Path, facts: Mapping[str, Any], job: Job) -> dict[str, Any]:
        """genai_config.json."""
        shared = not (source.activations or {}).get("attention")  # 8-bit attention has no GroupQueryAttention
        cfg = Architecture.of(source).cfg
        write_json(folder / CONFIG, genai_config(cfg, source, self.provider, shared))
        return {"provider": self.provider}


def genai_config(cfg: ModelConfig, source: Checkpoint, provider: str, shared: bool) -> dict[str, Any]:
    """Return what genai must know. `shared`: past and present of a layer are one buffer, which concatenating graphs
    forbid."""
    tokenizer = load_tokenizer(source.path)
    ends = list(tokenizer.eos_ids) or [0]
    pad, length = source.config.get("pad_token_id"), cfg.max_position_embeddings
    caches = {kind: f"{{}}.%d.{kind}" for kind in ("key", "value")}
    decoder = {
        "filename": ONNX,
        "session_options": {
            "log_id": "onnxruntime-genai",
            "provider_options": [] if provider == "cpu" else [{provider: {}}],
        },
        "hidden_size": cfg.hidden_size,
        "num_hidden_layers": cfg.num_hidden_layers,
        "num_attention_heads": cfg.num_attention_heads,
        "num_key_value_heads": cfg.num_key_value_heads,
        "head_size": cfg.head_dim,
        "inputs": {name: name for name in ("input_ids", "attention_mask", "position_ids")}
        | {f"past_{kind}_names": name.format("past") for kind, name in caches.items()},
        "outputs": {"logits": "logits"}
        | {f"present_{kind}_names": name.format("present") for kind, name in caches.items()},
    }
    return {
        "model": {
            "type": cfg.model_type,
            "bos_token_id": tokenizer.bos_id or 0,
            "eos_token_id": ends if len(ends) > 1 else ends[0],
            "pad_token_id": ends[0] if pad is None else pad,
            "vocab_size": cfg.vocab_size,
            "context_length": length,
            "decoder": decoder,
        },
        "search": {
            "do_sample": False, "max_length": length, "min_length": 0, "num_beams": 1, "num_return_sequences": 1,
            "early_stopping": True, "length_penalty": 1.0, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0,
            "diversity_penalty": 0.0, "temperature": 1.0, "top_k": 1, "top_p": 1.0, "past_present_share_buffer": shared,
        },
    }  # fmt: skip

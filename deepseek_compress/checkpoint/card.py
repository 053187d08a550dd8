"""README.md of an output: what it is made of, how, and how to serve it. The same input gives the same text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from deepseek_compress.checkpoint.reader import Checkpoint

SERVED_CACHE = (
    "Servers choose the bits of their cache when they start: no file tells them a whole-number one (`kv_cache_scheme` "
    "means FP8). vLLM's nearest is `--kv-cache-dtype int8_per_token_head` or `int4_per_token_head`."
)


def model_card(source: Checkpoint, config: Mapping[str, Any], manifest: Mapping[str, Any], body: str = "") -> str:
    """Front matter for the hub, base model, recipe, precision, `body` (metrics, say), and how to serve."""
    base = str((manifest.get("source") or {}).get("name") or source.path.resolve().name)
    front = ["---", f"base_model: {base}", f"license: {_licence(source)}", "tags:", "- deepseek-compress", "---"]
    sections = ["\n".join(front), f"# {base}, compressed", f"Made from `{base}` with deepseek-compress."]
    sections += ["## Precision\n\n" + "\n".join(_precision(config, manifest))]
    if body.strip():
        sections.append(body.strip())
    if manifest.get("recipe"):
        sections.append(f"## Recipe\n\n```yaml\n{str(manifest['recipe']).rstrip()}\n```")
    sections.append("## Serving\n\n" + _serving(config, manifest))
    return "\n\n".join(sections) + "\n"


def _licence(source: Checkpoint) -> str:
    """Return what the source's own card says; `other` where it says nothing, since its LICENSE file goes along."""
    readme = source.path / "README.md"
    if readme.is_file():
        front = re.match(r"\A---\n(.*?)\n---", readme.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        found = re.search(r"^license:[ \t]*([\w.\-]+)[ \t]*$", front[1], re.MULTILINE) if front else None
        if found:
            return found[1]
    return "other"


def _precision(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> list[str]:
    quantization = config.get("quantization_config") or {}
    lines = [f"- {_group(group)}" for group in (quantization.get("config_groups") or {}).values()]
    if not lines:
        method = quantization.get("quant_method")
        lines = [f"- weights as published ({method})" if method else "- weights in 16-bit floating point"]
    activations = manifest.get("activations")
    if activations:
        lines.append(
            f"- activations: {activations.get('num_bits', 8)} bits, one scale a {activations.get('granularity')}"
        )
    cache = manifest.get("kv_cache")
    if cache:
        lines.append(f"- keys and values: evaluated with {cache['num_bits']} bits, a grid a token and head")
    plain = quantization.get("ignore")
    if plain:
        lines.append(f"- kept in 16 bits: {', '.join(f'`{name}`' for name in plain[:8])}{' ...' if plain[8:] else ''}")
    return lines


def _group(group: Mapping[str, Any]) -> str:
    weights = group["weights"]
    kind = "symmetric" if weights["symmetric"] else "asymmetric"
    size = f"groups of {weights['group_size']}" if weights["group_size"] else "one scale a row"
    return f"weights: {weights['num_bits']}-bit {kind} {weights['type']}, {size} (`{group['format']}`)"


def _serving(config: Mapping[str, Any], manifest: Mapping[str, Any]) -> str:
    quantization = config.get("quantization_config") or {}
    groups = (quantization.get("config_groups") or {}).values()
    lines = ["```", "vllm serve PATH", "```"]
    if quantization.get("quant_method") == "compressed-tensors":
        refused = len(groups) > 1 and not all(group["weights"]["symmetric"] for group in groups)
        how = "transformers 5.23 does not load several schemes of which one is asymmetric"
        lines.append(f"\n{how if refused else 'transformers loads it with `pip install compressed-tensors`'}.")
    inputs = [group.get("input_activations") for group in groups]
    if manifest.get("activations") and not any(inputs):
        lines.append("\nServers run it with 16-bit activations: none takes 8-bit activations with these weights.")
    if manifest.get("kv_cache"):
        lines.append(f"\n{SERVED_CACHE}")
    return "\n".join(lines)

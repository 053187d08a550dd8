"""The `quantization_config` of config.json for what was written: compressed-tensors' own keys, checked by its classes.

One scheme: a group with the target "Linear". Several: every group lists its modules, because vLLM matches the class
name of a fused layer ("QKVParallelLinear" contains "Linear") before the names of its parts. The experts of a layer
become one regular expression when all of them share the scheme, as vLLM asks of them anyway; where names have no
"model." prefix (DeepSeek-V4) it leaves room for one, which vLLM puts before its modules and not into expressions. An
embedding or a head on few bits has a group of its own, since inputs of it are never rounded and an embedding is no
"Linear".

Everything two-dimensional that stays plain (routers, embeddings, the head, layers that did not fit) stands in `ignore`.
Source: compressed-tensors 0.20, quantization/quant_config.py and utils/match.py; vLLM, compressed_tensors/utils.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from deepseek_compress import limits
from deepseek_compress.checkpoint.formats import packed
from deepseek_compress.checkpoint.header import module_of

_EXPERT = re.compile(r"^(.*\.experts)\.\d+\.(.+)$")
_TABLE = re.compile(r"^(model\.)?(embed_tokens|lm_head|embed|head)$")  # modules whose rows are the vocabulary


class Stored(NamedTuple):
    """Encoding of one logical tensor as written. Plain values: it is kept in the ledger of an unfinished output."""

    format: str  # plain, published, untouched, or one of compressed-tensors' formats
    bytes: int
    rank: int  # of the logical tensor
    num_bits: int = 0
    columns: int = 0
    groups: int = 0  # scales a row
    symmetric: bool = True


class Scheme(NamedTuple):
    """Quantisation scheme of one weight; equal schemes share a group. Sorts in the order of the groups."""

    format: str  # pack-quantized, int-quantized or mxfp4-pack-quantized
    num_bits: int
    group_size: int | None  # None: one scale a row
    symmetric: bool
    table: bool = False  # an embedding or a head


def describe(name: str, parts: Mapping[str, Tensor]) -> Stored:
    """Infer the encoding of the logical tensor `name` from types and shapes of its `parts`."""
    size = sum(part.nbytes for part in parts.values())
    if len(parts) == 1:
        (tensor,) = parts.values()
        return Stored("plain", size, tensor.dim())
    scale = parts.get("weight_scale")
    codes = parts.get("weight_packed", parts.get("weight"))
    if scale is None or codes is None or codes.dtype not in (torch.int8, torch.uint8, torch.int32):
        return Stored("published", size, 2)  # FP8 blocks, V4's MXFP4
    groups = scale.shape[1]
    if codes.dtype == torch.int8:
        return Stored("int-quantized", size, 2, 8, codes.shape[1], groups)
    if codes.dtype == torch.uint8:
        return Stored("mxfp4-pack-quantized", size, 2, 4, codes.shape[1] * 2, groups)
    columns = int(parts["weight_shape"][1])
    bits = packed.bits_of(name, codes.shape[1], columns)
    return Stored("pack-quantized", size, 2, bits, columns, groups, "weight_zero_point" not in parts)


def assign_schemes(stored: Mapping[str, Stored]) -> tuple[dict[str, Scheme], list[str], list[str]]:
    """Return (module -> scheme, modules with a plain matrix, modules that keep their published encoding).

    A weight with one scale a row belongs to the group size that equals its width if another weight has that group size;
    otherwise it is a channel scheme. On disk the two are the same.
    """
    sizes = {s.columns // s.groups for s in stored.values() if s.groups > 1}
    schemes: dict[str, Scheme] = {}
    plain: list[str] = []
    published: list[str] = []
    for name, s in stored.items():
        module, suffix = module_of(name)
        if s.format == "untouched":  # whatever it is; the caller's patterns in `ignore` cover it
            continue
        if s.format == "published":
            published.append(module)
        elif s.format == "plain":
            plain += [module] if s.rank == 2 and suffix == "weight" else []
        else:
            group = s.columns // s.groups
            channel = s.groups == 1 and group not in sizes and not s.format.startswith("mxfp4")
            table = _TABLE.match(module) is not None
            schemes[module] = Scheme(s.format, s.num_bits, None if channel else group, s.symmetric, table)
    return schemes, plain, published


def quantization_config(
    schemes: Mapping[str, Scheme],  # module -> scheme
    plain: Iterable[str],  # modules with a plain two-dimensional weight
    ignore: Iterable[str],  # the caller's names and "re:" patterns
    input_activations: dict[str, Any] | None,
) -> dict[str, Any]:
    """Build the `quantization_config` that transformers, vLLM and compressed-tensors read."""
    kinds = sorted(set(schemes.values()), key=lambda scheme: (scheme.format, *map(str, scheme[1:])))
    modules = [*schemes, *plain]
    groups: dict[str, Any] = {}
    for i, kind in enumerate(kinds):
        members = [module for module, scheme in schemes.items() if scheme == kind]
        groups[f"group_{i}"] = {
            "targets": collapse(members, modules) if kinds[1:] or kind.table else ["Linear"],
            "input_activations": None if kind.table else input_activations,
            "output_activations": None,
            "format": kind.format,
            "weights": _weights(kind),
        }
    formats = {kind.format for kind in kinds}
    published: dict[str, Any] = {
        "quant_method": "compressed-tensors",
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "global_compression_ratio": None,
        "kv_cache_scheme": None,
        "ignore": ignore_list(schemes, plain, ignore),
        "config_groups": groups,
    }
    if len(kinds) == 1 and not kinds[0].symmetric and not kinds[0].table:
        # transformers 5.23 with compressed-tensors 0.20 expects unpacked zero points where it loads a model compressed,
        # and refuses ours (and everyone's); this key of its own makes it unpack while loading. Others ignore it.
        published["dequantize"] = True
    return published


def input_activations(scheme: Mapping[str, Any] | None, schemes: Mapping[str, Scheme]) -> dict[str, Any] | None:
    """compressed-tensors' form of a scheme that servers have: integers, symmetric weights, one dynamic scale a token,
    or one static scale for all tokens.

    vLLM takes static scales, and zero points of inputs, with 8-bit weights of one scale a row only, and not in its
    kernels for experts.
    """
    granularity = (scheme or {}).get("granularity")
    schemes = {name: its for name, its in schemes.items() if not its.table}
    if not scheme or granularity not in ("token", "tensor") or not all(s.symmetric for s in schemes.values()):
        return None
    symmetric, static = bool(scheme.get("symmetric", True)), granularity == "tensor"
    plain = all(s.format == "int-quantized" and ".experts." not in name for name, s in schemes.items())
    if (static or not symmetric) and not plain:
        return None
    bits = scheme["num_bits"]
    return {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": granularity, "dynamic": not static}


def ignore_list(schemes: Mapping[str, Scheme], plain: Iterable[str], ignore: Iterable[str]) -> list[str]:
    """Return the caller's patterns, then every plain module that they miss, and the head, which may be tied."""
    wanted = [pattern for pattern in dict.fromkeys(ignore) if pattern not in schemes or not _TABLE.match(pattern)]
    plain = list(plain)
    wrong = sorted(module for module in schemes if any(matches(module, pattern) for pattern in wanted))
    if wrong:
        raise ValueError(f"quantised, but in ignore: {', '.join(wrong[:5])}")
    missed = [module for module in plain if not any(matches(module, pattern) for pattern in wanted)]
    if "lm_head" not in schemes and "lm_head" not in plain and "lm_head" not in wanted:
        missed.append("lm_head")
    return wanted + collapse(missed, [*schemes, *plain])


def matches(name: str, pattern: str) -> bool:
    """compressed-tensors' rule: equal, or `re:` and a match from the start."""
    return _compiled(pattern[3:]).match(name) is not None if pattern.startswith("re:") else name == pattern


_compiled = functools.lru_cache(maxsize=4096)(limits.pattern)


def collapse(chosen: Iterable[str], modules: Iterable[str]) -> list[str]:
    """`chosen` with the experts of a layer as one pattern, where every such expert among `modules` is chosen."""
    chosen = list(chosen)
    taken = set(chosen)
    missing = {_family(module) for module in modules if module not in taken} - {None}
    out: dict[str, None] = {}
    for module in chosen:
        family = _family(module)
        if family is None or family in missing:
            out[module] = None
        else:
            start = "" if family[0].startswith("model.") else r"(?:.+\.)?"
            out[f"re:^{start}{re.escape(family[0])}\\.\\d+\\.{re.escape(family[1])}$"] = None
    return list(out)


def _family(module: str) -> tuple[str, str] | None:
    found = _EXPERT.match(module)
    return (found[1], found[2]) if found else None


def _weights(scheme: Scheme) -> dict[str, Any]:
    weights: dict[str, Any] = {
        "num_bits": scheme.num_bits,
        "type": "float" if scheme.format.startswith("mxfp4") else "int",
        "symmetric": scheme.symmetric,
        "strategy": "channel" if scheme.group_size is None else "group",
        "group_size": scheme.group_size,
        "dynamic": False,
        "actorder": None,
        "block_structure": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    if scheme.format.startswith("mxfp4"):
        weights |= {"scale_dtype": "torch.uint8", "zp_dtype": "torch.uint8"}
    return weights

"""Malformed checkpoints from a seeded list: each is a name, what is done to a copy of a good one, what to run, and the
line that is expected where it is refused."""

from __future__ import annotations

import json
import os
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

SEED = 18
FAST = "quantize {} -o out -r w4a16-fast --group-size 32"
PLAN = "plan {} -r w4a16-fast --group-size 32"
TEXT = "quantize {} -o out -r w4a16 --group-size 32 --samples 2 --length 16"
LOOK = "inspect {}"
EVALUATE = "evaluate {} -o out.json --problems 2 --set efficiency=false"
SHARD = "model.safetensors"


class Case(NamedTuple):
    name: str
    change: Callable[[Path], None]
    command: str
    expected: str = ""


def cases() -> list[Case]:
    """The same list every time, at least 220."""
    rng = random.Random(SEED)
    return [*_headers(), *_whole_headers(), *_configs(rng), *_files(rng), *_indices(rng), *_tokenizers(), *_damage(rng)]


def header_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The JSON header and the data of a safetensors file."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def write_header(path: Path, header: Any, data: bytes) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


NUMBERS: tuple[Any, ...] = (
    -1,
    0,
    1,
    1 << 31,
    1 << 63,
    10**30,
    10**4000,
    1.5,
    True,
    None,
    "7",
    [],
    {},
    "\ud800",
    "\x1b[31m",
)


def _headers() -> Iterator[Case]:
    def entry(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            header, data = header_of(path / SHARD)
            change(header["model.norm.weight"])
            write_header(path / SHARD, header, data)

        return apply

    for key in ("dtype", "shape", "data_offsets"):
        for i, value in enumerate(NUMBERS):
            yield Case(
                f"{key}-{i}", entry(lambda e, k=key, v=value: e.update({k: v})), PLAN, "model.norm.weight|header|norm"
            )
    for i, value in enumerate(NUMBERS):
        yield Case(f"dimension-{i}", entry(lambda e, v=value: e["shape"].append(v)), PLAN, "norm|header")
        yield Case(f"offset-{i}", entry(lambda e, v=value: e["data_offsets"].__setitem__(1, v)), PLAN, "norm|header")


def _whole_headers() -> Iterator[Case]:
    def whole(make: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            header, data = header_of(path / SHARD)
            write_header(path / SHARD, make(header), data)

        return apply

    empty = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    big = {"dtype": "F32", "shape": [10**4200] * 3000, "data_offsets": [0, 4]}
    names = [
        "\x1b]0;owned\x07",
        "\ud800",
        "a\nb",
        "../../x",
        "a" * 100_000,
        "",
        "\u202e",
        "model.layers.0.mlp.up_proj.weight_packed",
    ]
    for i, name in enumerate(names):
        yield Case(f"name-{i}", whole(lambda h, n=name: {**h, n: empty}), PLAN, "tensor|header|part|aaaa|weight")
    yield Case(
        "many-keys", whole(lambda h: {**h, **{f"t{i}": empty for i in range(200_000)}}), PLAN, "not a tensor|more"
    )
    yield Case("many-equal-keys", whole(lambda h: b'{"a":1' + b',"a":1' * 200_000 + b"}"), PLAN, "twice")
    yield Case(
        "large-shape",
        whole(
            lambda h: (
                json.dumps({**h, "x": {**empty, "shape": "X"}})
                .replace('"X"', str([10**4000] * 3000).replace("'", ""))
                .encode()
            )
        ),
        PLAN,
        "x|header",
    )
    yield Case("long-shape", whole(lambda h: {**h, "x": {**big, "shape": [1 << 60] * 3000}}), PLAN, "dimensions")
    yield Case("deep", whole(lambda h: b"[" * 200_000), PLAN, "not valid JSON")
    yield Case("number", whole(lambda h: b"1" * 5000), PLAN, "not valid JSON|not a JSON object")
    yield Case("empty", whole(lambda h: {}), PLAN, "missing|bytes after")
    yield Case("metadata", whole(lambda h: {**h, "__metadata__": [1]}), PLAN)
    for length in (0, 1, 7, 1 << 31, 1 << 63, (1 << 64) - 1):
        yield Case(
            f"length-{length}",
            lambda p, n=length: _patch(p / SHARD, 0, struct.pack("<Q", n)),
            PLAN,
            "header|safetensors",
        )


def _patch(file: Path, place: int, content: bytes) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        opened.write(content)


VALUES: tuple[Any, ...] = ("x", -1, 0, 1.5, 10**9, 10**30, [], {}, [[]], None, True, 1e308, "\x1b[2J")


def _configs(rng: random.Random) -> Iterator[Case]:
    keys = (
        "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "rms_norm_eps", "rope_theta", "tie_word_embeddings", "max_position_embeddings",
        "eos_token_id", "bos_token_id", "hidden_act", "quantization_config", "rope_scaling", "rope_parameters",
        "head_dim", "attention_bias", "use_sliding_window", "n_routed_experts", "first_k_dense_replace",
        "moe_layer_freq", "n_group", "topk_group", "num_experts_per_tok", "kv_lora_rank", "q_lora_rank",
        "qk_rope_head_dim", "routed_scaling_factor", "scoring_func", "topk_method", "norm_topk_prob",
        "num_nextn_predict_layers", "auto_map", "architectures", "torch_dtype",
    )  # fmt: skip

    def setting(key: str, value: Any) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            config = json.loads((path / "config.json").read_text())
            config[key] = value
            (path / "config.json").write_text(json.dumps(config))

        return apply

    for key in keys:
        for value in rng.sample(VALUES, 4):
            yield Case(f"config-{key}-{str(value)[:12]!r}", setting(key, value), rng.choice((PLAN, EVALUATE, TEXT)))
    for key in (
        "type",
        "factor",
        "rope_theta",
        "original_max_position_embeddings",
        "beta_fast",
        "mscale",
        "attention_factor",
    ):
        for value in rng.sample(VALUES, 2):
            scaling = {"type": "yarn", "factor": 4, key: value}
            yield Case(f"rope-{key}-{str(value)[:12]!r}", setting("rope_scaling", scaling), TEXT)
    for key in ("weight_block_size", "modules_to_not_convert", "config_groups", "ignore", "quant_method", "scale_fmt"):
        for value in rng.sample(VALUES, 2):
            yield Case(f"quantization-{key}-{str(value)[:12]!r}", setting("quantization_config", {key: value}), FAST)
    yield Case(
        "fp8-blocks",
        setting("quantization_config", {"weight_block_size": [1 << 70, 1 << 70]}),
        FAST,
        "weight_block_size",
    )


def _files(rng: random.Random) -> Iterator[Case]:
    def gone(file: Path) -> None:
        file.unlink()

    def empty(file: Path) -> None:
        file.write_bytes(b"")

    def cut(file: Path) -> None:
        os.truncate(file, file.stat().st_size * 2 // 3)

    def folder(file: Path) -> None:
        file.unlink()
        file.mkdir()

    def pipe(file: Path) -> None:
        file.unlink()
        os.mkfifo(file)

    def link(file: Path) -> None:
        file.unlink()
        file.symlink_to("/dev/zero")

    def loop(file: Path) -> None:
        file.unlink()
        file.symlink_to(file.name)

    def binary(file: Path) -> None:
        file.write_bytes(bytes(rng.randrange(256) for _ in range(4096)))

    def list_(file: Path) -> None:
        file.write_text("[1, 2]")

    names = ("config.json", SHARD, "tokenizer.json", "tokenizer_config.json", "generation_config.json", "LICENSE")
    for name in names:
        for change in (gone, empty, cut, folder, pipe, link, loop, binary, list_):
            yield Case(f"{name}-{change.__name__}", lambda p, n=name, c=change: c(p / n), TEXT)


def _indices(rng: random.Random) -> Iterator[Case]:
    def with_index(make: Callable[[dict[str, str]], Any]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            header, _ = header_of(path / SHARD)
            os.rename(path / SHARD, path / "model-00001-of-00001.safetensors")
            names = {name: "model-00001-of-00001.safetensors" for name in header if name != "__metadata__"}
            (path / "model.safetensors.index.json").write_text(json.dumps(make(names)))

        return apply

    targets = (
        "../x.safetensors",
        "/etc/passwd",
        "",
        ".",
        "a\x00b",
        "config.json",
        "x.bin",
        "\x1b[1mx.safetensors",
        "a" * 5000,
    )
    for i, target in enumerate(targets):
        yield Case(
            f"index-target-{i}",
            with_index(lambda n, t=target: {"weight_map": {**n, "model.norm.weight": t}}),
            PLAN,
            "index|safetensors",
        )
    for i, value in enumerate(VALUES):
        yield Case(f"index-map-{i}", with_index(lambda n, v=value: {"weight_map": v}), PLAN, "weight_map|index")
    many = {f"t{i}": "missing.safetensors" for i in range(200_000)}
    yield Case("index-many", with_index(lambda n: {"weight_map": {**n, **many}}), PLAN, "missing.safetensors|more")
    files = {f"t{i}": f"m{i}.safetensors" for i in range(20_000)}
    yield Case("index-many-files", with_index(lambda n: {"weight_map": {**n, **files}}), PLAN, "more")


TEMPLATES = {
    "loop": "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3,
    "double": "{% set n = namespace(x='aaaa') %}{% for a in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "multiply": "{{ 'a' * 9999999999 }}",
    "power": "{{ 9 ** 9 ** 9 }}",
    "empty": "",
    "blank": "{% for m in messages %}{% endfor %}   ",
    "attribute": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "undefined": "{{ nothing.at.all }}",
    "syntax": "{% for %}",
    "raises": "{{ raise_exception('\x1b]0;owned\x07\x1b[31mno') }}",
    "number": "{{ 1 / 0 }}",
    "recursive": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "format": "{{ '%999999999d' % 1 }}",
    "join": "{{ range(99999) | join('x' * 99999) }}",
}


def _tokenizers() -> Iterator[Case]:
    def tokenizer(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
        def apply(path: Path) -> None:
            value = json.loads((path / "tokenizer.json").read_text())
            change(value)
            (path / "tokenizer.json").write_text(json.dumps(value))

        return apply

    for name, template in TEMPLATES.items():
        yield Case(
            f"template-{name}",
            lambda p, t=template: (p / "chat_template.jinja").write_text(t),
            TEXT + " --calibration ../chat.jsonl",
            "chat template",
        )
    pad = {
        "strategy": {"Fixed": 10**9},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "x",
    }
    yield Case("padding", tokenizer(lambda t: t.update(padding=pad)), TEXT)
    cut = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    yield Case("truncation", tokenizer(lambda t: t.update(truncation=cut)), TEXT)
    for key in ("model", "pre_tokenizer", "normalizer", "post_processor", "decoder", "added_tokens"):
        for i, value in enumerate(("x", 7, [], {}, {"type": "x"})):
            yield Case(f"tokenizer-{key}-{i}", tokenizer(lambda t, k=key, v=value: t.update({k: v})), TEXT)
    for i, value in enumerate(VALUES):
        yield Case(
            f"eos-{i}",
            lambda p, v=value: (p / "generation_config.json").write_text(json.dumps({"eos_token_id": v})),
            TEXT,
        )
        yield Case(
            f"tokenizer-config-{i}",
            lambda p, v=value: (p / "tokenizer_config.json").write_text(
                json.dumps({"eos_token": v, "chat_template": v})
            ),
            TEXT,
        )


def _damage(rng: random.Random) -> Iterator[Case]:
    for i in range(20):
        place, bit = rng.random(), rng.randrange(8)

        def flip(path: Path, place: float = place, bit: int = bit) -> None:
            content = bytearray((path / SHARD).read_bytes())
            length = 8 + struct.unpack("<Q", content[:8])[0]
            content[int(place * length)] ^= 1 << bit
            (path / SHARD).write_bytes(content)

        yield Case(f"header-bit-{i}", flip, (PLAN, LOOK)[i % 2])

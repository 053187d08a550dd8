"""Write a checkpoint while its tensors come, so that a crash never leaves something that loads.

Shards grow in `OUT/.dsc_partial/`, each synced, read back and compared when it is full. `finish` gives them their
names, then come the index, the tokenizer's files, the manifest, the model card, and config.json last: without it
nothing loads a directory. Left by an exception, the writer removes what it wrote; with `resume=True` it keeps finished
shards, and the next writer on the same directory goes on after them, also after `kill -9`.
"""

from __future__ import annotations

import copy
import fnmatch
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import blake3
from torch import Tensor

from deepseek_compress.checkpoint.card import model_card
from deepseek_compress.checkpoint.files import (
    disk_errors,
    inside,
    json_text,
    remove,
    remove_empty,
    remove_tree,
    replacing,
    sync,
    write_file,
    write_json,
    write_sealed,
)
from deepseek_compress.checkpoint.header import module_of
from deepseek_compress.checkpoint.joining import join
from deepseek_compress.checkpoint.ledger import Ledger, OpenShard, input_parts, parts_of, read_ledger
from deepseek_compress.checkpoint.owned import (
    CONFIG,
    PARTIAL,
    announce,
    forget,
    recorded,
    refuse_foreign,
    refuse_to_overwrite,
    unname_shards,
)
from deepseek_compress.checkpoint.quantization_config import (
    Stored,
    assign_schemes,
    input_activations,
    quantization_config,
)
from deepseek_compress.checkpoint.reader import INDEX, Checkpoint
from deepseek_compress.checkpoint.shards import Shard
from deepseek_compress.checkpoint.verified import CARD, MANIFEST, described
from deepseek_compress.errors import DscError
from deepseek_compress.numerics.types import Quantized

COPIED = (
    "tokenizer*.json", "tokenizer*.model", "*.tiktoken", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "vocab.txt", "merges.txt", "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*",
)  # fmt: skip
BLOCKS = ("weight_block_size", "scale_fmt")  # of quantization_config


class _Closing(NamedTuple):
    number: int
    shard: OpenShard
    result: Future[Ledger]


class CheckpointWriter:
    """`with CheckpointWriter(out, source) as writer: writer.add(...); ...; writer.finish({}, manifest, [])`."""

    def __init__(
        self,
        out: Path,
        source: Checkpoint,
        *,
        shard_bytes: int = 5_000_000_000,
        expected_bytes: int = 0,
        activations: Mapping[str, Any] | None = None,
        resume: bool = False,
    ) -> None:
        """Claim the directory `out`.

        expected_bytes: what will be written, if known; refused where the disk has less.
        activations: scheme for the manifest, `{"num_bits": 8, "granularity": "token"}`; servers read it too where
            they know it (`input_activations`), with the grids of a static one. Symmetric 8-bit weights with one scale
            a row are then stored as `int-quantized`.
        resume: keep finished shards when left by an exception, and go on after those that are there.
        """
        self.out, self.source = Path(out), source
        self._partial = self.out / PARTIAL
        self._shard_bytes = shard_bytes
        self._activations = dict(activations) if activations else None
        self._resume = resume
        self._ledgers: dict[int, Ledger] = {}  # of finished shards, by number
        self._open: OpenShard | None = None
        self._closing: _Closing | None = None  # a full shard, synced and read back while the next one grows
        self._thread = ThreadPoolExecutor(max_workers=1)
        self._finished = False
        self._joined: Path | None = None  # the file of the one shard that all were put into
        self._claim(expected_bytes)

    @property
    def written(self) -> frozenset[str]:
        """Logical tensors that are safe on the disk: what a resumed run does not make again."""
        return frozenset(name for ledger in self._ledgers.values() for name in ledger.stored)

    @property
    def ledgers(self) -> list[Ledger]:
        """Of the finished shards, in the order of their numbers."""
        return [self._ledgers[number] for number in sorted(self._ledgers)]

    @property
    def dynamic_int8(self) -> bool:
        """Whether inputs are rounded to 8 bits at run time, which `ledger.parts_of` asks."""
        return self._activations is not None

    def shard_path(self, number: int) -> Path:
        """Where shard `number` (from 1) grows; a process that writes an `OpenShard` there is followed by `take`."""
        return self._partial / f"shard-{number:05d}.safetensors"

    def in_sequence(self) -> None:
        """Forget shards after the first that is missing or damaged, so that resumed ones get the same numbers."""
        for number in [n for place, n in enumerate(sorted(self._ledgers), 1) if n != place]:
            del self._ledgers[number]
            remove(self.shard_path(number))
            remove(self.shard_path(number).with_suffix(".json"))

    def has(self, number: int) -> bool:
        """Whether shard `number` is finished."""
        return number in self._ledgers

    def take(self, number: int) -> None:
        """Take up shard `number`, which another process finished."""
        ledger = read_ledger(self.shard_path(number), verify=False)  # read back by who wrote it
        if ledger is None:
            raise ValueError(f"{self.shard_path(number)} is not finished")
        self._ledgers[number] = ledger

    def add(self, name: str, tensor: Tensor | Quantized) -> None:
        """Write the logical tensor `name`: a plain one in its own type, a quantised one packed."""
        self.add_raw(name, parts_of(name, tensor, self.dynamic_int8))

    def add_raw(self, name: str, parts: Mapping[str, Tensor]) -> None:
        """Write stored parts unchanged (`Checkpoint.read_raw`): FP8 stays FP8, packed stays packed."""
        self._room(name).add(name, parts)

    def copy(self, name: str, *, decode: bool = False) -> None:
        """Write a tensor of the source unchanged, or decoded to BF16 where its encoding cannot stay."""
        self._room(name).copy(self.source, name, decode)

    def keep(self, name: str) -> None:
        """Write a tensor of the source with its values, as servers read it with packed weights."""
        self._room(name).keep(self.source, name)

    def append(self, name: str, write: Callable[[OpenShard], None]) -> None:
        """Let `write` put the tensor `name` into a shard."""
        write(self._room(name))

    def _room(self, name: str) -> OpenShard:
        """Return the shard that takes `name`: a new one when the last is full."""
        parts = [ledger.stored for ledger in self._ledgers.values()]
        parts += [shard.stored for shard in (self._open, self._closing and self._closing.shard) if shard]
        if any(name in stored for stored in parts):
            raise ValueError(f"{name} is written twice")
        if self._open is not None and (self._open.file.bytes >= self._shard_bytes or self._open.file.full):
            self._roll()
        if self._open is None:
            self._open = OpenShard(self.shard_path(self._next), self._thread)
        return self._open

    @property
    def _next(self) -> int:
        return max(self._ledgers, default=0) + (self._closing is not None) + 1

    def flush(self) -> None:
        """End the current shard and wait until it is safe: from here on a resumed run has it."""
        self._roll()
        self._settle()

    def join(self) -> None:
        """Put all shards into one where that is no more than one may hold."""
        self.flush()
        total = sum(ledger.shard.bytes for ledger in self.ledgers)
        if len(self._ledgers) > 1 and total <= self._shard_bytes:
            parts = [(self.shard_path(number), self._ledgers[number]) for number in sorted(self._ledgers)]
            self._joined = self._partial / "joined.safetensors"
            self._ledgers = {1: join(self._joined, parts, self._thread)}

    def finish(
        self, config_changes: Mapping[str, Any], manifest: Mapping[str, Any], ignore: Iterable[str], card: str = ""
    ) -> list[str]:
        """Give the shards their names and write everything else, config.json last. Returns notes for the user.

        config_changes: keys to set in config.json, None to remove one. manifest: see `provenance`; a `kv_cache` that it
        does not tell stays the source's. ignore: modules that stay plain, names or "re:" patterns; what is missing is
        added. card: Markdown for the model card's middle part.
        """
        self.flush()
        if not self._ledgers:
            raise ValueError("nothing was written")
        notes: list[str] = []
        config = self._config(config_changes, ignore, notes)
        self._add_input_grids(config)
        self.source.check_unchanged()
        copied = copied_files(self.source.path)
        named = self._shard_names()
        others = [INDEX, MANIFEST, CARD, CONFIG, *(file.name for file in copied)]
        announce(self.out, [*named, *others])
        files = self._name_shards(named)
        self._write_index(files)
        for file in copied:
            with replacing(self.out / file.name) as target, open(file, "rb") as given:
                shutil.copyfileobj(given, target)
        facts = {"kv_cache": self.source.kv_cache, **manifest, "activations": self._activations}
        write_file(self.out / CARD, model_card(self.source, config, facts, card).encode("utf-8"))
        config_text = json_text(config)
        written = {name: {"bytes": shard.bytes, "blake3": shard.blake3} for name, shard in files.items()}
        written |= {CONFIG: {"bytes": len(config_text), "blake3": blake3.blake3(config_text).hexdigest()}}
        small = [INDEX, CARD, *(file.name for file in copied), *(file.name for file in self.out.glob("dsc_layers.*"))]
        facts["files"] = dict(sorted({**described(self.out, small), **written}.items()))
        write_sealed(self.out / MANIFEST, facts)
        write_file(self.out / CONFIG, config_text)
        self._finished = True
        remove_tree(self._partial)
        forget(self.out)
        return notes

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._finished:
            self._thread.shutdown()
        else:
            self._abandon()

    def _roll(self) -> None:
        """Hand the current shard to the thread that syncs and reads it back; at most one is under way."""
        self._settle()
        if self._open is not None:
            self._closing = _Closing(self._next, self._open, self._thread.submit(self._open.close))
            self._open = None

    def _settle(self) -> None:
        """Wait for the shard under way."""
        if self._closing is not None:
            self._ledgers[self._closing.number] = self._closing.result.result()
            self._closing = None

    def _abandon(self) -> None:
        """Leave nothing that loads; with `resume`, the finished shards stay."""
        self._thread.shutdown(wait=True)
        if self._open is not None:
            self._open.discard()
        if self._closing is not None and self._closing.result.exception() is not None:
            self._closing.shard.discard()
        if self._resume:
            unname_shards(self.out, self._partial)
        self._remove_output()
        if not self._resume:
            remove_tree(self._partial)
        remove_empty(self.out)

    def _claim(self, expected_bytes: int) -> None:
        if self.out.resolve() == self.source.path.resolve():
            raise DscError(f"{self.out}: input and output are the same directory", "give another output directory")
        refuse_foreign(self.out)
        self._refuse_to_overwrite()
        with disk_errors(self.out):
            self._partial.mkdir(parents=True, exist_ok=True)
            if self._resume:
                unname_shards(self.out, self._partial)
            self._remove_output()
            self._take_up()
            free = shutil.disk_usage(self.out).free
        missing = expected_bytes - sum(ledger.shard.bytes for ledger in self.ledgers) - free
        if missing > 0:
            self._abandon()
            gib = 1 << 30
            raise DscError(
                f"{self.out}: {expected_bytes / gib:.2f} GiB to write, {free / gib:.2f} GiB free",
                f"free {missing / gib:.2f} GiB, then run the same command again to resume",
            )

    def _take_up(self) -> None:
        """Finished shards of the run before; what has no ledger is unfinished and goes."""
        for file in sorted(self._partial.glob("shard-*.safetensors")):
            number = file.stem.removeprefix("shard-")
            ledger = read_ledger(file) if self._resume and number.isdigit() else None
            if ledger is not None:
                self._ledgers[int(number)] = ledger
        known = {self.shard_path(number).stem for number in self._ledgers}
        for file in self._partial.iterdir():
            if file.stem not in known:
                remove(file)

    def _refuse_to_overwrite(self) -> None:
        """Raise Problems for files of the user's that have the name of one of an output."""
        copied = [file.name for file in copied_files(self.source.path)]
        refuse_to_overwrite(self.out, [INDEX, CARD, CONFIG, MANIFEST, *copied])

    def _remove_output(self) -> None:
        """Remove the recorded files of an earlier output: first config.json, without which the rest does not load,
        last the manifest, which records them."""
        for name in sorted(recorded(self.out), key=lambda name: (name == MANIFEST, name != CONFIG)):
            remove(self.out / name)
        forget(self.out)

    def _config(self, changes: Mapping[str, Any], ignore: Iterable[str], notes: list[str]) -> dict[str, Any]:
        """Return the published config with as little changed as possible; its keys survive, known to us or not."""
        config = copy.deepcopy(self.source.config)
        if config.pop("auto_map", None):
            notes.append("auto_map dropped from config.json: code of the checkpoint is neither run nor copied")
        published = config.pop("quantization_config", None)
        stored = self._stored()
        schemes, plain, kept = assign_schemes(stored)
        raw = any(how.format == "untouched" for how in stored.values())
        if schemes and kept:
            raise ValueError(f"{kept[0]} keeps its published encoding with packed weights: decode it")
        if schemes:
            inputs = input_activations(self._activations, schemes)
            config["quantization_config"] = quantization_config(schemes, plain, ignore, inputs)
            if raw:  # compressed-tensors passes over these keys
                config["quantization_config"] |= {key: published[key] for key in BLOCKS if key in (published or {})}
        elif kept or raw:
            config["quantization_config"] = self._published(published or {}, plain)
        for key, value in changes.items():
            config[key] = value
            if value is None:
                del config[key]
        return config

    def _add_input_grids(self, config: Mapping[str, Any]) -> None:
        """Write a shard with the grids of static activations, where config.json says that servers use them."""
        groups = (config.get("quantization_config") or {}).get("config_groups") or {}
        if not any((group.get("input_activations") or {}).get("dynamic") is False for group in groups.values()):
            return
        assert self._activations is not None
        there = {name for ledger in self.ledgers for name in ledger.shard.names}
        for name in [module for module, its in assign_schemes(self._stored())[0].items() if not its.table]:
            scale, zero_point = self._activations["inputs"][name]
            for part, tensor in input_parts(scale, zero_point, self._activations["symmetric"]).items():
                if f"{name}.{part}" not in there:
                    self.add(f"{name}.{part}", tensor)
        self.flush()

    def _published(self, quantization: dict[str, Any], plain: list[str]) -> dict[str, Any]:
        """Return the source's own scheme; linears that it had encoded and that are plain now are named."""
        encoded = {module_of(n)[0] for n, info in self.source.header.tensors.items() if info.encoding != "plain"}
        changed = sorted(encoded & set(plain))
        if changed:
            before = quantization.get("modules_to_not_convert") or []
            quantization["modules_to_not_convert"] = [*before, *changed]
        return quantization

    def _stored(self) -> dict[str, Stored]:
        """Logical name -> how it is stored, in the order of the shards."""
        return {name: how for ledger in self.ledgers for name, how in ledger.stored.items()}

    def _shard_names(self) -> dict[str, int]:
        """Return final name -> number of a shard."""
        count = len(self._ledgers)
        return {f"model-{i:05d}-of-{count:05d}.safetensors": n for i, n in enumerate(sorted(self._ledgers), 1)}

    def _name_shards(self, named: Mapping[str, int]) -> dict[str, Shard]:
        for name, number in named.items():
            with disk_errors(self.out / name):
                os.replace(self._joined or self.shard_path(number), self.out / name)
        sync(self.out)
        return {name: self._ledgers[number].shard for name, number in named.items()}

    def _write_index(self, files: Mapping[str, Shard]) -> None:
        weight_map = {tensor: file for file, shard in files.items() for tensor in shard.names}
        total = sum(stored.bytes for stored in self._stored().values())
        write_json(self.out / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copied_files(folder: Path) -> list[Path]:
    """Files of a checkpoint that go along byte for byte; never code, never out of its directory."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    wanted = [file for file in files if any(fnmatch.fnmatch(file.name, pattern) for pattern in COPIED)]
    return [file for file in wanted if file.suffix != ".py" and inside(folder, file)]

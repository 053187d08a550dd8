"""Manifests: what went in, hashed, and every stage since the published checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import blake3
import torch

from deepseek_compress.checkpoint import CheckpointWriter, open_checkpoint
from deepseek_compress.provenance import build_manifest, fingerprint, lineage_of, read_manifest, source_facts, versions


def test_a_manifest_names_its_source_and_inputs(tiny_v3: Path, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("{}\n")
    source = open_checkpoint(tiny_v3)
    manifest = build_manifest(
        stage="compress",
        source=source,
        recipe="name: x\n",
        seed=3,
        knobs={"group_size": 64},
        inputs={"text": text},
        name="V3",
    )
    assert manifest["source"]["name"] == "V3"
    assert manifest["source"]["files"] == {
        file.name: {"bytes": file.stat().st_size, "blake3": blake3.blake3(file.read_bytes()).hexdigest()}
        for file in sorted(tiny_v3.glob("*.safetensors"))
    }
    assert manifest["inputs"] == {"text": blake3.blake3(b"{}\n").hexdigest()}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["recipe"] == "name: x\n"
    text_form = json.dumps(manifest)
    assert str(tmp_path) not in text_form
    assert str(tiny_v3) not in text_form


def test_lineage_grows_by_a_step_and_hashes_are_taken_once(tiny_qwen2: Path, tmp_path: Path) -> None:
    path = tiny_qwen2
    for i, stage in enumerate(["prune", "quantize"]):
        source = open_checkpoint(path)
        path = tmp_path / stage
        with CheckpointWriter(path, source) as writer:
            for name in source.header.tensors:
                writer.copy(name)
            writer.finish({}, build_manifest(stage=stage, source=source, seed=i), [])
    output = open_checkpoint(path)
    assert [(step["stage"], step["seed"]) for step in lineage_of(output)] == [("prune", 0), ("quantize", 1)]
    assert [step["source"] for step in lineage_of(output)] == [tiny_qwen2.name, "prune"]
    facts = source_facts(output)
    assert output.manifest is not None
    assert facts["files"].items() <= output.manifest["files"].items()
    assert read_manifest(path) == output.manifest
    assert read_manifest(tiny_qwen2) is None


def test_the_fingerprint_tells_checkpoints_apart(tiny_v3: Path, tiny_v3_bf16: Path) -> None:
    source = open_checkpoint(tiny_v3)
    assert fingerprint(source) == fingerprint(open_checkpoint(tiny_v3))
    assert fingerprint(source) != fingerprint(open_checkpoint(tiny_v3_bf16))
    source.config["routed_scaling_factor"] = 1.0
    assert fingerprint(source) != fingerprint(open_checkpoint(tiny_v3))


def test_a_package_that_is_not_installed_is_none() -> None:
    assert versions(["no-such-distribution"])["no-such-distribution"] is None

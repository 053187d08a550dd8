"""A record of any number of models with everything a page can show; numbers are made up, the same every time."""

from __future__ import annotations

import random
from typing import Any

from deepseek_compress.reports import proof

METHODS = ("w4a16", "w4a8", "w8a8-static", "sparse24-w4a16", "w4a16-best", "w3a16")


def record(count: int) -> dict[str, Any]:
    """A reference and `count - 1` models made of it, an ablation beside them where there are more than two."""
    rng, models = random.Random(16), []
    for number in range(count):
        models.append(_model(rng, number))
    ablations = [{**_model(rng, 3), "name": "one-shot", "lineage": [{"stage": "compress", "source": "teacher"}]}]
    return {
        "schema": 1, "name": f"{count} models", "reference": "teacher", "models": models,
        "ablations": ablations if count > 2 else [],
        "artifacts": [_artifact(model) for model in models[1:]],
        "machine": {"cpu": "some processor of a long name @ 2.60GHz", "cores": 2, "memory_bytes": 25_000_000_000,
                    "gpu": None, "simd": ["avx2", "avx512"]},
        "versions": {"torch": "2.13.0", "deepseek_compress": "0.1"},
        "suite": {"name": "gsm8k.jsonl", "problems": 1319, "families": {"arithmetic": 700, "logic": 619}},
        "text": {"source": "wikitext-2 test", "tokens": 28_000, "windows": 56},
        "notes": ["A note of this run that says what it had to leave out, with the reason."],
        "recipe": "stages:\n  - compress:\n      weights: {gptaq: {num_bits: 4, group_size: 128}}\n",
    }  # fmt: skip


def _model(rng: random.Random, number: int) -> dict[str, Any]:
    loss = 0.0 if number == 0 else rng.uniform(-0.005, 0.12)
    exact, kl = 0.86 - loss, 0.0 if number == 0 else 0.01 + loss / 2
    size = 1_500_000_000 if number == 0 else int(rng.uniform(3.2e8, 9e8))
    speed = 21.0 if number == 0 else 21.0 * 1.2e9 / size
    metrics = {
        "exact_match": exact, "f1": exact + 0.02, "valid_steps": exact + 0.05, "perplexity": 9.1 + 4 * loss,
        "kl_divergence": kl, "top1_agreement": 1 - kl, "prefill_tokens_per_s": 310.0, "decode_tokens_per_s": 12.0,
        "peak_bytes": 2 * size,
    }  # fmt: skip
    name = "teacher" if number == 0 else f"{METHODS[(number - 1) % len(METHODS)]}{'' if number < 7 else f'-{number}'}"
    found: dict[str, Any] = {
        "name": name, "path": f"runs/comparison-of-recipes/{name}", "bytes": size, "parameters": 750_000_000,
        "bits_per_weight": 8 * size / 750e6, "metrics": metrics, "kv_cache_bytes_per_token": 28_672.0,
        "intervals": {"exact_match": [exact - 0.019, exact + 0.018], "kl_divergence": [0.9 * kl, 1.1 * kl]},
        "lineage": [],
        "families": {"arithmetic": {"exact_match": exact + 0.03}, "logic": {"exact_match": exact - 0.03}},
        "speed": {"runtime": proof.EVALUATION if number == 0 else "onnxruntime", "prefill_tokens_per_s": 15 * speed,
                  "decode_tokens_per_s": speed, "first_token_s": 0.31, "token_p95_s": 1.3 / speed,
                  "cpu_seconds_per_token": 2 / speed, "peak_bytes": size + 300_000_000,
                  "intervals": {"decode_tokens_per_s": [0.97 * speed, 1.02 * speed]}},
        "process": _process(rng, number),
    }  # fmt: skip
    if number:
        found |= {"lineage": [{"stage": "compress", "source": "teacher"}], "relative": {"exact_match": exact / 0.86},
                  "error_by_layer": [round(0.01 + 0.02 * (1 + loss * 20) * layer / 24, 5) for layer in range(24)],
                  "weight_errors": _weight_errors(loss),
                  "outliers_by_layer": [{"channels": layer % 3, "size": 0.2, "error": 0.1} for layer in range(4)],
                  "experts_by_layer": [None, {"changed": loss, "busiest": [0.1, 0.2], "idle": [1, 3]}],
                  "certainty": _certainty(loss), "flips": _flips(), "kl": _kl(kl),
                  "expert_coverage": _coverage(rng) if number < 3 else None}  # fmt: skip
    return found


def _artifact(model: dict[str, Any]) -> dict[str, Any]:
    return {"name": f"{model['name']}-onnx", "target": "onnxruntime", "path": f"{model['path']}/onnx/model.onnx",
            "bytes": model["bytes"] + 4_000_000, "status": "checked against the model",
            "note": "runs on the CPU of any machine with onnxruntime 1.22"}  # fmt: skip


def _process(rng: random.Random, number: int) -> dict[str, Any]:
    return {"answers": 1319, "tokens": 210.0 + rng.uniform(0, 60), "inflation": 1.0 + 0.02 * number, "cut": 0.01,
            "thinking_tokens": 160.0, "looped": 0.004, "no_think": None, "unclosed_think": 0.002, "no_answer": 0.003,
            "right_midway": 0.21, "verified_chains": 0.66, "first_wrong_step": {"2": 40, "3": 31}}  # fmt: skip


def _weight_errors(loss: float) -> dict[str, Any]:
    one = {"bits": 4.25, "weight_error": 0.01 + loss / 10, "output_error": 0.004 + loss / 20}
    return {
        "roles": [{"role": role, "linears": 72, **one} for role in ("attention", "expert", "shared_expert")],
        "worst": [{"name": f"model.layers.{layer}.mlp.experts.17.down_proj", **one} for layer in range(10)],
    }


def _certainty(loss: float) -> dict[str, Any]:
    p = 0.001 if loss > 0.04 else 0.4
    return {"difference": -loss, "interval": [-loss - 0.02, 0.02 - loss], "p": p, "p_holm": p, "lost": 61, "gained": 40,
            "problems": 1319, "hidden": 0.02, "needed": 6400, "level": 0.05}  # fmt: skip


def _flips() -> dict[str, Any]:
    def side(answer: str) -> dict[str, Any]:
        text = f"<think>\n48 / 2 = {answer}\n</think>\nThe answer is \\boxed{{{answer}}}. " + "More words. " * 40
        return {"answer": answer, "text": text, "tokens": 120, "first_wrong_step": None}

    question = "Natalia sold clips to 48 of her friends in April, and then half as many in May. How many in May?"
    one = {"kind": "lost", "question": question, "right": "24", "reference": side("24"), "model": side("23")}
    return {"lost": 61, "gained": 40, "changed": 0.09, "examples": [one, {**one, "kind": "gained"}]}


def _kl(mean: float) -> dict[str, Any]:
    bands = [{"from": 0.0, "to": 1.0, "share": 0.3}, {"from": 1.0, "to": None, "share": 0.7}]
    return {"median": mean / 8, "p90": 2 * mean, "p99": 9 * mean, "max": 60 * mean, "worst": [], "by_entropy": bands}


def _coverage(rng: random.Random) -> list[dict[str, Any]]:
    blocks = []
    for block in range(1, 24):
        tokens = [int(rng.lognormvariate(5, 1.4)) for _ in range(64)]
        blocks.append({"block": block, "tokens": tokens, "starved": [i for i, n in enumerate(tokens) if n < 12]})
    return blocks

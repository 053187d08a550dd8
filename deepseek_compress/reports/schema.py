"""The types of a report.json, checked where one is read: what comes after may rely on them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from typing_extensions import TypedDict

METRICS = (
    "exact_match", "f1", "valid_steps", "perplexity", "kl_divergence", "top1_agreement",
    "prefill_tokens_per_s", "decode_tokens_per_s", "peak_bytes",
)  # fmt: skip
_LARGE = 1e15
Number = Annotated[float, Field(ge=-_LARGE, le=_LARGE, allow_inf_nan=False)]
Positive = Annotated[float, Field(ge=0, le=_LARGE, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=int(_LARGE))]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Name = Annotated[str, Field(max_length=4000)]


class _Typed(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow")


class _Metrics(_Typed):
    exact_match: Share | None = None
    f1: Share | None = None
    valid_steps: Share | None = None
    perplexity: Positive | None = None
    kl_divergence: Number | None = None
    top1_agreement: Share | None = None
    prefill_tokens_per_s: Positive | None = None
    decode_tokens_per_s: Positive | None = None
    peak_bytes: Positive | None = None


class _Experts(_Typed):
    block: Count
    tokens: Annotated[list[Count], Field(min_length=1)]
    starved: list[Count | Name]


class _Certainty(_Typed):
    difference: Number
    interval: Annotated[list[Number], Field(min_length=2, max_length=2)]
    p: Share
    p_holm: Share
    lost: Count
    gained: Count
    problems: Count
    hidden: Positive
    needed: Count
    level: Share = 0.05


class _Process(_Typed):
    tokens: Positive
    inflation: Positive | None
    thinking_tokens: Positive | None
    cut: Share
    looped: Share
    unclosed_think: Share | None
    no_answer: Share
    right_midway: Share | None
    verified_chains: Share | None
    first_wrong_step: dict[Name, Count]


class _Sampled(_Typed):
    spread: Positive
    pass_at: dict[Annotated[str, Field(pattern=r"^[0-9]{1,4}$")], Share]


class _Answer(_Typed):
    answer: Name | None
    text: Name
    tokens: Count


class _Flip(_Typed):
    kind: Name
    question: Name
    right: Name
    model: _Answer
    reference: _Answer


class _Flips(_Typed):
    lost: Count
    gained: Count
    changed: Share
    examples: Annotated[list[_Flip], Field(max_length=100)]


_Band = TypedDict("_Band", {"from": Positive, "to": Positive | None, "share": Number})


class _Kl(_Typed):
    median: Number
    p90: Number
    p99: Number
    max: Number
    by_entropy: list[_Band]


class _Speed(_Typed):
    runtime: Name
    prefill_tokens_per_s: Positive | None
    decode_tokens_per_s: Annotated[float, Field(gt=0, le=_LARGE, allow_inf_nan=False)]
    intervals: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)] | None] | None = None
    first_token_s: Positive | None = None
    token_p95_s: Positive | None = None
    cpu_seconds_per_token: Positive | None = None
    peak_bytes: Positive | None = None


_Limits = Annotated[list[Number], Field(min_length=2, max_length=2)] | None


class _Aspect(_Typed):
    prompts: Count
    preferred: Share
    margin: Number
    interval: _Limits = None
    change: Number | None = None
    change_interval: _Limits = None
    lost: Count | None = None
    gained: Count | None = None
    p_holm: Share | None = None


class _Refusal(_Typed):
    kind: Name
    aspect: Name
    prompt: Name
    model: Name
    reference: Name


class _Refusals(_Typed):
    answers: Count
    share: Share
    of_safety: Share | None
    of_others: Share | None
    lost: Count | None = None
    gained: Count | None = None
    examples: Annotated[list[_Refusal], Field(max_length=100)] | None = None


class _Bias(_Typed):
    pairs: Count
    gap: Positive
    change: Number | None = None
    change_interval: _Limits = None


class _Filter(_Typed):
    inputs: Count
    outputs: Count


class _Safety(_Typed):
    aspects: Annotated[dict[Name, _Aspect], Field(max_length=100)] | None = None
    refusals: _Refusals | None = None
    bias: Annotated[dict[Name, _Bias], Field(max_length=1000)] | None = None
    filter: _Filter | None = None


class _Role(_Typed):
    role: Name
    linears: Count
    bits: Positive | None
    weight_error: Positive | None
    output_error: Positive | None


class _Linear(_Typed):
    name: Name
    bits: Positive
    weight_error: Positive
    output_error: Positive | None


class _WeightErrors(_Typed):
    roles: Annotated[list[_Role], Field(max_length=100)]
    worst: Annotated[list[_Linear], Field(max_length=100)]


class _Outliers(_Typed):
    channels: Count
    size: Share
    error: Share


class _Choices(_Typed):
    changed: Share
    busiest: Annotated[list[Share], Field(min_length=2, max_length=2)]
    idle: Annotated[list[Count], Field(min_length=2, max_length=2)]


class _Model(_Typed):
    name: Name
    certainty: _Certainty | None = None
    process: _Process | None = None
    sampled: _Sampled | None = None
    flips: _Flips | None = None
    kl: _Kl | None = None
    speed: _Speed | None = None
    safety: _Safety | None = None
    path: Name | None = None
    bytes: Count | None = None
    parameters: Count | None = None
    bits_per_weight: Positive | None = None
    metrics: _Metrics = _Metrics()  # that it is there is checked with the other keys
    intervals: dict[str, Annotated[list[Number], Field(min_length=2, max_length=2)] | None] | None = None
    lineage: list[dict[str, Any]] | None = None
    about: Name | None = None
    relative: dict[str, Number | None] | None = None
    families: dict[Name, _Metrics | None] | None = None
    error_by_layer: list[Positive] | None = None
    choice_by_layer: list[Positive | None] | None = None
    outliers_by_layer: list[_Outliers | None] | None = None
    experts_by_layer: list[_Choices | None] | None = None
    weight_errors: _WeightErrors | None = None
    kv_cache_bytes_per_token: Positive | None = None
    expert_coverage: list[_Experts] | None = None


class _Artifact(_Typed):
    name: Name
    target: Name | None = None
    path: Name | None = None
    bytes: Count | None = None
    status: Name | None = None
    note: Name | None = None


class _Suite(_Typed):
    name: Name
    problems: Count
    families: dict[Name, Count] = {}


class _Text(_Typed):
    source: Name
    tokens: Count
    windows: Count


class _Record(_Typed):
    name: Name | None = None
    reference: Name | None = None
    models: Annotated[list[_Model], Field(max_length=1000)] = []
    ablations: Annotated[list[_Model], Field(max_length=1000)] | None = None
    artifacts: list[_Artifact] = []
    machine: dict[str, Any] | None = None
    versions: dict[str, Any] | None = None
    suite: _Suite | None = None
    text: _Text | None = None
    notes: list[Annotated[str, Field(max_length=100_000)]] | None = None
    recipe: Annotated[str, Field(max_length=1 << 20)] | None = None
    sources: list[Name] | None = None


def mistyped(record: Mapping[str, Any], where: str) -> Iterator[str]:
    """Every value of a record that is not of its type: `PLACE: what is wrong`."""
    try:
        _Record.model_validate(dict(record))
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False, include_context=False):
            what = "Input should be an object" if item["type"] == "model_type" else item["msg"]
            yield f"{where}: {'.'.join(map(str, item['loc']))[:200]}: {what}"

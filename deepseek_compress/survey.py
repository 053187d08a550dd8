"""Contents of a checkpoint by role, and whether it is intact: `dsc inspect`."""

from __future__ import annotations

from typing import Any

from deepseek_compress.checkpoint import open_checkpoint
from deepseek_compress.checkpoint.inspect import summarize, verify_hashes
from deepseek_compress.errors import DscError
from deepseek_compress.models import Architecture
from deepseek_compress.models.resolve import resolve_model


def survey(model: str, verify: bool = True, sparsity: bool = False) -> dict[str, Any]:
    """`summarize` with the family's roles, plus `problems` ({"what", "fix"}) and `hashes`, what became of them."""
    checkpoint = open_checkpoint(resolve_model(model))
    problems: list[DscError] = []
    family = None
    try:
        family = Architecture.of(checkpoint).family
        problems += family.problems(checkpoint.header)
    except DscError as error:  # an unknown family still has tensors to show
        problems += getattr(error, "problems", [error])
    listed = (checkpoint.manifest or {}).get("files")
    broken = list(verify_hashes(checkpoint)) if verify else []
    hashes = "no manifest lists them" if not listed else "not verified" if not verify else "as written"
    return {
        **summarize(checkpoint, lambda name: str(family.role(name)) if family else "tensor", sparsity=sparsity),
        "hashes": "do not agree" if broken else hashes,
        "problems": [{"what": problem.what, "fix": problem.fix} for problem in [*problems, *broken]],
    }

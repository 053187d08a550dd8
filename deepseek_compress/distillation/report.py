"""Summary of a training for the run record, the model card and the terminal; and its memory forecast."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from deepseek_compress.distillation.students import Size, Student
from deepseek_compress.distillation.trainer import Schedule, State

WARN_KL = 0.5  # nats a token from the teacher, above which a result comes with a warning
SHOWN_LOSSES = 200


def kept(student: Student, size: Size) -> Iterator[str]:
    """Yield what stays of the model."""
    if "layers_kept" in student.facts:
        layers = student.facts["layers_kept"]
        yield f"{len(layers)} layers stay: {', '.join(map(str, layers))} (by {size.layers_by})"
    if "experts_kept" in student.facts:
        count = len(next(iter(student.facts["experts_kept"].values())))
        yield f"{count} experts a layer stay, in each routing group those of most {size.experts_by}"
    if size.active is not None:
        yield f"{size.active} experts run for a token, those that the router likes best"
    if "width_kept" in student.facts:
        sizes = " and ".join(f"{name} {value}" for name, value in student.facts["width_kept"].items())
        yield f"channels that add most to the hidden state stay: {sizes}"
    if "heads_kept" in student.facts:
        yield f"{student.facts['heads_kept']} heads of attention stay, those that add most to the hidden state"


def facts(state: State) -> dict[str, Any]:
    """Losses of the steps (every n-th where there are many), and the curve on the text held back."""
    every = max(1, len(state.losses) // SHOWN_LOSSES)
    found: dict[str, Any] = {"losses": state.losses[::every]}
    if state.losses:
        found |= {"trained_steps": state.step, "first_loss": state.losses[0], "last_loss": state.losses[-1]}
    if state.validations:
        found["validation"] = [measured._asdict() for measured in state.validations]
    return found


def card(state: State) -> str:
    """Return the curve as a table in Markdown; empty where nothing was held back."""
    if not state.validations:
        return ""
    rows = "\n".join(
        f"| {found.step} | {found.loss:.4f} | {found.kl:.4f} | {found.perplexity:.2f} | {found.accuracy:.1%} |"
        for found in state.validations
    )
    head = "| step | loss | KL to the teacher | perplexity | next token right |\n|---:|---:|---:|---:|---:|"
    return f"## Training\n\nOn text that was held back from it:\n\n{head}\n{rows}\n"


def notes(state: State, schedule: Schedule) -> Iterator[str]:
    """Yield the result in a line or two."""
    if not state.validations:
        return
    first, best = state.validations[0], min(state.validations, key=lambda found: found.loss)
    change = f"KL {first.kl:.4f} -> {best.kl:.4f}, perplexity {first.perplexity:.2f} -> {best.perplexity:.2f}"
    yield f"on {schedule.held_back} texts held back: {change}"
    if best.step < state.step:
        yield f"the weights after step {best.step} of {state.step} are the result: those after it did no better"
    if best.kl > WARN_KL:
        yield f"warning: KL {best.kl:.2f} is far from the teacher (above {WARN_KL}); train longer, or keep more"

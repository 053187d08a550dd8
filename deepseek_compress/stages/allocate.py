"""Allocate: which bits each unit of a model gets, by measurement, under a size. Nothing of the model is changed.

Each unit is stored alone at each option and the KL of the model's output is measured, or estimated from gradients; the
assignment with the least sum that keeps to the target is found exactly (a multiple-choice knapsack), and measured as a
whole. It is written as a plain recipe for `dsc quantize`, with the table of what each unit loses.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, SerializeAsAny, field_validator

from deepseek_compress import provenance
from deepseek_compress.checkpoint import Checkpoint, Header
from deepseek_compress.checkpoint.files import remove_tree, write_file, write_json, write_sealed
from deepseek_compress.checkpoint.owned import announce
from deepseek_compress.checkpoint.verified import MANIFEST
from deepseek_compress.compress import selection
from deepseek_compress.compress.fused_groups import fused_groups
from deepseek_compress.compress.overrides import Scheme, said
from deepseek_compress.errors import DscError
from deepseek_compress.evaluation import allocation, fisher, sensitivity
from deepseek_compress.evaluation.allocation import Sizes, Target
from deepseek_compress.evaluation.sensitivity import Choice, Search
from deepseek_compress.models import Architecture, Role
from deepseek_compress.numerics import MIGRATION, WEIGHTS, WeightQuantizer
from deepseek_compress.numerics.migration import Migration
from deepseek_compress.planning.costs import Work
from deepseek_compress.stages.base import Context, Forecast, Output, Stage, picked
from deepseek_compress.stages.resumable import Resumable
from deepseek_compress.stages.text import calibration_text
from deepseek_compress.workers import open_pool

WORK = ".dsc_allocate"  # in the output directory, while a run is unfinished
RECIPE, TABLE = "recipe.yaml", "sensitivity"
ROLES = frozenset(selection.CHANGEABLE) - {Role.INDEXER, Role.ENGRAM}  # as in `compress`, when its `keep` is not set
MIN_TOKENS = 64  # as in `compress`
LOSSES = {"kl": sensitivity.measure, "fisher": fisher.estimate}
OPTIONS = tuple(Scheme(num_bits=bits) for bits in (2, 3, 4, 5, 6, 8))


class Allocate(Stage, frozen=True):
    """Bits for each unit that servers fuse, found by KL under a target size, as a recipe for `compress`."""

    writes: ClassVar[str] = "artifact"
    target: str  # `3.5 bits per weight`, or `8 GiB`
    weights: Annotated[SerializeAsAny[WeightQuantizer], picked(WEIGHTS, "weights")] = Field(
        default_factory=lambda: WEIGHTS["gptq"].model_validate({})
    )
    # Goes into the recipe that is written and only helps there: the losses are measured with no scale moved.
    migration: Annotated[SerializeAsAny[Migration] | None, picked(MIGRATION, "migration")] = None
    options: tuple[Scheme, ...] = Field(OPTIONS, min_length=2)  # what a unit may become, where that differs
    method: Literal["kl", "fisher"] = "kl"  # measure each loss, or estimate all of them from gradients: see `fisher`
    windows: int = Field(16, gt=0)  # of text that judges: those after the ones that calibrate

    @field_validator("target")
    @classmethod
    def _a_size(cls, text: str) -> str:
        Target.parse(text)
        return text

    def problems(self, header: Header) -> list[DscError]:
        """Weights that are packed already, options that fit nothing, a target that none of them reaches."""
        architecture = Architecture.of(header)
        found = architecture.problems()
        if found:
            return found
        found = selection.problems(architecture, _roles(header), self._open_size(), None)
        if found:
            return found
        choices = self._choices(architecture)
        sizes, target = allocation.sizes(header, choices), Target.parse(self.target)
        least = sum(min(options) for options in sizes.options)
        return [allocation.too_small(sizes, target)] if least > sizes.budget(target) else []

    def reads_text(self, header: Header) -> bool:
        """Return True, whatever the model."""
        return True

    def forecast(self, header: Header, samples: int, length: int) -> Forecast:
        """Predict the costs of the tasks; the inputs of all blocks lie on disk while it runs."""
        architecture = Architecture.of(header)
        choices = tuple(self._choices(architecture))
        fitted = samples * length if self.weights.needs else 0
        cost = {"kl": sensitivity.cost, "fisher": fisher.cost}[self.method]
        memory, tasks, disk = cost(architecture.cfg, choices, self.windows * length, fitted)
        read = header.bytes
        return Forecast(header, len(choices), disk, memory, Work(), tasks, read)

    def run(self, source: Checkpoint, context: Context) -> Output:
        """Write `recipe.yaml`, `sensitivity.json` and `sensitivity.md`; goes on where an interrupted run stopped."""
        search, facts = self._search(source, context)
        forecast = self.forecast(source.header, *search.fitting.shape)
        assert forecast.memory is not None
        workers = context.count(forecast)
        sizes, target = allocation.sizes(source.header, search.choices), Target.parse(self.target)
        with open_pool(search, workers, context.ray, forecast.memory.task) as pool:
            losses = LOSSES[self.method](search, pool, context.progress)
            chosen = allocation.allocate(sizes, losses, target)
            context.tell("the whole assignment is measured")
            measured = sensitivity.joint(search, chosen, pool)
            plain = allocation.uniform(search.choices, sizes, target)
            plain_kl = None if plain is None else sensitivity.joint(search, plain, pool)
        found = self._facts(search.choices, sizes, losses, chosen, measured)
        moved: list[dict[str, Any]] = []
        if plain is not None and plain_kl is not None:
            found |= self._gain(sizes, losses, plain, plain_kl, found)
            moved = allocation.moved(search.choices, losses, plain, chosen)
            context.tell(_came_true(found))
        rows = allocation.table(search.choices, sizes, losses, chosen)
        self._write(context, search.choices, chosen, found, rows, moved)
        manifest = provenance.build_manifest(
            stage="allocate",
            source=source,
            recipe=context.recipe_text,
            seed=context.seed,
            extra={"calibration": facts, "facts": found},
        )
        write_sealed(context.out / MANIFEST, manifest)
        remove_tree(search.work)
        return Output("artifact", context.out / RECIPE, found)

    def _search(self, source: Checkpoint, context: Context) -> tuple[Search, dict[str, Any]]:
        """Prepare the measurement and its text, with the text's entry in the manifest."""
        architecture = context.architecture(source)
        choices = tuple(self._choices(architecture))
        fitted = context.text.samples if self.weights.needs else 0
        work = context.out / WORK
        text = calibration_text(source, context, work, samples=fitted + self.windows)
        fitting, judging = text.tokens[:fitted], text.tokens[fitted:]
        knobs = self.model_dump(mode="json", exclude={"target", "migration"})  # no loss follows from them
        Resumable.of(source, knobs, text.tokens, device=context.device).claim(context.out, work)
        return Search(architecture, choices, self.weights.needs, MIN_TOKENS, judging, fitting, work), text.facts

    def _open_size(self) -> WeightQuantizer:
        """Return the quantiser whose group size is still to be chosen, unless it is given."""
        return self.weights.model_copy(update={"num_bits": 4})  # 8 symmetric bits alone would mean one scale a row

    def _choices(self, architecture: Architecture) -> list[Choice]:
        roles = _roles(architecture.header)
        size = selection.select(architecture, roles, self._open_size()).group_size
        assert size is not None
        return allocation.choices(fused_groups(architecture, roles), self.weights, self.options, size)

    def _facts(
        self,
        choices: Sequence[Choice],
        sizes: Sizes,
        losses: Sequence[Sequence[float]],
        chosen: Sequence[int],
        measured: float,
    ) -> dict[str, Any]:
        taken = sizes.taken(chosen)
        shares: dict[str, int] = {}
        for choice, option in zip(choices, chosen, strict=True):
            scheme = said(choice.options[option])
            shares[scheme] = shares.get(scheme, 0) + choice.group.weights
        return {
            "asked": self.target,
            "bits_per_weight": taken / sizes.weights,
            "bytes": (taken + sizes.rest) // 8,
            "predicted_kl": sum(loss[option] for loss, option in zip(losses, chosen, strict=True)),
            "measured_kl": measured,
            "schemes": {scheme: weights / sizes.weights for scheme, weights in sorted(shares.items())},
        }

    def _gain(
        self, sizes: Sizes, losses: Sequence[Sequence[float]], plain: Sequence[int], measured: float,
        chosen: Mapping[str, Any],
    ) -> dict[str, Any]:  # fmt: skip
        """Compare the assignment with one number of bits for all units, as predicted and as measured."""
        predicted = sum(loss[option] for loss, option in zip(losses, plain, strict=True))
        return {
            "plain_bits_per_weight": sizes.taken(plain) / sizes.weights,
            "plain_predicted_kl": predicted,
            "plain_measured_kl": measured,
            "predicted_gain": predicted - chosen["predicted_kl"],
            "measured_gain": measured - chosen["measured_kl"],
        }

    def _write(
        self,
        context: Context,
        choices: Sequence[Choice],
        chosen: Sequence[int],
        facts: Mapping[str, Any],
        rows: Sequence[Mapping[str, Any]],
        moved: Sequence[Mapping[str, Any]],
    ) -> None:
        """Write the recipe and the table."""
        note = f"{facts['bits_per_weight']:.4g} bits per weight, found by dsc allocate (target {self.target}): "
        note += f"KL {facts['measured_kl']:.4g} nats a token, {facts['predicted_kl']:.4g} predicted"
        text = allocation.recipe(choices, chosen, self.weights, context.text.document(), note, self.migration)
        lines = [f"{key}: {value}" for key, value in facts.items() if key != "schemes"]
        lines += [f"{share:.1%} of the weights: {scheme}" for scheme, share in facts["schemes"].items()]
        lines.append("below: KL in nats a token with that unit alone stored so, what was chosen in bold")
        announce(context.out, [f"{TABLE}.json", f"{TABLE}.md", RECIPE])
        lines += [_came_true(facts)] if "measured_gain" in facts else []
        write_json(context.out / f"{TABLE}.json", {"schema": 1, **facts, "units": list(rows), "moved": list(moved)})
        page = allocation.markdown(rows, "Sensitivity", lines) + allocation.moved_lines(moved)
        write_file(context.out / f"{TABLE}.md", page.encode("utf-8"))
        write_file(context.out / RECIPE, text.encode("utf-8"))


def _came_true(facts: Mapping[str, Any]) -> str:
    """Whether the gain that was predicted is there, on the text that judged the units."""
    plain, bits = facts["plain_measured_kl"], facts["plain_bits_per_weight"]
    word = "came true" if facts["measured_gain"] > 0 else "did not come true: take one number of bits for all"
    gain = f"{facts['predicted_gain']:.4g} nats a token predicted, {facts['measured_gain']:.4g} measured"
    return f"one number of bits for all ({bits:.4g} bits per weight) has KL {plain:.4g}; gain: {gain}, it {word}"


def _roles(header: Header) -> frozenset[Role]:
    """Roles whose weights change: experts in MXFP4 stay as they are, as in `compress`."""
    return ROLES - {Role.EXPERT} if header.mxfp4 else ROLES

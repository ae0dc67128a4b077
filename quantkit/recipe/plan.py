"""Recipe × ModelGraph → assignments: every weight of every target has its scheme, or a reason why not."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from quantkit import registry
from quantkit.calibrate.statistics import Need
from quantkit.errors import RecipeError, UnsupportedError
from quantkit.model.fused import attention_of
from quantkit.model.graph import Block, ModelGraph, Weight
from quantkit.protocols import Assigned, Format, FormatFacts, Quantizer, Transform, Tunable, Tuner
from quantkit.recipe.spec import Recipe, Rule, Target
from quantkit.schemes import Scheme

# Raised whenever a change can alter the codes that the same plan produces: stores made before are
# then not continued.
NUMERICS_VERSION = 3


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """One target with nothing left to decide."""

    target: Target
    quantizer: Quantizer[Any]
    transforms: tuple[Transform, ...]
    format: Format
    default: Scheme
    schemes: Mapping[str, Scheme | None]
    facts: FormatFacts

    @property
    def name(self) -> str:
        return self.target.name

    def scheme_of(self, weight: Weight) -> Scheme | None:
        """The scheme of a weight inside the blocks, or None when it is kept."""
        return self.schemes[weight.key]

    def quantized(self) -> Iterator[Assigned]:
        """The weights that change, in model order."""
        return (a for a in self.facts.assigned if a.scheme is not None)

    @property
    def needs(self) -> Need:
        """What statistics of a site this target asks for."""
        used = [scheme for scheme in self.schemes.values() if scheme is not None]
        return needs_of(self.quantizer, self.transforms, used)

    @property
    def wants_reference(self) -> bool:
        """Whether calibration rows have to travel through the untouched model for it."""
        return not self.target.feedback or Need.CROSS in self.needs or self.tuner is not None

    @property
    def tuner(self) -> Tuner | None:
        """What improves the codes of a block once all of it has some, None where the method has nothing."""
        return self.quantizer.tuner if isinstance(self.quantizer, Tunable) else None

    @property
    def calibrated(self) -> bool:
        """Whether calibration text has to run for it."""
        return bool(self.needs) or self.target.kv_cache is not None

    def cache_names(self, block: Block) -> tuple[str, str] | None:
        """File names of the key and value scales of a block, None when the target has none."""
        attention = attention_of(block)
        if self.target.kv_cache is None or attention is None:
            return None
        return self.format.cache_scales(attention, self.target.kv_cache)

    def describe(self) -> dict[str, Any]:
        """All that can change the codes of this target, as JSON."""
        return {
            "method": self.target.method,
            "options": dict(self.target.options),
            "feedback": self.target.feedback,
            "transforms": [asdict(transform) for transform in self.target.transforms],
            "kv_cache": self.target.kv_cache,
            "schemes": {key: None if s is None else asdict(s) for key, s in self.schemes.items()},
            "numerics": NUMERICS_VERSION,
        }


@dataclass(frozen=True, slots=True)
class Resolved:
    """What can be done, and what stands in the way: `blockers` by target name."""

    targets: tuple[TargetPlan, ...]
    blockers: tuple[str, ...]


def needs_of(quantizer: Quantizer[Any], transforms: Sequence[Transform], schemes: Iterable[Scheme]) -> Need:
    """What statistics of a site are needed to make and to store codes of these schemes."""
    needs = quantizer.needs
    for transform in transforms:
        needs |= transform.needs
    if any(s.activations is not None and not s.activations.dynamic for s in schemes):
        needs |= Need.ABSMAX
    return needs


def key_of(description: Mapping[str, Any]) -> str:
    """Short content hash of a JSON description."""
    return hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]


def resolve(
    recipe: Recipe, graph: ModelGraph, source_dtype: str, version: str, model_type: str = ""
) -> Resolved:
    """Assign every weight of every target. Nothing raises here but a broken plugin: all that cannot be
    done is collected, so that a user sees every problem at once."""
    blockers = [_unmatched(rule, graph) for rule in _all_rules(recipe)]
    plans = []
    for target in recipe.targets:
        plan, problems = _resolve_target(recipe, target, graph, source_dtype, version, model_type)
        plans.append(plan)
        blockers += [f"{target.name}: {problem}" for problem in problems]
    return Resolved(tuple(plans), tuple(b for b in blockers if b))


def _resolve_target(
    recipe: Recipe, target: Target, graph: ModelGraph, source_dtype: str, version: str, model_type: str
) -> tuple[TargetPlan, list[str]]:
    fmt: Format = registry.load("formats", target.format).FORMAT
    quantizer: Quantizer[Any] = registry.load("methods", target.method).quantizer(target.params)
    transforms: tuple[Transform, ...] = tuple(
        registry.load("transforms", t.name).transform(t.params) for t in target.transforms
    )
    default = _as_stored(target.parsed_scheme(), fmt, source_dtype)
    problems: list[str] = []
    schemes: dict[str, Scheme | None] = {}
    assigned = []
    for block in graph.blocks:
        for weight in block.weights():
            try:
                scheme = _assign(recipe.rules_for(target), weight, block.index, len(graph.blocks), default)
            except RecipeError as error:
                scheme = None
                problems.append(f"`{weight.key}`: {error.message}")
            if scheme is not None:
                scheme = _as_stored(scheme, fmt, source_dtype)
            schemes[weight.key] = scheme
            assigned.append(Assigned(weight, scheme))
            # the format first: its usual method may have been chosen for other schemes
            if scheme is not None and (why := fmt.accepts(scheme, weight) or quantizer.accepts(scheme)):
                problems.append(f"`{weight.key}` cannot be {scheme.name}: {why}")
    for weight in graph.outer:
        scheme = _assign(recipe.rules_for(target), weight, None, len(graph.blocks), None)
        if scheme is not None:
            problems.append(
                f"`{weight.key}` is outside the blocks and stays {source_dtype}: most engines fill a "
                "quantized head or embedding with random values"
            )
    facts = FormatFacts(
        assigned=tuple(assigned),
        default=default,
        outer=graph.outer,
        act_order=quantizer.regroups_columns,
        method=target.method,
        version=version,
        linears=graph.linears,
        kv_cache=target.kv_cache,
        dtype=source_dtype,
        model_type=model_type,
    )
    plan = TargetPlan(target, quantizer, transforms, fmt, default, schemes, facts)
    return plan, [*_shortened(problems), *_target_problems(plan, graph)]


def _as_stored(scheme: Scheme, fmt: Format, source_dtype: str) -> Scheme:
    """The scheme with what is the format's choice."""
    return replace(scheme, scale_dtype=fmt.scale_dtype(source_dtype), convention=fmt.convention(scheme))


def _target_problems(plan: TargetPlan, graph: ModelGraph) -> list[str]:
    """What stands in the way of a target as a whole."""
    problems = []
    used = {scheme for scheme in plan.schemes.values() if scheme is not None}
    if plan.quantizer.regroups_columns and not plan.format.holds_column_groups():
        problems.append(
            f"act_order free needs a file that records column groups, which {plan.target.format} cannot"
        )
    if not used:
        problems.append("every weight is kept by a rule: there is nothing to quantize")
    if Need.CROSS in plan.needs and not plan.target.feedback:
        problems.append("corrected targets follow the stream of the quantized model: set feedback to true")
    for spec, transform in zip(plan.target.transforms, plan.transforms, strict=True):
        reasons = {why for scheme in used if (why := transform.accepts(scheme)) is not None}
        problems += [f"{spec.name}: {why}" for why in sorted(reasons)]
    if plan.target.kv_cache is not None:
        attending = [block for block in graph.blocks if attention_of(block) is not None]
        if not attending:
            problems.append("kv_cache: this model computes attention step by step: its keys cannot be seen")
        elif plan.cache_names(attending[0]) is None:
            problems.append(f"kv_cache: {plan.target.format} has no place for {plan.target.kv_cache} scales")
    try:
        plan.format.config(plan.facts)
    except UnsupportedError as error:
        problems.append(error.message)
    return problems


def _assign(
    rules: Sequence[Rule], weight: Weight, block: int | None, blocks: int, default: Scheme | None
) -> Scheme | None:
    """The first rule that matches decides; without one, `default`."""
    for rule in rules:
        if rule.matches(weight.module, block, blocks):
            if default is None:
                return None if rule.keep else Scheme(8)
            return rule.apply(default)
    return default


def _all_rules(recipe: Recipe) -> list[Rule]:
    return [*recipe.rules, *(rule for target in recipe.targets for rule in target.rules)]


def _unmatched(rule: Rule, graph: ModelGraph) -> str:
    """A rule that matches nothing is a mistake of spelling, said with close names; else empty."""
    blocks = len(graph.blocks)
    modules = [w.module for w in graph.outer]
    if any(rule.matches(w.module, None, blocks) for w in graph.outer):
        return ""
    for block in graph.blocks:
        for weight in block.weights():
            if rule.matches(weight.module, block.index, blocks):
                return ""
            modules.append(weight.module)
    close = difflib.get_close_matches(rule.match, modules, n=2, cutoff=0.4)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"rule {rule.match!r} matches no weight{hint}"


def _shortened(problems: list[str]) -> list[str]:
    """The first three problems and how many more there are: 80 blocks say the same thing 80 times."""
    if len(problems) <= 4:
        return problems
    return [*problems[:3], f"{len(problems) - 3:,} more weights likewise"]

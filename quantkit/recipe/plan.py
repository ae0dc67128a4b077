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
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import RecipeError, UnsupportedError
from quantkit.gguf.architectures import Model
from quantkit.model.fused import attention_of
from quantkit.model.graph import Block, ModelGraph, Weight
from quantkit.protocols import Assigned, Format, FormatFacts, Quantizer, Transform, Tunable, Tuner
from quantkit.recipe import mix, plugins
from quantkit.recipe.mix import Assignment
from quantkit.recipe.spec import Recipe, Rule, Target
from quantkit.schemes import Scheme

# Raised whenever a change can alter the codes that the same plan produces: stores made before are
# then not continued.
NUMERICS_VERSION = 3


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """One target with nothing left to decide.

    schemes  by `Weight.key`: of every matrix inside the blocks, and outside where the format quantizes it
    notes    what was decided otherwise than asked, and why
    """

    target: Target
    quantizer: Quantizer[Any]
    transforms: tuple[Transform, ...]
    format: Format
    default: Scheme
    schemes: Mapping[str, Scheme | None]
    facts: FormatFacts
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.target.name

    def scheme_of(self, weight: Weight) -> Scheme | None:
        """The scheme of a weight, or None when it is kept."""
        return self.schemes.get(weight.key)

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
class Described:
    """What is known of a source beside its graph: its config.json, shapes of tensors by checkpoint name."""

    dtype: str
    model_type: str
    config: Mapping[str, Any]
    shapes: Mapping[str, tuple[int, ...]]

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Described:
        shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
        return cls(checkpoint.dtype, checkpoint.model_type, checkpoint.config, shapes)


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


def resolve(recipe: Recipe, graph: ModelGraph, source: Described, version: str) -> Resolved:
    """Assign every weight of every target. Nothing raises here but a broken plugin: all that cannot be
    done is collected, so that a user sees every problem at once."""
    others = _file_names(recipe, graph, source)
    blockers = [_unmatched(rule, graph, others) for rule in _all_rules(recipe)]
    plans = []
    for target in recipe.targets:
        plan, problems = _resolve_target(recipe, target, graph, source, version)
        plans.append(plan)
        blockers += [f"{target.name}: {problem}" for problem in problems]
    return Resolved(tuple(plans), tuple(b for b in blockers if b))


def _resolve_target(
    recipe: Recipe, target: Target, graph: ModelGraph, source: Described, version: str
) -> tuple[TargetPlan, list[str]]:
    fmt: Format = registry.load("formats", target.format).FORMAT
    quantizer: Quantizer[Any] = registry.load("methods", target.method).quantizer(target.params)
    transforms: tuple[Transform, ...] = tuple(
        registry.load("transforms", t.name).transform(t.params) for t in target.transforms
    )
    default = _as_stored(target.parsed_scheme(), fmt, source.dtype)
    rules = recipe.rules_for(target)
    if default.mix:
        given = _mixed(target, default, rules, graph, source, needs_of(quantizer, transforms, (default,)))
    else:
        given = _uniform(default, rules, graph, fmt, source.dtype)
    problems = [*given.problems]
    for weight in _matrices(graph, fmt):
        scheme = given.schemes.get(weight.key)
        # the format first: its usual method may have been chosen for other schemes
        if scheme is not None and (why := fmt.accepts(scheme, weight) or quantizer.accepts(scheme)):
            problems.append(f"`{weight.key}` cannot be {scheme.name}: {why}")
    facts = FormatFacts(
        assigned=tuple(Assigned(w, given.schemes.get(w.key)) for w in _matrices(graph, fmt)),
        default=default,
        outer=graph.outer,
        act_order=quantizer.regroups_columns,
        method=target.method,
        version=version,
        linears=graph.linears,
        kv_cache=target.kv_cache,
        dtype=source.dtype,
        model_type=source.model_type,
    )
    plan = TargetPlan(
        target, quantizer, transforms, fmt, default, given.schemes, facts, _shortened([*given.notes])
    )
    return plan, [*_shortened(problems), *_target_problems(plan, graph)]


def _matrices(graph: ModelGraph, fmt: Format) -> Iterator[Weight]:
    """What the format quantizes: all of a model, or what is inside its blocks."""
    yield from graph.weights()
    if fmt.container == "gguf":
        yield from graph.outer


def _mixed(
    target: Target,
    default: Scheme,
    rules: tuple[Rule, ...],
    graph: ModelGraph,
    source: Described,
    needs: Need,
) -> Assignment:
    """What the rules of a preset give."""
    params = plugins.make_params("allocate", plugins.MIXER, target.mix)
    try:
        model = Model.of(source.config)
        return mix.assign(default, params, rules, model, graph, source.shapes, bool(needs))
    except UnsupportedError as error:
        return Assignment({}, (), (error.in_one_line,))


def _uniform(
    default: Scheme, rules: tuple[Rule, ...], graph: ModelGraph, fmt: Format, source_dtype: str
) -> Assignment:
    """One scheme for all weights of the blocks that no rule is about."""
    problems: list[str] = []
    schemes: dict[str, Scheme | None] = {}
    for block in graph.blocks:
        for weight in block.weights():
            try:
                scheme = _assign(rules, weight, block.index, len(graph.blocks), default)
            except RecipeError as error:
                scheme = None
                problems.append(f"`{weight.key}`: {error.message}")
            schemes[weight.key] = None if scheme is None else _as_stored(scheme, fmt, source_dtype)
    for weight in graph.outer:
        if _assign(rules, weight, None, len(graph.blocks), None) is not None:
            problems.append(
                f"`{weight.key}` is outside the blocks and stays {source_dtype}: most engines fill a "
                "quantized head or embedding with random values"
            )
    return Assignment(schemes, (), tuple(problems))


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
    if not used and plan.schemes:
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


def _unmatched(rule: Rule, graph: ModelGraph, others: Sequence[tuple[str, int | None]]) -> str:
    """A rule that matches nothing is a mistake of spelling, said with close names; else empty. `others` are
    names that the matrices have in the files of a target."""
    blocks = len(graph.blocks)
    outer = [*((w.module, None) for w in graph.outer), *others]
    if any(rule.matches(module, block, blocks) for module, block in outer):
        return ""
    modules = [module for module, _ in outer]
    for block in graph.blocks:
        for weight in block.weights():
            if rule.matches(weight.module, block.index, blocks):
                return ""
            modules.append(weight.module)
    close = difflib.get_close_matches(rule.match, modules, n=2, cutoff=0.4)
    hint = f"; close: {', '.join(close)}" if close else ""
    return f"rule {rule.match!r} matches no weight{hint}"


def _shortened(problems: list[str]) -> tuple[str, ...]:
    """The first three problems and how many more there are: 80 blocks say the same thing 80 times."""
    if len(problems) <= 4:
        return tuple(problems)
    return (*problems[:3], f"{len(problems) - 3:,} more weights likewise")


def _file_names(recipe: Recipe, graph: ModelGraph, source: Described) -> list[tuple[str, int | None]]:
    """What rules may call matrices beside the source's names, and the block of each."""
    if not any(registry.load("formats", t.format).FORMAT.container == "gguf" for t in recipe.targets):
        return []
    try:
        return mix.names(Model.of(source.config), graph, source.shapes)
    except UnsupportedError:
        return []  # said by the target

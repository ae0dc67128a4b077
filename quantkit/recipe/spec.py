"""`Recipe`: everything that decides what a conversion does, in the words of the YAML file.

Frozen values that check themselves, so Python, YAML and flags have the same rules. Problems are
said as ``field: what is wrong``; the loader turns that into ``file:line:column path: …``.
The documentation of each field is also its ``--help`` text and its JSON Schema description.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from quantkit.errors import RecipeError
from quantkit.recipe import plugins
from quantkit.recipe.check import Range, check_types, complaint, refuse, said
from quantkit.recipe.rules import Rule
from quantkit.recipe.sizes import parse_size
from quantkit.schemes import CacheDtype, Scheme

Scalar = str | int | float | bool
DEFAULT_SET = "wikitext103"
DEFAULT_LENGTH = 2048
_DEVICE = re.compile(r"auto|cpu|cuda(:[0-9]+)?")
_PART = r"[A-Za-z0-9_{}][A-Za-z0-9._{}-]{0,95}"
_REPOSITORY = re.compile(rf"{_PART}/{_PART}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_BRANCH = re.compile(r"[A-Za-z0-9{][A-Za-z0-9._{}-]{0,99}")
_VARIABLE = re.compile(r"(?!hf_)[A-Za-z_][A-Za-z0-9_]{0,99}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
__all__ = [
    "Calibration",
    "Card",
    "Device",
    "Eval",
    "EvalText",
    "Gates",
    "Output",
    "Publish",
    "Recipe",
    "Rule",
    "Target",
    "TransformSpec",
]


@dataclass(frozen=True, slots=True)
class Output:
    """Where results go."""

    dir: Annotated[str, "folder for the results, one folder per target inside"] = "out"
    on_exists: Annotated[
        Literal["fail", "resume", "replace"], "what to do when the folder holds an earlier run"
    ] = "resume"
    shard_size: Annotated[str | None, "largest weight file, as 5GB; null: 5GB, of gguf 50GB"] = None

    def __post_init__(self) -> None:
        check_types(self)
        problems = [] if self.dir else ["dir: is empty"]
        refuse(problems + complaint("shard_size", parse_size, self.shard_size))

    def shard_bytes(self, container: str) -> int:
        """`shard_size` in bytes. Not every engine reads GGUF files that are split, so they are only where the
        Hub asks for it."""
        return parse_size(self.shard_size or ("50GB" if container == "gguf" else "5GB"))


@dataclass(frozen=True, slots=True)
class Device:
    """What to compute on, and within which memory."""

    map: Annotated[str, "auto, cpu, cuda or cuda:N"] = "auto"
    max_memory: Annotated[str | None, "memory the run may use, as 20GiB; the default is what is free"] = None
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16"], "dtype of the forward pass; auto follows the source"
    ] = "auto"
    batch_tokens: Annotated[int, "tokens per micro-batch of the forward pass", Range(1)] = 2048

    def __post_init__(self) -> None:
        check_types(self)
        problems = complaint("max_memory", parse_size, self.max_memory)
        if not _DEVICE.fullmatch(self.map):
            problems.append(f"map: must be auto, cpu, cuda or cuda:N, not {self.map!r}")
        refuse(problems)

    @property
    def max_bytes(self) -> int | None:
        """`max_memory` in bytes; None: what is free."""
        return None if self.max_memory is None else parse_size(self.max_memory)


@dataclass(frozen=True, slots=True)
class Calibration:
    """What is known of the inputs of weights: statistics of a text (`set` or `file`, by default wikitext103),
    or an importance matrix, which holds mean squares alone."""

    set: Annotated[str | None, "name of a calibration set, as wikitext103 or embedded"] = None
    file: Annotated[str | None, "text file to calibrate on instead of a set"] = None
    rows: Annotated[int, "rows of text", Range(1)] = 256
    length: Annotated[
        int | None, "tokens per row; null: 2048, or the context of the model when that is shorter", Range(8)
    ] = None
    seed: Annotated[int | None, "seed of the choice of rows; null: the first rows in order", Range(0)] = 0
    template: Annotated[Literal["raw", "chat"], "raw text, or wrapped in the chat template"] = "raw"
    max_chars: Annotated[int | None, "read no more than this many characters of the text", Range(1)] = None
    imatrix: Annotated[
        str | None, "importance matrix of llama.cpp (or quantkit calibrate) in place of text"
    ] = None

    def __post_init__(self) -> None:
        check_types(self)
        given = [name for name in ("set", "file", "imatrix") if getattr(self, name) is not None]
        if len(given) > 1:
            raise RecipeError(f"{given[1]}: `{given[0]}` and `{given[1]}` exclude each other")
        if not given:
            object.__setattr__(self, "set", DEFAULT_SET)

    @property
    def source(self) -> str:
        """What it is called: a set, or a file."""
        return self.set or self.file or self.imatrix or ""


@dataclass(frozen=True, slots=True)
class EvalText:
    """One perplexity measurement. Exactly one of `data` and `file`."""

    data: Annotated[str | None, "name of an evaluation text, as wikitext2 or embedded"] = None
    file: Annotated[str | None, "text file to evaluate on instead"] = None
    style: Annotated[
        Literal["llamacpp", "gptq"],
        "llamacpp: second half of each window of the raw text; gptq: all of each window but its first token",
    ] = "llamacpp"
    context: Annotated[int, "tokens per window", Range(8)] = 512
    chunks: Annotated[int | None, "only this many windows; null: all", Range(1)] = None

    def __post_init__(self) -> None:
        check_types(self)
        if (self.data is None) == (self.file is None):
            raise RecipeError("needs exactly one of `data` and `file`")


@dataclass(frozen=True, slots=True)
class Gates:
    """Limits that the results must keep; a failed gate ends with exit code 4 and keeps the files."""

    ppl_ratio_max: Annotated[float | None, "largest perplexity relative to the source", Range(0)] = None
    kl_mean_max: Annotated[float | None, "largest mean KL divergence, in nats", Range(0)] = None
    top1_agreement_min: Annotated[
        float | None, "smallest share of tokens whose most likely token is the source's", Range(0, 1)
    ] = None

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Eval:
    """What is measured about every target."""

    enabled: Annotated[bool, "measure the results"] = True
    perplexity: Annotated[tuple[EvalText, ...], "texts, each with its convention"] = (
        EvalText(data="wikitext2"),
    )
    kl: Annotated[bool, "KL divergence from the source and top-1 agreement on the same text"] = True
    gates: Annotated[Gates, "limits that the results must keep"] = field(default_factory=Gates)

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class TransformSpec:
    """One transform and its parameters; once made, every parameter has its value."""

    name: Annotated[str, "name of the transform, as smoothquant"]
    options: Annotated[Mapping[str, Any], "parameters of the transform"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        name = plugins.plugin_name("transforms", self.name)
        options = plugins.params_dict(plugins.make_params("transforms", name, self.options))
        object.__setattr__(self, "name", name)
        object.__setattr__(self, "options", options)

    @property
    def params(self) -> Any:
        """The transform's parameters as its own `Params`."""
        return plugins.make_params("transforms", self.name, self.options)


@dataclass(frozen=True, slots=True)
class Target:
    """One result: scheme × method × format. Empty fields take the format's usual value.

    Once made, `scheme`, `method`, `options` and `name` are filled in and canonical: two targets that
    do the same are equal.
    """

    format: Annotated[str, "how bytes are laid out, as gptq; nf4, fp8 and the like also name the scheme"]
    scheme: Annotated[str, "which numbers can be represented, as w4g128"] = ""
    method: Annotated[str, "how codes are chosen, as gptq or rtn"] = ""
    options: Annotated[Mapping[str, Any], "parameters of the method"] = field(default_factory=dict)
    transforms: Annotated[
        tuple[TransformSpec, ...], "what rescales inputs and weights before codes are chosen, as smoothquant"
    ] = ()
    kv_cache: Annotated[CacheDtype | None, "store scales for a key-value cache of this dtype; null: none"] = (
        None
    )
    feedback: Annotated[bool, "calibrate on the activations of the quantized blocks before"] = False
    name: Annotated[str, "name of the target and its folder"] = ""
    rules: Annotated[tuple[Rule, ...], "rules of this target, tried before the recipe's"] = ()
    mix: Annotated[Mapping[str, Scalar | None], "options of a gguf preset: pure, output, embedding"] = field(
        default_factory=dict
    )

    def __post_init__(self) -> None:
        check_types(self)
        info, asked = _located("format", plugins.resolve_format, self.format, self.scheme)
        scheme = _located("scheme", plugins.scheme_name, asked, info)
        usual = info.default_method(info.parse(scheme))
        mix = _located("mix", plugins.mix_options, info.parse(scheme), self.mix)
        method = plugins.plugin_name("methods", self.method or usual)
        _located("method", plugins.params_type, "methods", method)
        transforms = [transform.name for transform in self.transforms]
        refuse(f"transforms: {name!r} given twice" for name in sorted(set(transforms))
               if transforms.count(name) > 1)  # fmt: skip
        parts = [info.name, scheme, *([] if method == usual else [method]), *transforms]
        parts += [f"kv_{self.kv_cache}"] if self.kv_cache else []
        parts += [key if given is True else f"{key}_{given}" for key, given in mix.items() if given]
        name = self.name or "-".join([*parts, "feedback"] if self.feedback else parts)
        if not _NAME.fullmatch(name) or name.endswith("."):
            raise RecipeError(
                f"name: {name!r} cannot be a folder name; use letters, digits, dot, dash and underscore"
            )
        options = plugins.params_dict(plugins.make_params("methods", method, self.options))
        for key, value in (("format", info.name), ("scheme", scheme), ("method", method), ("name", name)):
            object.__setattr__(self, key, value)
        object.__setattr__(self, "options", options)
        object.__setattr__(self, "mix", mix)

    @property
    def params(self) -> Any:
        """The method's parameters as its own `Params`."""
        return plugins.make_params("methods", self.method, self.options)

    def parsed_scheme(self) -> Scheme:
        """The scheme as a value; its scale dtype is still the format's choice."""
        return plugins.format_info(self.format).parse(self.scheme)


def _located(name: str, ask: Any, *arguments: Any) -> Any:
    """`ask(*arguments)`, its problems said as problems of field `name`."""
    try:
        return ask(*arguments)
    except RecipeError as error:
        raise RecipeError(f"{name}: {said(error)}") from None


@dataclass(frozen=True, slots=True)
class Card:
    """What a model card holds beside what was measured."""

    notes: Annotated[
        str | None, "Markdown file of your own for the card; null: notes that are there stay; empty: they go"
    ] = None
    plot: Annotated[bool, "a plot of size against quality, where several targets were measured"] = True

    def __post_init__(self) -> None:
        check_types(self)


@dataclass(frozen=True, slots=True)
class Publish:
    """Where results are published; carried out by `push` and by `convert --push`."""

    repo: Annotated[
        str, "repository of the Hub, as name/model; {target} stands for the target where it needs several"
    ]
    visibility: Annotated[
        Literal["private", "public", "private-then-public"] | None,
        "private-then-public: public once all in it is verified; null: a new one private, others as they are",
    ] = None
    layout: Annotated[
        Literal["auto", "files", "branches", "repo-per-target"],
        "files: one repository; branches: one branch each; auto: files for gguf, else a repository each",
    ] = "auto"
    branch: Annotated[
        str | None,
        "branch to publish to; of layout branches its name, where {target} and {bpw} are filled in",
    ] = None
    create_pr: Annotated[bool, "open a pull request instead of committing"] = False
    when: Annotated[
        Literal["always", "gates-pass", "manual"],
        "whether convert --push publishes what breaks a gate, or at all",
    ] = "gates-pass"
    tag: Annotated[str | None, "tag for the published commit"] = None
    base_model: Annotated[str | None, "Hub id of the source, where it is a folder"] = None
    license: Annotated[str | None, "licence of the source, where its card says none"] = None
    license_confirmed: Annotated[
        bool, "publish under a licence that restricts derivatives or that is not known"
    ] = False
    token_env: Annotated[str | None, "environment variable with the token; null: HF_TOKEN or the login"] = (
        None
    )
    card: Annotated[Card, "what the model card holds beside what was measured"] = field(default_factory=Card)

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if not _REPOSITORY.fullmatch(self.repo):
            problems.append(
                f"repo: {self.repo!r} is not a repository as name/model; {{target}} may stand in it"
            )
        if self.branch is not None and not _BRANCH.fullmatch(self.branch):
            problems.append(f"branch: {self.branch!r} is no plain name; use letters, digits, dot and dash")
        if self.create_pr and self.branch is not None:
            problems.append("create_pr: a pull request makes its own branch; leave out `branch`")
        if self.create_pr and self.layout == "branches":
            problems.append("create_pr: a pull request is for one branch; choose another layout")
        if self.base_model is not None and not _HUB_ID.fullmatch(self.base_model):
            problems.append(f"base_model: {self.base_model!r} is not a Hub id as org/name")
        if self.token_env is not None and not _VARIABLE.fullmatch(self.token_env):
            problems.append("token_env: give the name of a variable, never the token itself")
        refuse(problems)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One sweep: one source, one calibration text, any number of targets."""

    source: Annotated[str, "Hub id (with @revision if wanted), folder, or demo for the embedded model"]
    targets: Annotated[tuple[Target, ...], "what to make: shorthands as gptq:w4g128, or mappings"]
    quantkit: Annotated[Literal[1], "version of the recipe schema"] = 1
    output: Annotated[Output, "where results go"] = field(default_factory=Output)
    device: Annotated[Device, "what to compute on"] = field(default_factory=Device)
    calibration: Annotated[Calibration, "the text that statistics are taken from"] = field(
        default_factory=Calibration
    )
    eval: Annotated[Eval, "what is measured about every target"] = field(default_factory=Eval)
    rules: Annotated[tuple[Rule, ...], "weights kept or quantized differently; the first match decides"] = ()
    engine_check: Annotated[
        bool,
        "load every result in the engine it is for, where that is installed, and compare what it computes",
    ] = True
    publish: Annotated[Publish | None, "where results are published; null: nowhere"] = None
    vars: Annotated[Mapping[str, Scalar], "values for ${vars.name}"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_types(self)
        problems = []
        if not self.source.strip():
            problems.append("source: is empty")
        if not self.targets:
            problems.append("targets: at least one is needed")
        first: dict[str, int] = {}
        for number, target in enumerate(self.targets, 1):
            # File systems that ignore case would put both into one folder.
            other = first.setdefault(target.name.lower(), number)
            if other != number:
                problems.append(
                    f"targets: numbers {other} and {number} are both named {target.name!r}; "
                    "give one another `name`"
                )
        refuse(problems)

    def rules_for(self, target: Target) -> tuple[Rule, ...]:
        """The rules about a target's weights in the order they are tried."""
        return (*target.rules, *self.rules)

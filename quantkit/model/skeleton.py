"""The model without weights: Transformers' own code on the meta device, decoder blocks set apart.

The blocks are found generically and replaced by stubs. The model's own forward then runs the
embeddings, makes masks and position embeddings, and calls the stubs, which hand every call to a
visitor. So nothing about an architecture is written here.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.names import Layout, Match, match_names, settle
from quantkit.model.observe import Observer, Producers, Product, identity

_TRACE_ROWS, _TRACE_LENGTH = 2, 8
_COMPARED_ROWS = 4096
# Attributes in which blocks of one kind differ without being different.
_COUNTERS = frozenset({"layer_idx", "layer_id", "layer_number", "idx"})


@dataclass(frozen=True, slots=True)
class Call:
    """How the model called a block: everything but the hidden states."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def to(self, device: torch.device) -> Call:
        """The same call with its tensors on `device`."""
        args, kwargs = tree_map_only(Tensor, lambda t: t.to(device), (self.args, dict(self.kwargs)))
        return Call(args, kwargs)


Visitor = Callable[[int, Tensor, Call], Tensor]


@dataclass(frozen=True, slots=True)
class Use:
    """A product seen on the meta device; `activation` numbers what fed it, within its block.

    producer   the vector parameter that scaled the activation, None when there is none of its own
    """

    parameter: str
    first: int
    last: int
    stride_in: int
    index: int
    activation: int
    producer: str | None


@dataclass(frozen=True, slots=True)
class Trace:
    """What one run of a block showed: its products in order, and whether it returns a tuple."""

    uses: tuple[Use, ...]
    returns_tuple: bool


class _Stub(nn.Module):
    """Stands where a block was: hands its call to the visitor, answers for the block's attributes."""

    def __init__(self, index: int, block: nn.Module, visit: Callable[[int, Tensor, Call], Any]) -> None:
        super().__init__()
        self.index = index
        self.visit = visit
        # In a tuple so that the block does not become a child of the model again.
        self.held = (block,)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if args:
            return self.visit(self.index, args[0], Call(args[1:], kwargs))
        hidden = kwargs.pop("hidden_states")
        return self.visit(self.index, hidden, Call((), kwargs))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["held"][0], name)


@dataclass(slots=True)
class Skeleton:
    """A meta model whose blocks are stubs.

    blocks   the real blocks, on meta; copy before giving them weights
    prefix   where the blocks lie, for example "model.layers"
    ends     runtime names of the embedding and of the head, None where the model has none
    width    in-features of the first thing the model does with embeddings
    dtypes   runtime name → (shape, dtype) that Transformers would load it in
    traces   one per block
    """

    model: PreTrainedModel
    blocks: tuple[nn.Module, ...]
    prefix: str
    ends: tuple[str | None, str | None]
    layout: Layout
    width: int
    dtypes: Mapping[str, tuple[torch.Size, torch.dtype]]
    traces: tuple[Trace, ...] = ()
    _visitor: list[Visitor] = field(default_factory=list)

    @classmethod
    def open(cls, checkpoint: Checkpoint, dtype: torch.dtype) -> Skeleton:
        """Build the model of `checkpoint` on meta and match every tensor; reads no weights.

        SourceError when tensors and config do not fit, UnsupportedError when Transformers does not
        know the model or its blocks cannot be found or run without data.
        """
        config = _config(checkpoint)
        model = _build(config, dtype)
        match = match_names(model, {name: info.shape for name, info in checkpoint.tensors.items()})
        ends = _ends(model)
        tie = _ties_embeddings(ends, bool(config.tie_word_embeddings), match, checkpoint)
        if tie != bool(config.tie_word_embeddings):
            config.tie_word_embeddings = tie
            model = _build(config, dtype)
        layout = settle(match, _shared(model))
        prefix, blocks = _find_blocks(model)
        width = int(_weight(model.get_input_embeddings()).shape[1])
        skeleton = cls(model, blocks, prefix, ends, layout, width, _dtypes(model))
        holder = model.get_submodule(prefix)
        for index, block in enumerate(blocks):
            holder.register_module(str(index), _Stub(index, block, skeleton._visit))
        _stand_in(model)
        skeleton.traces = _trace(skeleton)
        return skeleton

    def forward(self, visitor: Visitor, *, head: bool, **inputs: Tensor) -> Any:
        """Run the model's own forward (with its head, or only the base model), blocks → `visitor`."""
        self._visitor.append(visitor)
        try:
            run = self.model if head else self.model.base_model
            return run(**inputs, use_cache=False, return_dict=True)
        finally:
            self._visitor.pop()

    def owner(self) -> PreTrainedModel:
        """The innermost Transformers model that holds the blocks."""
        models = [(n, m) for n, m in self.model.named_modules() if isinstance(m, PreTrainedModel)]
        return max((item for item in models if self.prefix.startswith(item[0])), key=lambda i: len(i[0]))[1]

    def use_eager_experts(self) -> None:
        """From now on experts run one by one, each on its own tokens, so that products show them."""
        if self.model._can_set_experts_implementation():
            self.model.set_experts_implementation("eager")

    def block_of(self, name: str) -> int | None:
        """Index of the block that the runtime parameter `name` belongs to, None outside the blocks."""
        inside = name.removeprefix(f"{self.prefix}.")
        return None if inside == name else int(inside.partition(".")[0])

    def _visit(self, index: int, hidden: Tensor, call: Call) -> Any:
        out = self._visitor[-1](index, hidden, call)
        return (out,) if self.traces and self.traces[index].returns_tuple else out


def _config(checkpoint: Checkpoint) -> PretrainedConfig:
    """The Transformers config; code that comes with the checkpoint is never looked at."""
    decode: Any = PretrainedConfig._decode_special_floats  # {"__float__": "Infinity"}, which JSON lacks
    values = decode(copy.deepcopy(dict(checkpoint.config)))
    kind = str(values.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise UnsupportedError(
            f"`{checkpoint.path}` is a model of type {kind!r}, which this Transformers does not know",
            remedy="upgrade transformers; models that bring their own code are not run",
        )
    values.pop("quantization_config", None)  # the checkpoint presents its tensors as floats
    try:
        return CONFIG_MAPPING[kind].from_dict(values)
    except (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise SourceError(f"`{checkpoint.path}/config.json` is not a valid {kind} config: {error}") from error


def _build(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of `config` on the meta device, in evaluation mode.

    SDPA where the model has it. Private names of Transformers are used where it has no public ones.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise UnsupportedError(f"Transformers has no causal language model for {config.model_type!r}")
    kind: Any = AutoModelForCausalLM._model_mapping[type(config)]
    build: Any = AutoModelForCausalLM.from_config
    with torch.device("meta"):
        model: PreTrainedModel = build(
            config,
            dtype=dtype,
            attn_implementation="sdpa" if kind._supports_sdpa else "eager",
            trust_remote_code=False,
        )
    model.train(False)
    return model.requires_grad_(False)


def _shared(model: PreTrainedModel) -> dict[str, str]:
    """Runtime name → the earlier runtime name of the same parameter."""
    first: dict[int, str] = {}
    named = model.state_dict(keep_vars=True).items()
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def _weight(module: nn.Module) -> Tensor:
    return module.get_parameter("weight")


def _dtypes(model: PreTrainedModel) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Shape and dtype of everything a checkpoint holds, as Transformers loads it: some stay in fp32."""
    plan = model._get_dtype_plan(model.dtype)
    found = {}
    for name, value in model.state_dict().items():
        special = [dtype for pattern, dtype in plan.items() if re.search(pattern.replace("*", ".*"), name)]
        found[name] = (value.shape, special[0] if special else value.dtype)
    return found


def _ends(model: PreTrainedModel) -> tuple[str | None, str | None]:
    """Runtime names of the weights of the input embedding and of the head."""
    modules = {id(module): name for name, module in model.named_modules()}
    head_of: Any = model.get_output_embeddings
    both = (model.get_input_embeddings(), head_of())
    embed, head = (None if module is None else f"{modules[id(module)]}.weight" for module in both)
    return embed, head


def _ties_embeddings(
    ends: tuple[str | None, str | None], said: bool, match: Match, checkpoint: Checkpoint
) -> bool:
    """Whether head and embedding share storage: the files outrank what the config `said`.

    One of the two absent: shared. Both there: shared when the config says so and the values agree.
    """
    embed, head = ends
    if embed is None or head is None:
        return said
    if embed not in match.filled or head not in match.filled:
        return True
    if not said:
        return False
    first, second = match.filled[embed][0].source, match.filled[head][0].source
    rows = checkpoint.tensors[first].shape[0]
    parts = (slice(i, min(i + _COMPARED_ROWS, rows)) for i in range(0, rows, _COMPARED_ROWS))
    return all(torch.equal(checkpoint.read(first, rows=p), checkpoint.read(second, rows=p)) for p in parts)


def _find_blocks(model: PreTrainedModel) -> tuple[str, tuple[nn.Module, ...]]:
    """The list of decoder blocks: of the outermost module lists, the one with most parameters."""
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) > 0]
    outer = [(n, m) for n, m in lists if not any(n.startswith(f"{other}.") for other, _ in lists)]
    if not outer:
        raise UnsupportedError(f"{type(model).__name__} has no list of decoder blocks")
    prefix, blocks = max(outer, key=lambda item: sum(p.numel() for p in item[1].parameters()))
    return prefix, tuple(blocks)


def _structure(block: nn.Module) -> tuple[Any, ...]:
    """Equal for blocks that do the same products: classes, names, shapes and plain settings."""
    return tuple(
        (
            name,
            type(module),
            tuple((n, tuple(p.shape)) for n, p in module.named_parameters(recurse=False)),
            tuple(
                (k, v)
                for k, v in vars(module).items()
                if isinstance(v, (bool, int, float, str)) and k not in _COUNTERS
            ),
        )
        for name, module in block.named_modules()
    )


def _stand_in(model: PreTrainedModel) -> None:
    """Zeros for the small parameters outside the blocks, so that masks and positions can be made on CPU.

    Embedding and head stay on meta: forward runs are given hidden states.
    """
    large = {name for name in _ends(model) if name is not None}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if f"{path}.{name}" not in large:
                setattr(module, name, nn.Parameter(torch.zeros_like(p, device="cpu"), requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                setattr(module, name, torch.zeros_like(b, device="cpu"))
    restore_buffers(model, model, torch.device("cpu"))


def restore_buffers(owner: PreTrainedModel, root: nn.Module, device: torch.device) -> None:
    """Compute the buffers below `root` that no checkpoint holds: rotary frequencies, scales, masks.

    Done the way Transformers does it after loading, by the innermost model that owns the module.
    Twice, over zeros and over ones, because a buffer that its code does not fill would be garbage:
    UnsupportedError.
    """
    for child in root.children():
        restore_buffers(child if isinstance(child, PreTrainedModel) else owner, child, device)
    names = [n for n, _ in root.named_buffers(recurse=False) if n in root._non_persistent_buffers_set]
    if not names:
        return
    initialise: Any = owner._init_weights
    for tensor in (*root.parameters(recurse=False), *root.buffers(recurse=False)):
        tensor.__dict__["_is_hf_initialized"] = True  # Transformers' initialisers leave it alone
    results = []
    for fill in (0, 1):
        for n in names:
            setattr(root, n, torch.full_like(root.get_buffer(n), fill, device=device))
        with torch.no_grad(), initialization.guard_torch_init_functions():
            initialise(root)
        results.append({n: root.get_buffer(n) for n in names})
    unfilled = [n for n in names if not torch.equal(results[0][n], results[1][n])]
    if unfilled:
        raise UnsupportedError(
            f"{type(root).__name__} has buffers that Transformers cannot compute again: {unfilled}"
        )


def _trace(skeleton: Skeleton) -> tuple[Trace, ...]:
    """Run the model's forward once over zeros, the blocks on meta; blocks of one structure run once."""
    traces: dict[int, Trace] = {}
    known: dict[tuple[Any, ...], Trace] = {}

    def visit(index: int, hidden: Tensor, call: Call) -> Any:
        block = skeleton.blocks[index]
        key = _structure(block)
        if key not in known:
            known[key] = _observed(block, hidden.to("meta"), call.to(torch.device("meta")))
        traces[index] = known[key]
        return (hidden,) if known[key].returns_tuple else hidden

    zeros = torch.zeros(_TRACE_ROWS, _TRACE_LENGTH, skeleton.width, dtype=skeleton.model.dtype)
    name = type(skeleton.model).__name__
    try:
        with torch.no_grad():
            skeleton.forward(visit, head=False, inputs_embeds=zeros)
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        raise UnsupportedError(f"{name} cannot be run without data to see its structure: {error}") from error
    if len(traces) != len(skeleton.blocks):
        raise UnsupportedError(f"{name} called {len(traces)} of its {len(skeleton.blocks)} blocks")
    return tuple(traces[i] for i in range(len(skeleton.blocks)))


def _observed(block: nn.Module, hidden: Tensor, call: Call) -> Trace:
    """Run `block` on meta and note its products in order, and the form of what it returns."""
    uses: list[Use] = []
    kept: list[Tensor] = []  # activations stay alive, so that no storage is taken twice
    numbers: dict[tuple[int, int, int], int] = {}
    parameters = dict(block.named_parameters())
    producers = Producers(parameters)

    def seen(p: Product) -> None:
        kept.append(p.x)
        number = numbers.setdefault(identity(p.x), len(numbers))
        uses.append(Use(p.parameter, p.first, p.last, p.stride_in, p.index, number, producers.of(p.x)))

    with Observer(parameters, seen, producers):
        result = block(hidden, *call.args, **call.kwargs)
    clean = (replace(u, producer=None) if u.producer in producers.spoiled else u for u in uses)
    return Trace(tuple(clean), isinstance(result, tuple))

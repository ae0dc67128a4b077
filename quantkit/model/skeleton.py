"""The model without weights: Transformers' own code on the meta device, decoder blocks set apart.

The blocks are found generically and replaced by stubs. The model's own forward then runs the
embeddings, makes masks and position embeddings, and calls the stubs, which hand every call to a
visitor. So nothing about an architecture is written here.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    initialization,
)

from quantkit.checkpoint.header_file import NotDownloaded
from quantkit.checkpoint.reader import Checkpoint
from quantkit.errors import SourceError, UnsupportedError
from quantkit.model.blocks import Call, Stub, Trace, Visitor, find_blocks, trace
from quantkit.model.names import Layout, Match, match_names, settle

_TRACE_ROWS, _TRACE_LENGTH = 2, 8
_COMPARED_ROWS = 4096


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
        config = config_of(checkpoint)
        model = meta_model(config, dtype)
        match = match_names(model, {name: info.shape for name, info in checkpoint.tensors.items()})
        ends = _ends(model)
        tie = _ties_embeddings(ends, bool(config.tie_word_embeddings), match, checkpoint)
        if tie != bool(config.tie_word_embeddings):
            config.tie_word_embeddings = tie
            model = meta_model(config, dtype)
        layout = settle(match, _shared(model))
        prefix, blocks = find_blocks(model)
        width = int(_weight(model.get_input_embeddings()).shape[1])
        skeleton = cls(model, blocks, prefix, ends, layout, width, _dtypes(model))
        holder = model.get_submodule(prefix)
        for index, block in enumerate(blocks):
            holder.register_module(str(index), Stub(index, block, skeleton._visit))
        _stand_in(model)
        skeleton.traces = skeleton._watch()
        return skeleton

    def _watch(self) -> tuple[Trace, ...]:
        shape = (_TRACE_ROWS, _TRACE_LENGTH, self.width)
        ramp = torch.linspace(-1, 1, math.prod(shape)).reshape(shape).to(self.model.dtype)
        try:
            return trace(
                self.blocks,
                lambda visit, x: self.forward(visit, head=False, inputs_embeds=x),
                (ramp, ramp.flip(0, 1)),
            )
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:
            name = type(self.model).__name__
            raise UnsupportedError(
                f"{name} cannot be run without data to see its structure: {error}"
            ) from error

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


def config_of(checkpoint: Checkpoint) -> PretrainedConfig:
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


def meta_model(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
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

    One of the two absent: shared. Both there: shared when the config says so and the values agree; of headers
    alone, when it says so.
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
    try:
        return all(
            torch.equal(checkpoint.read(first, rows=p), checkpoint.read(second, rows=p)) for p in parts
        )
    except NotDownloaded:
        return said


def tied_otherwise(skeleton: Skeleton, checkpoint: Checkpoint) -> str | None:
    """How the tensors of a checkpoint contradict the `tie_word_embeddings` of its config, which the skeleton
    does not follow then; other loaders do. None where they agree."""
    said = bool(config_of(checkpoint).tie_word_embeddings)
    embed, head = skeleton.ends
    if said == bool(skeleton.model.config.tie_word_embeddings):
        return None
    if said:
        return (
            f"config.json says that `{head}` is `{embed}` (tie_word_embeddings), and the two differ: engines "
            "that believe it drop one"
        )
    absent = next((end for end in (embed, head) if end not in skeleton.layout.tiles), head)
    return f"`{absent}` is missing, and config.json says that nothing stands in for it (tie_word_embeddings)"


def _stand_in(model: PreTrainedModel) -> None:
    """Ones for the small parameters outside the blocks, so that masks and positions can be made on CPU.

    Embedding and head stay on meta: forward runs are given hidden states.
    """
    large = {name for name in _ends(model) if name is not None}
    for path, module in model.named_modules():
        for name, p in module.named_parameters(recurse=False):
            if f"{path}.{name}" not in large:
                setattr(module, name, nn.Parameter(torch.ones_like(p, device="cpu"), requires_grad=False))
        for name, b in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                setattr(module, name, torch.ones_like(b, device="cpu"))
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
    flagged: Any
    for flagged in (*root.parameters(recurse=False), *root.buffers(recurse=False)):
        flagged._is_hf_initialized = True  # Transformers' initialisers leave it alone
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

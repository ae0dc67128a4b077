"""From a GGUF file to the checkpoint that it was made from."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from quantkit.checkpoint import folder
from quantkit.checkpoint.reader import Checkpoint, TensorInfo
from quantkit.errors import SourceError
from quantkit.gguf.architectures import Model
from quantkit.gguf.architectures.rope import GENERATED
from quantkit.gguf.container import Opened, open_file
from quantkit.model.build import build_graph
from quantkit.model.skeleton import config_of, meta_model
from quantkit.run.gguf_source.config import Described, config_from_metadata
from quantkit.run.gguf_source.keys import Keys
from quantkit.run.gguf_source.placed import disk_shapes, pieces
from quantkit.run.gguf_source.view import GgufCheckpoint, TokenizerFolder, decode, infos


def open_gguf(file: Path, *, like: Checkpoint | None = None) -> GgufCheckpoint:
    """The model in a GGUF file and, where it is one of several shards, in all of them; reads headers only.

    like  a checkpoint of the same model: names, shapes and configuration are its own then

    SourceError for a file that is damaged or does not fit its own description, UnsupportedError for a model
    that cannot be read.
    """
    opened = open_file(file)
    config = model_config(opened) if like is None else dict(like.config)
    shell = Checkpoint(opened.paths[0], MappingProxyType(config), _shapes(config, opened, like))
    graph = build_graph(shell if like is None else like)
    shapes = {name: info.shape for name, info in shell.tensors.items() if name not in graph.dropped}
    placements = Model.of(config).placements(graph, shapes)
    stored = {name: tensor.shape for name, tensor in opened.tensors.items()}
    found = pieces(str(shell.path), placements, graph, shapes, stored)
    tensors = {info.name: info for info in infos(shell.path, shapes, found, opened)}
    tokenizer = TokenizerFolder(shell.path, opened.metadata)
    view = GgufCheckpoint(shell.path, shell.config, MappingProxyType(tensors), opened, found, tokenizer)
    config["dtype"] = view.dtype
    return view


def model_config(opened: Opened) -> dict[str, Any]:
    """config.json beside the file, else what its metadata say; whether the head is the embedding, the tensors
    decide."""
    beside = opened.paths[0].parent / folder.CONFIG
    if not beside.is_file():
        return config_from_metadata(described(opened))
    config = copy.deepcopy(folder.read_json(beside))
    config["tie_word_embeddings"] = "output.weight" not in opened.tensors
    for key in ("quantization_config", "torch_dtype"):
        config.pop(key, None)
    return config


def described(opened: Opened) -> Described:
    """What the configuration follows from."""
    if not opened.architecture:
        raise SourceError(
            f"`{opened.paths[0]}` does not say its architecture",
            remedy="give a file that holds a language model",
        )
    generated = {
        name: decode(opened.read_bytes(name), opened.tensors[name].kind).flatten()
        for name in GENERATED
        if name in opened.tensors
    }
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    return Described(Keys(str(opened.paths[0]), opened.architecture, opened.metadata), shapes, generated)


def tokenizer_folder(checkpoint: Checkpoint) -> Path:
    """The folder that the tokenizer of a checkpoint is loaded from; of a GGUF file it is made."""
    return checkpoint.tokenizer.folder() if isinstance(checkpoint, GgufCheckpoint) else checkpoint.path


def _shapes(config: dict[str, Any], opened: Opened, like: Checkpoint | None) -> Mapping[str, TensorInfo]:
    """Checkpoint tensors as far as names and shapes go: of the model that Transformers would save."""
    if like is not None:
        return like.tensors
    path = opened.paths[0]
    shell = Checkpoint(path, config, {})
    shapes = disk_shapes(meta_model(config_of(shell), torch.float32))
    return {name: TensorInfo(name, "F32", shape, path, 0, 0) for name, shape in shapes.items()}

"""llama.cpp quantizes with the statistics that quantkit collected, under the names quantkit gave them.

Its library takes an imatrix as values and not as a file, so a file of ours is read by the `gguf` package (the
legacy one by the lines of its specification), and the values are handed over. Where the programs
`llama-quantize` and `llama-imatrix` are on the PATH, they read the files themselves.
"""

from __future__ import annotations

import ctypes
import math
import shutil
import struct
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from quantkit import Calibration
from quantkit.checkpoint.reader import Checkpoint
from quantkit.gguf import container
from quantkit.gguf.architectures import Model, Placed
from quantkit.gguf.container import Stored
from quantkit.model.build import build_graph
from quantkit.model.runtime import Runtime
from quantkit.run.calibrate import collect_imatrix, merge_imatrix
from tests.interop.engines import Source
from tests.interop.ggml import Ggml

pytestmark = pytest.mark.interop
gguf = pytest.importorskip("gguf")

ROWS, LENGTH = 8, 32
IQ2_XXS = 19
# super-blocks of 256 weights; both kinds of input differ in width
WIDE: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 512}
MIXTURE: dict[str, Any] = {
    **{**WIDE, "head_dim": 64, "norm_topk_prob": True},
    **{"moe_intermediate_size": 512, "num_experts": 3, "num_experts_per_tok": 1, "num_hidden_layers": 1},
}


@dataclass(frozen=True, slots=True)
class Case:
    """A model as llama.cpp reads it, and the imatrix of it in both formats."""

    model: Path
    imatrix: Path
    legacy: Path


@pytest.fixture(scope="module", params=[("llama", WIDE), ("qwen3_moe", MIXTURE)], ids=["dense", "experts"])
def case(
    request: pytest.FixtureRequest,
    source: Callable[..., Source],
    tmp_path_factory: pytest.TempPathFactory,
) -> Case:
    family, changes = request.param
    found, folder = source(family, **changes), tmp_path_factory.mktemp(family)
    made = Case(folder / "model.gguf", folder / "x.imatrix.gguf", folder / "x.imatrix.dat")
    write_floats(found.folder, made.model)
    text = Calibration(file=str(found.calibration), rows=ROWS, length=LENGTH)
    collect_imatrix(str(found.folder), made.imatrix, calibration=text)
    merge_imatrix([made.imatrix], made.legacy)
    return made


def write_floats(folder: Path, out: Path) -> None:
    """The checkpoint as a GGUF of fp32 without a vocabulary, which quantizing does not need."""
    checkpoint = Checkpoint.open(folder)
    graph = build_graph(checkpoint)
    model = Model.of(checkpoint.config)
    runtime = Runtime(checkpoint, graph, dtype=torch.float32, device=torch.device("cpu"))
    weights = {weight.key: weight for weight in (*graph.weights(), *graph.outer)}

    def value(placed: Placed) -> Tensor:
        parts = []
        for part in placed.sources:
            known = part.key in weights
            tensor = runtime.read(weights[part.key]) if known else runtime.read_tensor(part.key)
            parts.append(tensor if part.rows is None else tensor[part.rows])
        return torch.stack(parts).view(placed.shape).float()

    placements = model.placements(graph, {name: info.shape for name, info in checkpoint.tensors.items()})
    stored = [Stored.plain(placed.name, placed.shape, torch.float32) for placed in placements]
    contents = (container.as_bytes(value(placed)) for placed in placements)
    container.write(out, model.architecture, {"general.type": "model", **model.metadata()}, stored, contents)


def means(path: Path) -> dict[str, Tensor]:
    """(experts · in,) fp32 by tensor name, as the loader of llama-quantize computes them."""
    tensors = {tensor.name: torch.tensor(tensor.data) for tensor in gguf.GGUFReader(path).tensors}
    found = {}
    for name in sorted(name.removesuffix(".in_sum2") for name in tensors if name.endswith(".in_sum2")):
        sums, counts = tensors[f"{name}.in_sum2"], tensors[f"{name}.counts"].flatten()
        each = sums.view(counts.numel(), -1) / counts[:, None]
        found[name] = torch.where(counts[:, None] > 0, each, 1).flatten()
    return found


def legacy_means(path: Path) -> dict[str, Tensor]:
    """The same of a legacy file, read word by word."""
    data, at, found = path.read_bytes(), 4, {}
    for _ in range(struct.unpack_from("<i", data)[0]):
        (length,) = struct.unpack_from("<i", data, at)
        name = data[at + 4 : at + 4 + length].decode()
        at += 4 + length
        calls, values = struct.unpack_from("<ii", data, at)
        found[name] = torch.tensor(struct.unpack_from(f"<{values}f", data, at + 8)) / calls
        at += 8 + 4 * values
    chunks, length = struct.unpack_from("<ii", data, at)
    assert (chunks, length, len(data)) == (ROWS, len(data) - at - 8, at + 8 + length)
    return found


def quantized(model: Path, out: Path, imatrix: Mapping[str, Tensor]) -> int:
    """What `llama_model_quantize` to IQ2_XXS returns, 0 when it has written `out`."""
    llama = pytest.importorskip("llama_cpp")
    values = {name: vector.contiguous() for name, vector in imatrix.items()}
    # ended by an entry without a name
    entries = (llama.llama_model_imatrix_data * (len(values) + 1))()
    for entry, (name, vector) in zip(entries, values.items(), strict=False):
        entry.name = name.encode()
        entry.data = ctypes.cast(vector.data_ptr(), ctypes.POINTER(ctypes.c_float))
        entry.size = vector.numel()
    params = llama.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.imatrix = 1, IQ2_XXS, entries
    return int(llama.llama_model_quantize(str(model).encode(), str(out).encode(), ctypes.byref(params)))


def test_it_quantizes_with_our_statistics(case: Case, tmp_path: Path) -> None:
    """IQ2_XXS is refused without an entry for any of its tensors, or with one of another length."""
    ggml, out = Ggml.load(), tmp_path / "out.gguf"
    known = means(case.imatrix)
    assert quantized(case.model, out, known) == 0
    floats = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(case.model).tensors}
    checked = set()
    for tensor in gguf.GGUFReader(out).tensors:
        kind = tensor.tensor_type.name.lower()
        if tensor.name not in known:
            continue
        rows = floats[tensor.name]
        experts = rows.view(-1, *rows.shape[-2:])
        vectors = known[tensor.name].view(experts.shape[0], -1)
        expected = [ggml.quantize(kind, e, v) for e, v in zip(experts, vectors, strict=True)]
        data = torch.tensor(tensor.data).view(len(expected), *expected[0].shape)
        assert torch.equal(data, torch.stack(expected)), tensor.name
        assert not torch.equal(data[0], ggml.quantize(kind, experts[0], torch.ones_like(vectors[0])))
        checked.add(tensor.name)
    assert checked == known.keys()


def test_it_refuses_what_does_not_fit(case: Case, tmp_path: Path) -> None:
    """So the test above says something about names and lengths."""
    known = means(case.imatrix)
    name = "blk.0.attn_q.weight"
    without = {other: value for other, value in known.items() if other != name}
    assert quantized(case.model, tmp_path / "a.gguf", without) != 0
    assert quantized(case.model, tmp_path / "b.gguf", {**known, name: known[name][:-1]}) != 0


def test_legacy_files_say_the_same(case: Case) -> None:
    expected, found = means(case.imatrix), legacy_means(case.legacy)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-6, atol=0)


def test_what_llama_quantize_insists_on(case: Case) -> None:
    reader = gguf.GGUFReader(case.imatrix)
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == gguf.GGUFType.IMATRIX
    assert keys[gguf.Keys.IMatrix.CHUNK_COUNT] == ROWS and keys[gguf.Keys.IMatrix.CHUNK_SIZE] == LENGTH
    assert keys[gguf.Keys.IMatrix.DATASETS]
    names = [tensor.name for tensor in reader.tensors]
    stems = sorted({name.removesuffix(".in_sum2").removesuffix(".counts") for name in names})
    assert names == [stem + suffix for stem in stems for suffix in (".in_sum2", ".counts")]
    assert all(tensor.tensor_type.name == "F32" for tensor in reader.tensors)
    model = {t.name: t.shape.tolist() for t in gguf.GGUFReader(case.model).tensors}
    tensors = {tensor.name: tensor.n_elements for tensor in reader.tensors}
    for stem in stems:
        width, _, *experts = model[stem]
        assert tensors[f"{stem}.counts"] == math.prod(experts)
        assert tensors[f"{stem}.in_sum2"] == width * math.prod(experts)


@pytest.mark.parametrize("which", ["imatrix", "legacy"])
def test_its_program_reads_the_file(which: str, case: Case, tmp_path: Path) -> None:
    program = shutil.which("llama-quantize")
    if program is None:
        pytest.skip("the program llama-quantize is not on the PATH")
    out, file = tmp_path / "out.gguf", getattr(case, which)
    command = [program, "--imatrix", str(file), str(case.model), str(out), "IQ2_XXS", "1"]
    subprocess.run(command, check=True, capture_output=True)
    values = means(file) if which == "imatrix" else legacy_means(file)
    assert quantized(case.model, tmp_path / "ours.gguf", values) == 0
    theirs, ours = gguf.GGUFReader(out).tensors, gguf.GGUFReader(tmp_path / "ours.gguf").tensors
    for a, b in zip(theirs, ours, strict=True):
        assert a.name == b.name and a.data.tobytes() == b.data.tobytes()

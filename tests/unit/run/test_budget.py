from __future__ import annotations

from pathlib import Path

import pytest
import torch

from quantkit.calibrate.statistics import Need, nbytes
from quantkit.errors import UsageError
from quantkit.model.graph import Site, Weight
from quantkit.run.budget import available, compute_dtype, container_left, device, waves

CPU = torch.device("cpu")


def site(name: str, width: int) -> Site:
    return Site(name, (Weight(f"{name}.weight", (8, width)),))


def test_waves_by_hand() -> None:
    # grams of 4, 4, 8 and 2 inputs take 64, 64, 256 and 16 bytes
    sites = [site("a", 4), site("b", 4), site("c", 8), site("d", 2)]
    needs = {s.id: Need.GRAM for s in sites}

    def ids(budget: int) -> list[list[str]]:
        return [[s.id for s in wave] for wave in waves(sites, needs, budget)]

    assert ids(10_000) == [["a", "b", "c", "d"]]
    assert ids(400) == [["a", "b", "c", "d"]]
    assert ids(399) == [["a", "b", "c"], ["d"]]
    assert ids(128) == [["a", "b"], ["c"], ["d"]]
    # a site larger than the budget is alone
    assert ids(0) == [["a"], ["b"], ["c"], ["d"]]


def test_sites_without_needs_cost_nothing() -> None:
    sites = [site(name, 64) for name in "abc"]
    needs = dict.fromkeys("abc", Need.NOTHING)
    assert [len(wave) for wave in waves(sites, needs, 0)] == [3]
    assert list(waves([], {}, 100)) == []


@pytest.mark.parametrize("budget", [0, 5_000, 20_000, 10**6])
def test_waves_keep_every_site_in_order_and_fit(budget: int) -> None:
    sites = [site(str(n), width) for n, width in enumerate((16, 32, 64, 16, 48, 8))]
    needs = {s.id: Need.GRAM | Need.SQUARES for s in sites}
    found = list(waves(sites, needs, budget))
    assert [s for wave in found for s in wave] == sites
    for wave in found:
        assert len(wave) == 1 or sum(nbytes(s.width, needs[s.id]) for s in wave) <= budget


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device("auto") == device("cpu") == CPU
    with pytest.raises(UsageError, match="'cuda' was asked for and 0 CUDA devices"):
        device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device("auto").type == "cuda"
    assert device("cuda:1").index == 1
    with pytest.raises(UsageError, match="'cuda:2' was asked for and 2 CUDA devices"):
        device("cuda:2")


def test_dtypes_of_the_forward_pass() -> None:
    assert compute_dtype("auto", CPU) == torch.float32
    assert compute_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert compute_dtype("bfloat16", CPU) == torch.bfloat16
    assert compute_dtype("float32", torch.device("cuda")) == torch.float32


def test_some_memory_is_free() -> None:
    assert available(CPU) > 1 << 20


@pytest.mark.parametrize("version", [1, 2])
def test_the_limit_of_a_container_counts(version: int, tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "memory.stat")
    if version == 1:
        names = tuple(f"memory/memory.{n}" for n in ("limit_in_bytes", "usage_in_bytes", "stat"))
        (tmp_path / "memory").mkdir()
    cached = "inactive_file 300" if version == 2 else "inactive_file 7\ntotal_inactive_file 300"
    for name, text in zip(names, ("1000\n", "800\n", f"anon 5\n{cached}\nother 1\n"), strict=True):
        (tmp_path / name).write_text(text)
    assert container_left(tmp_path) == 500


def test_no_limit_and_no_container(tmp_path: Path) -> None:
    assert container_left(tmp_path) is None
    for name, text in (("memory.max", "max\n"), ("memory.current", "1\n"), ("memory.stat", "")):
        (tmp_path / name).write_text(text)
    assert container_left(tmp_path) is None

"""Devices and memory: the only place, with the model runtime, that names a device."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quantkit.calibrate.record import Wanted
from quantkit.calibrate.statistics import Need, nbytes
from quantkit.errors import UsageError
from quantkit.model.graph import Site

if TYPE_CHECKING:
    import torch


def device(name: str) -> torch.device:
    """The device that `auto`, `cpu`, `cuda` or `cuda:N` stands for; UsageError when it is not there."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(name)
    if chosen.type == "cuda":
        count = torch.cuda.device_count()
        if (chosen.index or 0) >= count:
            raise UsageError(
                f"device '{name}' was asked for and {count} CUDA devices are visible",
                remedy="use --device cpu, or install a torch build with CUDA and check the driver",
            )
    return chosen


def compute_dtype(name: str, on: torch.device) -> torch.dtype:
    """dtype of the forward pass: float32 on a CPU, bfloat16 on a GPU unless told otherwise.

    fp16 sources run in bfloat16 too: massive activations overflow fp16.
    """
    import torch

    if name == "auto":
        return torch.bfloat16 if on.type == "cuda" else torch.float32
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return dtypes[name]


def available(on: torch.device) -> int:
    """Bytes of memory that can be had on a device now, caches that the system would give up included."""
    import torch

    if on.type == "cuda":
        return int(torch.cuda.mem_get_info(on)[0])
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if found:
        free = int(found[1]) * 1024
    left = container_left()
    return free if left is None else min(free, left)


def container_left(groups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes below the memory limit of the container (control group) this runs in; None where there is none.

    Cached files count as free, because the system gives them up first.
    """
    for limit, used, stat, cached in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (*(f"memory/memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat")),
         "total_inactive_file"),
    ):  # fmt: skip
        try:
            most = int((groups / limit).read_text())
            now = int((groups / used).read_text())
            files = re.search(rf"^{cached} (\d+)$", (groups / stat).read_text(), re.MULTILINE)
        except (OSError, ValueError):  # no such group, or "max": no limit
            continue
        return max(0, most - now + (int(files[1]) if files else 0))
    return None


def release_memory() -> None:
    """Give freed pages back to the system. glibc keeps what it may reuse, which for tensors of a few dozen
    megabytes adds up to a good part of a block; other C libraries have no such call and need none."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # absent outside glibc
    if trim is not None:
        trim(0)


def pools(sites: Sequence[Site], needs: Mapping[str, Need]) -> dict[str, Wanted]:
    """What is to be known of all experts of a layer together, by `Site.kin`: what one of them is to know,
    but only the diagonal of a gram where each reads what it has made itself."""
    found: dict[str, Wanted] = {}
    for site in sites:
        if site.kin is not None:
            need = needs[site.id] | Need.SQUARES
            before = found[site.kin].need if site.kin in found else Need.NOTHING
            left_out = Need.CROSS if site.shares_input else Need.CROSS | Need.GRAM | Need.HELDOUT
            found[site.kin] = Wanted(site.width, before | need & ~left_out)
    return found


def waves(sites: Sequence[Site], needs: Mapping[str, Need], budget: int) -> Iterator[tuple[Site, ...]]:
    """Consecutive sites whose statistics fit `budget` bytes together; a site larger than that is alone.

    Pools are there in every wave, whatever the budget: what is known must not depend on it.
    """
    budget -= sum(pool.nbytes for pool in pools(sites, needs).values())
    wave: list[Site] = []
    used = 0
    for site in sites:
        size = nbytes(site.width, needs[site.id])
        if wave and used + size > budget:
            yield tuple(wave)
            wave, used = [], 0
        wave.append(site)
        used += size
    if wave:
        yield tuple(wave)

"""``quantkit doctor``."""

from __future__ import annotations

import os
import platform
import shlex
import shutil
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from quantkit import __version__, registry
from quantkit.cli.help import Command
from quantkit.cli.output import Output, common_options
from quantkit.recipe.sizes import format_size
from quantkit.table import Table

_UNFINISHED = ".incomplete"
_OURS = ".quantkit.incomplete"  # `resume.PARTIAL`, which needs a client that can be imported
_NEEDED = ("torch", "transformers", "safetensors", "huggingface_hub", "numpy", "PyYAML", "click", "rich")
_OPTIONAL = (
    (
        "compressed-tensors",
        "loads compressed-tensors results in transformers",
        "quantkit[compressed-tensors]",
    ),
    ("gptqmodel", "loads GPTQ and AWQ results in transformers", "quantkit[gptq,awq]"),
    ("bitsandbytes", "loads NF4, FP4 and LLM.int8 results in transformers", "quantkit[bitsandbytes]"),
    ("hqq", "loads HQQ results", "quantkit[hqq]"),
    ("gguf", "writes GGUF files", "quantkit[gguf]"),
    ("llama-cpp-python", "loads GGUF files to check them", "llama-cpp-python"),
    ("hf-xet", "faster transfers to and from the Hub", "hf-xet"),
    ("matplotlib", "plots in model cards", "quantkit[plot]"),
    ("datasets", "further calibration sets of the Hub", "datasets"),
)


@click.command("doctor", cls=Command, examples=("quantkit doctor", "quantkit doctor --json"))
@common_options
def command(**flags: Any) -> None:
    """Report on this installation: versions, memory, devices, packages."""
    output = Output.from_flags(flags)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    facts = {
        "quantkit": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in _NEEDED},
        "optional": {name: _version(name) for name, _, _ in _OPTIONAL},
        "cpus": os.cpu_count(),
        "memory_bytes": memory,
        "disk_free_bytes": shutil.disk_usage(Path.cwd()).free,
        "devices": _devices(),
        "hub": _hub(),
        "formats": list(registry.names("formats")),
        "problems": _problems(),
    }
    output.result("doctor", [_table(facts)], facts)


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    """CUDA devices; none when torch is missing or sees none."""
    if _version("torch") is None:
        return []
    import torch

    found = []
    for index in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        found.append(
            {"device": f"cuda:{index}", "name": name, "memory_bytes": total, "memory_free_bytes": free}
        )
    return found


def _hub() -> dict[str, Any] | None:
    """Where models come from, whether there is a token, and what downloads that stopped left behind."""
    if _version("huggingface_hub") is None:
        return None
    from huggingface_hub import constants, get_token

    cache = Path(constants.HF_HUB_CACHE)
    left = _unfinished(cache)
    return {
        "endpoint": constants.ENDPOINT,
        "offline": constants.is_offline_mode(),
        "token": get_token() is not None,
        "cache": str(cache),
        "unfinished_files": len(left),
        "unfinished_bytes": sum(file["bytes"] for file in left),
        "unfinished": left,
    }


def _unfinished(cache: Path) -> list[dict[str, Any]]:
    """What downloads that stopped left in the cache; only quantkit's own are ever gone on with."""
    found = []
    for path in sorted(cache.glob(f"models--*/blobs/*{_UNFINISHED}")):
        with suppress(FileNotFoundError):  # a download that runs has just finished it
            size = path.stat().st_size
            repo = path.parts[-3].removeprefix("models--").replace("--", "/")
            ours = path.name.endswith(_OURS)
            found.append(
                {"repo": repo, "path": str(path.relative_to(cache)), "bytes": size, "resumable": ours}
            )
    return found


def _hub_rows(hub: dict[str, Any]) -> list[tuple[str, str]]:
    offline = ", switched off by HF_HUB_OFFLINE" if hub["offline"] else ""
    token = "there is one" if hub["token"] else "none: hf auth login, or set HF_TOKEN"
    rows = [("Hub", hub["endpoint"] + offline), ("Hub, token", token), ("Hub, cache", hub["cache"])]
    if hub["unfinished"]:
        size = format_size(hub["unfinished_bytes"])
        text = f"{hub['unfinished_files']:,} unfinished files of {size}; to remove them, unless a download "
        rows.append(("", f"{text}runs now: find {shlex.quote(hub['cache'])} -name '*{_UNFINISHED}' -delete"))
    for file in hub["unfinished"]:
        use = "the next download goes on with" if file["resumable"] else "nothing goes on with"
        rows.append(("", f"{file['repo']}: {format_size(file['bytes'])}, which {use}"))
    return rows


def _problems() -> list[str]:
    """What is missing or in the way, each with what to do."""
    problems = [f"{name} is missing: pip install {name}" for name in _NEEDED if _version(name) is None]
    if _version("llm-quantkit") is not None:
        problems.append(
            "the package llm-quantkit is installed and also has a module and a command `quantkit`: "
            "pip uninstall llm-quantkit, then reinstall quantkit"
        )
    return problems


def _table(facts: dict[str, Any]) -> Table:
    rows = [(name, facts[name]) for name in ("quantkit", "python", "platform")]
    rows += [(name, version or "missing") for name, version in facts["packages"].items()]
    for name, use, install in _OPTIONAL:
        version = facts["optional"][name]
        rows.append((name, version or f"not installed; {use}: pip install '{install}'"))
    rows.append(("processors", str(facts["cpus"])))
    rows.append(
        ("memory", "unknown" if facts["memory_bytes"] is None else format_size(facts["memory_bytes"]))
    )
    rows.append(("disk, free here", format_size(facts["disk_free_bytes"])))
    for device in facts["devices"]:
        rows.append((device["device"], f"{device['name']}, {format_size(device['memory_bytes'])}"))
    if not facts["devices"]:
        rows.append(("GPU", "none that torch can use; everything works on the CPU"))
    if facts["hub"] is not None:
        rows += _hub_rows(facts["hub"])
    rows.append(("formats", ", ".join(facts["formats"])))
    return Table("", ("", ""), tuple(rows), blockers=tuple(facts["problems"]))

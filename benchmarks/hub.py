"""Downloads and uploads beside the Hub's own client, and engines beside quantkit's reading of the files.

    python -m benchmarks.hub [--parts transfers engines] [--rounds 3]

The Hub is the one of tests/hubserver, on this machine, without a delay of its own: times are ratios of two
ways through the same server, requests and bytes are counts. Every step is a process of its own with an
empty cache; the order changes from round to round. `engines` needs the packages of `make interop`; a format
whose engine is not there is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

import quantkit
from benchmarks.memory import write_checkpoint
from benchmarks.record import ROOT, load, save
from quantkit.hub.manifest import FileSum, read_checks, read_manifest
from quantkit.run.engine_check import LIMIT
from quantkit.run.streams import sha256_file
from tests.hubserver import HubServer
from tests.hubserver.client import ALICE
from tests.hubserver.connection import Connection
from tests.targets import manifest

SHARD = 125 * 10**6
CONFIG: dict[str, Any] = {
    "vocab_size": 32_000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
}
# (ours, theirs): each is done twice, the second time with nothing left to do
PAIRS = {"push": ("push", "upload_folder"), "download": ("resolve", "snapshot")}
# what engines load, of the embedded model
TARGETS = (
    "gguf:f16", "gguf:q8_0", "gguf:q6_k@method=rtn", "gguf:q4_k_m@method=rtn", "gguf:q3_k_m@method=rtn",
    "gguf:q2_k@method=rtn", "gguf:iq4_xs@method=rtn", "gguf:iq2_xs", "gptq:w4g128", "gptq:w4g32@act_order=free",
    "awq:w4g128", "bitsandbytes:nf4@method=rtn", "bitsandbytes:int8", "hqq:w4g64", "ct:w4g128", "ct:w8a8",
    "ct:fp8", "ct:nvfp4@method=rtn", "ct:mxfp4@method=rtn",
)  # fmt: skip


@dataclass
class Meter:
    """Bytes of the bodies that a server sent."""

    sent: list[int] = field(default_factory=list)


@contextmanager
def metered() -> Iterator[Meter]:
    """Count what all servers send in the meantime."""
    meter, send = Meter(), Connection._send

    def counted(self: Connection, answer: Any, fault: Any) -> None:
        meter.sent.append(0 if self.command == "HEAD" else len(answer.body))
        send(self, answer, fault)

    Connection._send = counted  # type: ignore[method-assign]
    try:
        yield meter
    finally:
        Connection._send = send  # type: ignore[method-assign]


@dataclass(frozen=True)
class Bench:
    """What all steps of one side and one round share."""

    hub: HubServer
    meter: Meter
    python: str
    folder: Path
    home: Path
    xet: bool

    def step(self, name: str) -> dict[str, Any]:
        """What it took: seconds, requests, bytes either way, commits."""
        self.hub.log.clear()
        self.hub.requests.clear()
        self.meter.sent.clear()
        before = self._commits()
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("HF_")},
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.home / name),
            "HF_TOKEN": ALICE,
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_UPDATE_CHECK": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "OMP_NUM_THREADS": "1",
        } | ({} if self.xet else {"HF_HUB_DISABLE_XET": "1"})
        command = [self.python, "-m", "benchmarks.hub_steps", name]
        command += ["--repo", "alice/bench", "--folder", str(self.folder)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name} failed:\n{done.stderr[-4000:]}")
        told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return told | {
            "requests": len(self.hub.log),
            "received_bytes": sum(self.meter.sent),
            "sent_bytes": sum(request.size for request in self.hub.requests),
            "commits": self._commits() - before,
        }

    def twice(self, name: str) -> dict[str, Any]:
        return {"first": self.step(name), "again": self.step(name)}

    def _commits(self) -> int:
        return len(self.hub.repo("alice/bench").history()) if self.hub.has("alice/bench") else 1


def write_target(folder: Path) -> dict[str, int]:
    """A sharded random Llama as a target of quantkit, with all that lies beside it; its bytes."""
    weights = write_checkpoint(folder, LlamaConfig(**CONFIG), SHARD)
    files = sorted(path for path in folder.iterdir() if path.is_file())
    made = manifest("gptq-w4g128", "gptq", "w4g128")
    for path in files:
        made.files[path.name] = FileSum(path.stat().st_size, sha256_file(path))  # type: ignore[index]
    (folder / "quantkit.json").write_text(json.dumps(made.to_json()))
    shards = [path for path in files if path.suffix == ".safetensors"]
    return {"weight_bytes": weights, "weight_files": len(shards), "other_files": len(files) - len(shards)}


def one_round(number: int, python: str, folder: Path, base: Path, *, xet: bool) -> dict[str, Any]:
    """Both ways up, then both ways down."""
    found: dict[str, Any] = {}
    for pair, sides in PAIRS.items():
        for side in sides if number % 2 == 0 else sides[::-1]:
            home = base / f"{side}{number}"
            with metered() as meter, HubServer(xet=home / "store" if xet else None) as hub:
                bench = Bench(hub, meter, python, folder, home, xet)
                if pair == "download":
                    fill(bench)
                found[side] = bench.twice(side)
                if side == "resolve" and not xet:
                    found["plan"] = bench.twice("plan")
            shutil.rmtree(home, ignore_errors=True)
            print(f"{'xet' if xet else 'lfs'} round {number}: {side} {found[side]}", flush=True)
    return found


def fill(bench: Bench) -> None:
    """The repository to download from; Xet is only filled by the client."""
    if bench.xet:
        bench.step("upload_folder")
        shutil.rmtree(bench.home / "upload_folder", ignore_errors=True)
    else:
        names = [path for path in bench.folder.iterdir() if path.name != "quantkit.json"]
        bench.hub.add("alice/bench", {path.name: path.read_bytes() for path in names})


def compared(rounds: Sequence[Mapping[str, Any]], ours: str, theirs: str) -> dict[str, Any]:
    """Ratios of seconds, and counts, of both times."""
    out: dict[str, Any] = {}
    for when in ("first", "again"):
        ratios = [found[ours][when]["seconds"] / found[theirs][when]["seconds"] for found in rounds]
        cpu = [found[ours][when]["cpu_seconds"] / found[theirs][when]["cpu_seconds"] for found in rounds]
        out[when] = {
            "seconds_ratio": statistics.median(ratios),
            "seconds_ratios": ratios,
            "cpu_ratio": statistics.median(cpu),
            **{
                f"{side}_{count}": statistics.median_low([found[name][when][count] for found in rounds])
                for side, name in (("own", ours), ("their", theirs))
                for count in ("requests", "sent_bytes", "received_bytes", "commits")
            },
        }
    return out


def transfers(rounds: int, python: str, base: Path) -> dict[str, Any]:
    folder = base / "model"
    folder.mkdir()
    facts = write_target(folder)
    out: dict[str, Any] = {"rounds": rounds, **facts}
    for protocol in ("lfs", "xet"):
        done = [one_round(n, python, folder, base, xet=protocol == "xet") for n in range(rounds)]
        out[protocol] = {pair: compared(done, *sides) for pair, sides in PAIRS.items()}
        if protocol == "lfs":
            out["plan"] = {
                when: {
                    "requests": done[-1]["plan"][when]["requests"],
                    "bytes": done[-1]["plan"][when]["received_bytes"],
                }
                for when in ("first", "again")
            }
            full = done[-1]["snapshot"]["first"]
            out["plan"]["download"] = {"requests": full["requests"], "bytes": full["received_bytes"]}
    return out


def engines(base: Path) -> dict[str, Any]:
    """KL of each engine from quantkit's reading of the same files, as `verify` sees it."""
    out = base / "made"
    asked = quantkit.Recipe(
        source="demo",
        targets=tuple(target for text in TARGETS for target in quantkit.parse_targets(text)),
        output=quantkit.Output(dir=str(out)),
        calibration=quantkit.Calibration(set="embedded", rows=16, length=256),
        eval=quantkit.Eval(
            perplexity=(quantkit.EvalText(data="embedded", style="gptq", context=256, chunks=8),)
        ),
    )
    report = quantkit.convert(asked)
    rows, absent = [], []
    for text, target in zip(TARGETS, report.targets, strict=True):
        made = read_manifest(out / target.folder)
        checks = read_checks(out / target.folder, made.files_key) or ()
        if not checks:
            absent.append(text)
        rows += [
            {
                "target": text,
                "engine": check.engine,
                "version": check.version,
                "problem": check.problem,
                "tokens": check.tokens,
                "kl": check.kl_mean,
                "top1": check.top1_agreement,
                "source_kl": target.quality[0].kl_mean,
            }
            for check in checks
        ]
        print(rows[-1] if checks else f"{text}: no engine", flush=True)
    return {"limit": LIMIT, "rows": rows, "absent": absent}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--parts", nargs="+", default=["transfers", "engines"], choices=["transfers", "engines"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    for part in given.parts:
        with tempfile.TemporaryDirectory() as folder:
            base = Path(folder)
            found = transfers(given.rounds, sys.executable, base) if part == "transfers" else engines(base)
        kept = {name: value for name, value in load("hub").items() if name in ("transfers", "engines")}
        save("hub", {**kept, part: found})


if __name__ == "__main__":
    main()

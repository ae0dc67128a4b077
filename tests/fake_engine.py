"""``python -m tests.fake_engine ROOM``: the real worker with an engine that does what the path asks for."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from quantkit.errors import VerifyError
from quantkit.evaluate.engines import worker
from quantkit.evaluate.engines.request import Request


def begin(request: Request) -> str:
    if request.path.endswith("broken"):
        raise ImportError("libnothing.so: cannot open shared object file")
    return "7.0"


def logits(request: Request) -> Any:
    asked = Path(request.path).name
    if asked == "crash":
        sys.stderr.write("assertion failed: rows % 4 == 0\n")
        os.abort()
    elif asked == "hang":
        child = subprocess.Popen(["sleep", "60"])
        Path(request.path).write_text(str(child.pid), "utf-8")
        time.sleep(60)
    elif asked == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif asked == "starve":
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")
    elif asked == "refuse":
        raise VerifyError(f"no such tensor in {request.path}")
    elif asked == "bug":
        raise KeyError("weight")
    elif asked == "exit":
        sys.exit(3)
    elif asked == "environment":
        telling = sorted(name for name, value in os.environ.items() if "hf_secret" in value)
        names = ("HF_HUB_OFFLINE", "HF_HUB_DISABLE_IMPLICIT_TOKEN", "CUDA_VISIBLE_DEVICES", "MARK")
        kept = {name: os.environ.get(name) for name in names}
        raise VerifyError(json.dumps([telling, kept, str(Path.cwd())]))
    ballast = np.ones(8_000_000)
    return np.full((len(request.ids), 3), float(ballast[0]))


def peak_bytes(request: Request) -> int:
    return 5


if __name__ == "__main__":
    engine = ModuleType("quantkit.evaluate.engines.hqq")
    vars(engine).update(begin=begin, logits=logits, peak_bytes=peak_bytes)
    sys.modules[engine.__name__] = engine
    worker.main(sys.argv[1])

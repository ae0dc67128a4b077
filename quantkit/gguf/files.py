"""How files of GGUF models are called."""

from __future__ import annotations

import re

SUFFIX = ".gguf"
# one file of a model that is split: all lie in one folder, and engines load the first
SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
# in names of what lies beside models, and is none
NO_MODEL = ("mmproj", "imatrix")
# in names of files that llama.cpp never takes as the model of a repository
PASSED_OVER = (*NO_MODEL, "mtp-", "eagle3-", "dflash-", "dspark-")

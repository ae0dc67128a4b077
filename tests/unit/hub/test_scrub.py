"""What must not be published is found, and what looks like it is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from quantkit.checkpoint.header import build_header
from quantkit.gguf import container
from quantkit.hub import scrub, side_files
from quantkit.hub.secrets import masked, shown

TOKEN = "hf_" + "aBcDeFgHiJ" * 3 + "kLmN"
HOME = Path("/home/lovelace")


def found(name: str, content: str | bytes | Path, **more: Any) -> list[str]:
    raw = content.encode("utf-8") if isinstance(content, str) else content
    return scrub.findings({name: raw}, **more)


def test_a_clean_folder(tmp_path: Path) -> None:
    (tmp_path / "quantkit.json").write_text('{"name": "gptq-w4g128", "source": {"id": "org/model"}}')
    files: dict[str, Path | bytes] = {
        "quantkit.json": tmp_path / "quantkit.json",
        "config.json": b'{"architectures": ["A"], "quantization_config": {"dataset": "wikitext2"}}',
        "recipe.yaml": b"source: org/model@0123\ntargets: [gptq:w4g128]\noutput: {dir: out}\n",
        "README.md": b"[org/model](https://huggingface.co/org/model/blob/main/README.md)\n",
        "SHA256SUMS": b"00ff  report/plot.svg\n",
        "4.0bpw/plot.png": b"\x89PNG\0\0/home",
    }
    assert scrub.findings(files, secrets=[TOKEN], home=HOME) == []


@pytest.mark.parametrize(
    "name",
    [
        ".env",
        "sub/.netrc",
        ".gitattributes",
        ".git/config",
        ".cache/huggingface/x.metadata",
        "a/.quantkit/state.json",
        "optimizer.pt",
        "pytorch_model.bin",
        "training_args.bin",
        "x.PKL",
        "notes.ipynb",
        "modeling_x.py",
        "run.log",
        "server.pem",
        "id_rsa",
        "model.safetensors.incomplete",
        "README.md~",
    ],
)
def test_files_that_are_no_part_of_a_model(name: str) -> None:
    (finding,) = found(name, "")
    assert finding.startswith(f"{name}: ")


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "README.md",
        "recipe.yaml",
        "quantkit.json",
        "LICENSE",
        "plot.png",
        "tokenizer.model",
    ],
)
def test_tokens_are_found_in_everything_and_never_repeated(name: str) -> None:
    in_use = "my-own-secret-value"
    content = f'{{"a":\n "x {TOKEN} {in_use}"}}'
    if name.endswith((".png", ".model")):
        content = "\0" + content
    findings = found(name, content, secrets=[in_use])
    assert f"{name}:2 a token of the Hub" in findings and f"{name}:2 the token in use" in findings
    assert TOKEN not in "".join(findings) and in_use not in "".join(findings)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("Authorization: Bearer abcdef0123456789abcdef", "a token of a request"),
        ("ghp_" + "aB3dE5fG7" * 4, "a token of GitHub"),
        ("AKIAIOSFODNN7EXAMPLE", "a key of AWS"),
        ("sk-proj-aB3dE5fG7hI9jK1lM3nO5", "a key of a model service"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("https://alice:s3cr3t-value@example.org/x", "a password in an address"),
        ("eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.SflKxwRJSMeKKF2QT4", "a signed token (JWT)"),
        ("hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzY29wZSI6", "a token of the Hub"),
    ],
)
def test_shapes_of_secrets(text: str, what: str) -> None:
    assert found("README.md", f"one\ntwo\n{text}\n") == [f"README.md:3 {what}"]
    assert text not in masked(f"say {text}.")


@pytest.mark.parametrize(
    "text",
    [
        "pip install hf_transfer hf_xet; from x import hf_quantizer, hf_hub_download",
        "export HF_TOKEN=hf_xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        'curl -H "Authorization: Bearer $HF_TOKEN" http://localhost:8000/v1/chat/completions',
        "OPENAI_API_KEY=sk-your-own-api-key-goes-here",
        "http://user:password@proxy:8080",
        "commit 0123456789abcdef0123456789abcdef01234567",
        "risk-averse task-oriented-multi-turn-dialogue-systems-2024",
    ],
)
def test_what_only_looks_like_a_secret(text: str) -> None:
    assert list(shown(text)) == [] and found("README.md", text) == []


PLACES = [
    "/home/someone/models/x",
    "/Users/someone/x",
    "/root/models/x",
    "C:\\Users\\someone\\x",
    "D:/models/x",
    "file:///srv/x",
    "/mnt/disk/models/x",
    "/data2/models/x",
    "/tmp/run-7/out",
    "~/models/x",
    "~someone/models",
]


@pytest.mark.parametrize("place", PLACES)
def test_places_in_files_of_ours(place: str, tmp_path: Path) -> None:
    (finding,) = found("quantkit.json", json.dumps({"a": 1, "b": {"c": [f"from {place} on"]}}, indent=1))
    assert finding == f"quantkit.json:5 c: a place on this machine, {place!r}"
    (finding,) = found("recipe.yaml", f"source: x\ncalibration: {{file: {place}}}\n")
    assert finding.startswith("recipe.yaml:2 a place on this machine")
    recipe = f"source: x\noutput:\n  dir: {place}\n"
    assert len(found("quantkit.json", json.dumps({"recipe": recipe}))) == 1


def test_relative_places_in_files_of_ours() -> None:
    assert found("quantkit.json", '{"a": "../models/x"}') == [
        "quantkit.json:1 a: a place on this machine, '../models/x'"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "and/or, w4/g128, 1/2, model.layers.*/x, https://x.org/home/me/y, hf://datasets/org/x/y",
        "docker run -v ~/.cache/huggingface:/root/.cache/huggingface -p 8000:8000 vllm/vllm-openai",
        "llama-cli -m /path/to/model.gguf, or /home/user/model.gguf, /Users/<name>/x, C:\\Users\\you\\x",
        "python /opt/conda/bin/python, /usr/local/bin, the drive at /mnt/data, [a](/org/model)",
        "$HOME/x, ${HOME}/models/x/y, ./out/x, file.txt",
    ],
)
def test_what_is_no_place_of_this_machine(text: str) -> None:
    assert found("README.md", text) == []


@pytest.mark.parametrize("place", PLACES[:4] + PLACES[5:8])
def test_places_in_texts(place: str) -> None:
    (finding,) = found("README.md", f"# A model\n\nIt lay in `{place}`.\n")
    assert finding.startswith("README.md:3 a place on this machine")


VOCABULARY = {
    "model": {"vocab": {"/home/someone/x": 1, "cache_dir": 2, "C:\\Users\\me\\": 3, "_name_or_path": 4}}
}


def test_vocabularies_and_templates_are_full_of_slashes() -> None:
    raw = json.dumps(VOCABULARY)
    for name in ("tokenizer.json", "vocab.json", "added_tokens.json", "merges.txt", "chat_template.jinja"):
        assert found(name, raw, home=HOME) == []
        assert scrub.cleaned(name, raw.encode()) == raw.encode()
    template = {"chat_template": "{# /home/sandbox/x and /mnt/data/a/b #}", "content": "/home/x and more"}
    assert found("tokenizer_config.json", json.dumps(template)) == []


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_name_or_path", "/srv/models/x"),
        ("name_or_path", "./x"),
        ("tokenizer_file", "C:\\x\\tokenizer.json"),
        ("model_path", "~/x"),
        ("cache_dir", "/x"),
        ("dataset", "/data/my.txt"),
        ("anything", "/home/someone/x"),
    ],
)
def test_places_in_files_of_the_source(key: str, value: str) -> None:
    raw = json.dumps({"a": {"b": [{key: value}]}}, indent=2)
    (finding,) = found("config.json", raw)
    assert finding.startswith(f"config.json:5 {key}: a place on this machine")
    assert found("config.json", json.dumps({key: "org/model"})) == []


def test_keys_that_occur_twice() -> None:
    assert len(found("config.json", '{"cache_dir": "/a/b", "cache_dir": 5}')) == 1


def test_the_home_of_the_user() -> None:
    assert found("tokenizer.json", f'{{"x": "{HOME}/y"}}', home=HOME) == [
        "tokenizer.json:1 the home folder of the user, '/home/lovelace'"
    ]
    assert found("LICENSE", "see /mnt/lovelace/x", home=HOME)
    for text in ("lovelace/model", "https://huggingface.co/lovelace/model", "by lovelace", "/home/lovelaces"):
        assert found("LICENSE", text, home=HOME) == []
    for name in ("/root", "/", "/home/user", "/home/ubuntu"):
        assert found("LICENSE", f"{name}/x and /a/{Path(name).name}/x", home=Path(name)) == []


def test_many_findings_are_counted() -> None:
    text = "".join(f"/home/someone/{i}\n" for i in range(50))
    findings = found("README.md", text)
    assert len(findings) == 11 and findings[-1] == "README.md: 40 more of the same kind"


def test_safetensors_metadata(tmp_path: Path) -> None:
    header = build_header(
        [("w", torch.float32, (1,), 0, 4)], {"format": "pt", "source": "/home/someone/x", "note": TOKEN}
    )
    path = tmp_path / "model.safetensors"
    path.write_bytes(header + b"\0" * 4)
    expected = [
        "model.safetensors: __metadata__: source: a place on this machine, '/home/someone/x'",
        "model.safetensors: __metadata__: note: a token of the Hub",
    ]
    assert found("model.safetensors", path) == expected
    assert found("model.safetensors", path.read_bytes()) == expected
    path.write_bytes(build_header([("w", torch.float32, (1,), 0, 4)], {"format": "pt"}) + b"\0" * 4)
    assert found("model.safetensors", path) == []
    path.write_bytes(b"\0" * 20)
    assert len(found("model.safetensors", path)) == 1


def test_gguf_metadata(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = tmp_path / "model-Q8_0.gguf"
    clean: dict[str, container.Value] = {
        "general.name": "A model",
        "general.source.repo_url": "https://huggingface.co/org/model",
        "quantize.imatrix.file": "model.imatrix.gguf",
        "quantize.imatrix.dataset": "Salesforce/wikitext@main:wikitext-2-raw-v1/test",
        "tokenizer.ggml.tokens": ["/home/someone/x", "a"],
        "tokenizer.chat_template": "{# /home/sandbox/x #}",
    }
    _write(path, clean)
    assert found(path.name, path, home=HOME) == []
    _write(
        path,
        {
            **clean,
            "quantize.imatrix.file": "/data/x/imatrix.dat",
            "imatrix.datasets": ["a.txt", "../texts/b.txt"],
            "general.description": f"made with {TOKEN}",
            "tokenizer.chat_template": f"{HOME}/x",
        },
    )
    findings = found(path.name, path, home=HOME)
    assert [line.split(": ", 1)[1] for line in findings] == [
        "tokenizer: the home folder of the user, '/home/lovelace'",
        "quantize.imatrix.file: a place on this machine, '/data/x/imatrix.dat'",
        "imatrix.datasets: a place on this machine, '../texts/b.txt'",
        "general.description: a token of the Hub",
    ]
    assert found(path.name, path.read_bytes(), home=HOME) == findings


def test_what_cannot_be_read(tmp_path: Path) -> None:
    assert found("README.md", tmp_path / "README.md")[0].startswith("README.md: cannot be read")
    assert found("README.md", tmp_path)[0].startswith("README.md: cannot be read")


TOKENIZER = """{
  "add_bos_token": true, "name_or_path": "/home/me/x",
  "extra": {"_name_or_path": "org/model"},
  "model_max_length": 1e30,
  "list": [ {"a": 1, "tokenizer_file": null}, 2.50 ],
  "text": "\\u00e9 \\"cache_dir\\": \\"/x\\"",
  "model_path": "/x",
  "special_tokens_map_file": "C:\\\\x"
}
"""


def test_cleaning_keeps_every_other_byte() -> None:
    assert scrub.cleaned("tokenizer_config.json", TOKENIZER.encode()).decode() == (
        """{
  "add_bos_token": true,
  "extra": {},
  "model_max_length": 1e30,
  "list": [ {"a": 1}, 2.50 ],
  "text": "\\u00e9 \\"cache_dir\\": \\"/x\\""
}
"""
    )
    first = b'{ "_name_or_path" : "x" ,\n  "a": 1}'
    assert scrub.cleaned("config.json", first) == b'{ "a": 1}'
    assert scrub.cleaned("sub/config.json", b'{\n "cache_dir": null\n}') == b"{\n }"


@pytest.mark.parametrize(
    "raw",
    [b"", b"[1]", b'{"a": ', b"\xff", b'\xef\xbb\xbf{"cache_dir": "/x"}', b'{"a": ' * 5000, b'{"a": 1}'],
)
def test_what_cleaning_leaves(raw: bytes) -> None:
    assert scrub.cleaned("config.json", raw) == raw
    assert scrub.cleaned("model.safetensors", raw) == raw


_KEYS = st.sampled_from(["a", "b", "_name_or_path", "tokenizer_file", "cache_dir", "model_path", 'q"\\,}'])
_LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from(["/x/y", "org/x", '"}', "é", "./a", ""])
_VALUES = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=4),
    max_leaves=12,
)


@given(st.dictionaries(_KEYS, _VALUES, max_size=5), st.sampled_from([None, 0, 2]), st.booleans())
def test_cleaning_is_scrubbing(config: dict[str, Any], indent: int | None, ascii_only: bool) -> None:
    raw = json.dumps(config, indent=indent, ensure_ascii=ascii_only).encode()
    clean = scrub.cleaned("config.json", raw)
    expected = scrub.scrubbed_config(config)
    assert json.loads(clean) == expected and list(json.loads(clean)) == list(expected)
    assert scrub.cleaned("config.json", clean) == clean
    assert found("config.json", clean) == []
    if expected == config:
        assert clean == raw


def test_the_rule_of_names() -> None:
    assert side_files.names_a_place("_name_or_path", "org/model")
    assert not side_files.names_a_place("_name_or_path", 5)
    assert not side_files.names_a_place("model_path", "org/model")
    assert not side_files.names_a_place("pathology", "/x")


def _write(path: Path, metadata: dict[str, container.Value]) -> None:
    stored = container.Stored("w", (4,), "f32")
    container.write(path, "llama", metadata, [stored], [torch.zeros(16, dtype=torch.uint8)])

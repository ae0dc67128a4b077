"""How to run the files: commands to copy, for each engine that a target's format says will load it."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from quantkit.errors import RecipeError
from quantkit.hub.card.markdown import fenced, text
from quantkit.hub.card.page import PUBLIC, Page, Variant
from quantkit.schemes import parse_scheme

# What llama.cpp takes of a repository when no type is asked for.
_USUAL = ("Q4_K_M", "Q8_0")
_USUAL_BITS = 5.0
_PROMPT = "The capital of France is"
_PACKAGES = MappingProxyType(
    {
        "gptq": ("gptqmodel>=7.6", "optimum>=2.3"),
        "awq": ("gptqmodel>=7.6",),
        "compressed_tensors": ("compressed-tensors>=0.19", "loguru"),
        "bitsandbytes": ("bitsandbytes>=0.46.1",),
        "gguf": ("gguf>=0.19",),
    }
)


@dataclass(frozen=True, slots=True)
class Instruction:
    """One engine: `content` is Markdown; `only` names what it loads where that is not everything."""

    engine: str
    content: str
    only: tuple[str, ...]


def instructions(page: Page) -> tuple[Instruction, ...]:
    """One per engine that loads any of the variants, in the order that formats name them."""
    labelled = list(zip(page.listed, page.labels(), strict=True))
    found = []
    for engine in dict.fromkeys(engine for v, _ in labelled for engine in v.manifest.engines):
        loaded = [(v, label) for v, label in labelled if engine in v.manifest.engines]
        write = _WRITERS.get(engine)
        shown = usual(tuple(v for v, _ in loaded))
        content = write(page, shown) if write is not None else ""
        only = tuple(label for _, label in loaded) if len(loaded) < len(labelled) else ()
        if content:
            found.append(Instruction(engine, content, only))
    return tuple(found)


def others(page: Page) -> tuple[str, ...]:
    """Engines that load the files and that no command is known for."""
    named = dict.fromkeys(engine for v in page.listed for engine in v.manifest.engines)
    return tuple(engine for engine in named if engine not in _WRITERS)


def called(engine: str) -> str:
    """The name of an engine for readers: a ``+`` stands before what it needs."""
    return text(engine.replace("+", " with "))


def notes(page: Page) -> tuple[str, ...]:
    """What formats say about engines, in Markdown, each once."""
    labelled = zip(page.listed, page.labels(), strict=True)
    said: dict[str, list[str]] = {}
    for variant, label in labelled:
        for note in variant.manifest.notes:
            said.setdefault(note, []).append(label)
    everywhere = len(page.listed)
    return tuple(
        text(note) if len(labels) == everywhere else f"{text(', '.join(labels))}: {text(note)}"
        for note, labels in said.items()
    )


def usual(variants: tuple[Variant, ...]) -> Variant:
    """The one that commands show."""
    by_tag = {v.tag: v for v in variants}
    middle = min(variants, key=lambda v: abs(v.manifest.bits_per_weight - _USUAL_BITS))
    return next((by_tag[tag] for tag in _USUAL if tag in by_tag), middle)


def download(page: Page, variant: Variant, folder: str | None = None) -> str:
    """The command that fetches one variant."""
    command = ["hf", "download", page.repo]
    if variant.gguf and len(variant.files) == 1:
        command.append(variant.files[0])
    elif variant.gguf:
        command += ["--include", f"{variant.files[0].rpartition('/')[0] or variant.stem}*"]
    command += [*_revision(variant), "--local-dir", folder or "."]
    return shlex.join(command)


def folder_of(page: Page, variant: Variant) -> str:
    """A name for a folder to download to."""
    name = page.repo.rpartition("/")[2]
    return name if variant.branch is None else f"{name}-{variant.branch}"


def _revision(variant: Variant) -> list[str]:
    return [] if variant.branch is None else ["--revision", variant.branch]


def _llama_cpp(page: Page, variant: Variant) -> str:
    if variant.branch is not None:
        # -hf knows the main branch only
        lines = [download(page, variant), shlex.join(["llama-server", "-m", variant.files[0]])]
    elif variant.tag is not None and _tagged(page, variant.tag) == 1:
        lines = [shlex.join(["llama-server", "-hf", f"{page.repo}:{variant.tag}"])]
    else:
        lines = [shlex.join(["llama-server", "-hf", page.repo, "-hff", variant.files[0]])]
    return fenced("\n".join(lines), "sh")


def _tagged(page: Page, tag: str) -> int:
    return sum(v.tag == tag for v in page.listed)


def _ollama(page: Page, variant: Variant) -> str:
    """Single files of the main branch of the Hub itself."""
    single = len(variant.files) == 1 and variant.branch is None and page.public
    if not single or variant.tag is None or _tagged(page, variant.tag) > 1:
        return ""
    return fenced(shlex.join(["ollama", "run", f"hf.co/{page.repo}:{variant.tag}"]), "sh")


def _lm_studio(page: Page, variant: Variant) -> str:
    if not page.public or variant.branch is not None:
        return ""
    # by its address: short names are looked up in LM Studio's own catalogue
    which = f"@{variant.tag}" if variant.tag is not None else ""
    return fenced(shlex.join(["lms", "get", f"{PUBLIC}/{page.repo}{which}"]), "sh")


def _vllm(page: Page, variant: Variant) -> str:
    cache = ["--kv-cache-dtype", "fp8"] if variant.manifest.made.get("kv_cache") == "fp8" else []
    return fenced(shlex.join(["vllm", "serve", page.repo, *_revision(variant), *cache]), "sh")


def _sglang(page: Page, variant: Variant) -> str:
    command = ["python", "-m", "sglang.launch_server", "--model-path", page.repo, *_revision(variant)]
    return fenced(shlex.join(command), "sh")


def _transformers(page: Page, variant: Variant) -> str:
    packages = ("transformers>=5.20", "accelerate>=1.1", *_PACKAGES.get(variant.manifest.format, ()))
    where = [json.dumps(page.repo, ensure_ascii=False)]
    if variant.branch is not None:
        where.append(f"revision={json.dumps(variant.branch)}")
    if variant.gguf:
        where.append(f"gguf_file={json.dumps(variant.files[0], ensure_ascii=False)}")
    source = ", ".join(where)
    dtype, config, imports = _loading(variant)
    names = ", ".join(
        ["AutoModelForCausalLM", "AutoTokenizer", *(["CompressedTensorsConfig"] if config else [])]
    )
    lines = [
        *imports,
        f"from transformers import {names}",
        "",
        f"tokenizer = AutoTokenizer.from_pretrained({source})",
        f'model = AutoModelForCausalLM.from_pretrained({source}, dtype={dtype}, device_map="auto"{config})',
        *_prompt(page),
        "made = model.generate(**inputs, max_new_tokens=100)",
        'print(tokenizer.decode(made[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))',
    ]
    return "\n\n".join([_install(packages), fenced("\n".join(lines), "python")])


def _loading(variant: Variant) -> tuple[str, str, list[str]]:
    """(dtype, more arguments, imports) that transformers needs to compute what the file says."""
    made = variant.manifest
    if made.format != "compressed_tensors":
        return '"auto"', "", []
    try:
        scheme = parse_scheme(made.scheme)
    except RecipeError:
        return '"auto"', "", []
    if not scheme.sym:
        return '"auto"', ", quantization_config=CompressedTensorsConfig(dequantize=True)", []
    if scheme.numbers in ("mxfp4", "nvfp4") and made.source.dtype != "bfloat16":
        return "torch.bfloat16", "", ["import torch"]
    return '"auto"', "", []


def _prompt(page: Page) -> list[str]:
    if page.template is None:
        return [f'inputs = tokenizer("{_PROMPT}", return_tensors="pt").to(model.device)']
    return [
        'messages = [{"role": "user", "content": "What is the capital of France?"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
        ").to(model.device)",
    ]


def _gptqmodel(page: Page, variant: Variant) -> str:
    """Only where transformers does not load the files by way of it."""
    if "transformers+gptqmodel" in variant.manifest.engines:
        return ""
    folder = folder_of(page, variant)
    lines = [
        "from gptqmodel import GPTQModel",
        "",
        f"model = GPTQModel.load({json.dumps(folder)})",
        f'made = model.generate("{_PROMPT}", max_new_tokens=100)[0]',
        "print(model.tokenizer.decode(made))",
    ]
    install = _install(("gptqmodel>=7.6",), download(page, variant, folder))
    return "\n\n".join([install, fenced("\n".join(lines), "python")])


def _exllama(page: Page, variant: Variant) -> str:
    folder = folder_of(page, variant)
    lines = [
        "from exllamav2 import ExLlamaV2, ExLlamaV2Cache, ExLlamaV2Config, ExLlamaV2Tokenizer",
        "from exllamav2.generator import ExLlamaV2DynamicGenerator",
        "",
        f"config = ExLlamaV2Config({json.dumps(folder)})",
        "model = ExLlamaV2(config)",
        "cache = ExLlamaV2Cache(model, lazy=True)",
        "model.load_autosplit(cache)",
        "generator = ExLlamaV2DynamicGenerator(model, cache, ExLlamaV2Tokenizer(config))",
        f'print(generator.generate("{_PROMPT}", max_new_tokens=100))',
    ]
    install = _install(("exllamav2",), download(page, variant, folder))
    return "\n\n".join([install, fenced("\n".join(lines), "python")])


def _hqq(page: Page, variant: Variant) -> str:
    where = json.dumps(page.repo, ensure_ascii=False)
    revision = f", revision={json.dumps(variant.branch)}" if variant.branch is not None else ""
    lines = [
        "from pathlib import Path",
        "",
        "import torch",
        "from accelerate import init_empty_weights",
        "from hqq.core.quantize import HQQLinear",
        "from huggingface_hub import snapshot_download",
        "from safetensors.torch import load_file",
        "from transformers import AutoConfig, AutoModelForCausalLM",
        "",
        f"folder = Path(snapshot_download({where}{revision}))",
        'files = sorted(folder.glob("*.safetensors"))',
        "tensors = {k: v for file in files for k, v in load_file(file).items()}",
        "config = AutoConfig.from_pretrained(folder)",
        "with init_empty_weights():",
        "    model = AutoModelForCausalLM.from_config(config)",
        'for name in [n.removesuffix(".W_q") for n in tensors if n.endswith(".W_q")]:',
        '    linear = HQQLinear(None, None, compute_dtype=torch.float16, device="cpu")',
        "    model.set_submodule(name, linear)",
        "if config.tie_word_embeddings:",
        '    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]',
        "model.load_state_dict(tensors, assign=True)",
        "model.to(torch.float16).eval()",
    ]
    packages = ("hqq>=0.2.8", "transformers>=5.20", "accelerate>=1.1")
    return "\n\n".join([_install(packages), fenced("\n".join(lines), "python")])


def _install(packages: tuple[str, ...], *more: str) -> str:
    return fenced("\n".join([shlex.join(["pip", "install", *packages]), *more]), "sh")


_WRITERS: Mapping[str, Callable[[Page, Variant], str]] = MappingProxyType(
    {
        "llama.cpp": _llama_cpp,
        "Ollama": _ollama,
        "LM Studio": _lm_studio,
        "vLLM": _vllm,
        "SGLang": _sglang,
        "transformers": _transformers,
        "transformers+gptqmodel": _transformers,
        "gptqmodel": _gptqmodel,
        "ExLlamaV2": _exllama,
        "hqq": _hqq,
    }
)


def endpoint_note(page: Page) -> str:
    """What to set before tools look elsewhere than on the Hub; empty for the Hub."""
    if page.public:
        return ""
    value = shlex.quote(page.endpoint)
    return fenced(f"export HF_ENDPOINT={value} MODEL_ENDPOINT={value}  # instead of {PUBLIC}", "sh")

"""The card says what the manifest says, and nothing that nobody measured."""

from __future__ import annotations

import ast
import dataclasses
import re
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from quantkit.errors import UsageError
from quantkit.hub.card import Page, engines, markdown, metadata, numbers, own_text, render
from quantkit.hub.card.memory import OVERHEAD, needed
from quantkit.hub.manifest import Kept
from tests import cards

NUMBER = re.compile(r"\d+\.\d+ ±|\d+\.\d+ %")


def front(text: str) -> dict[str, Any]:
    found = yaml.safe_load(text.split("---\n")[1])
    assert isinstance(found, dict)
    return found


def body(text: str) -> str:
    return text.split("<!-- quantkit:begin")[1]


def section(text: str, title: str) -> str:
    found = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)
    assert found, f"no section {title}"
    return found[1]


def rows(table: str) -> dict[str, list[str]]:
    """Cells of the lines of the first table, by the first."""
    first = re.search(r"(^\|.*\n?)+", table, re.MULTILINE)
    assert first
    lines = [re.split(r"(?<!\\)\|", line)[1:-1] for line in first[0].splitlines()]
    return {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in lines}


def five() -> Page:
    return cards.page(*(cards.gguf(*row) for row in reversed(cards.GGUF)))


def test_the_first_table_is_sorted_by_size_and_links_to_the_files() -> None:
    text = render(five())
    first = text.split("## ")[0]
    names = re.findall(r"\| \[(\S+)\]\((\S+)\) \|", first)
    assert [name for name, _ in names] == [f"Tiny-1B-Instruct-{s.upper()}.gguf" for s, *_ in cards.GGUF]
    assert names[1][1] == (
        "https://huggingface.co/alice/Tiny-1B-Instruct-GGUF/blob/main/Tiny-1B-Instruct-Q4_K_M.gguf"
    )
    cells = rows(first)[f"[{names[1][0]}]({names[1][1]})"]
    assert cells == ["Q4_K_M", "755 MB", "no", "4.89", "**the usual choice**"]


def test_measured_numbers_are_those_of_the_manifest() -> None:
    found = rows(section(render(five()), "Quality"))
    assert found["source, bfloat16"][:2] == ["2.47 GB", "13.163 ± 0.095"]
    assert found["Q4_K_M"][:6] == [
        "755 MB", "13.444 ± 0.096", "+2.14 ± 0.11 %", "0.02140 ± 0.00027", "0.49220", "93.77 %",
    ]  # fmt: skip


def test_peak_memory_and_agreement_come_from_the_checks() -> None:
    quality = section(render(cards.page()), "Quality")
    assert "peak memory, llama.cpp on cpu" in quality and "1.53 GB" in quality
    engine = [line for line in quality.splitlines() if "llama.cpp 0.3.36" in line]
    assert engine == ["| Q4_K_M | llama.cpp 0.3.36 | cpu | loads | 2,048 | 0.00014 | 99.51 % |"]
    broken = cards.variant(checks=(cards.check(problem="it stops: unknown type", tokens=0, kl_mean=None),))
    shown = section(render(cards.page(broken)), "Quality")
    assert "**it stops: unknown type** | not measured | not measured" in shown


def test_several_engines_are_named_in_the_cells() -> None:
    checks = (cards.check(), cards.check(engine="ollama", device="cuda", peak_bytes=2_000_000_000))
    quality = section(render(cards.page(cards.variant(checks=checks))), "Quality")
    assert "1.53 GB (llama.cpp on cpu); 2.00 GB (ollama on cuda)" in quality


def test_nothing_measured_means_no_number() -> None:
    text = render(cards.page(cards.variant(cards.manifest(quality=()), checks=())))
    assert "model-index" not in front(text)
    assert "Quality: not measured." in text and "## Quality" not in text
    assert "Not loaded in an engine by quantkit" in text
    assert not NUMBER.search(body(text)) and "KL" not in body(text)


def test_a_cell_that_nobody_measured_says_so() -> None:
    page = cards.page(cards.gguf("q4_k_m", 4.89, 0.02), cards.gguf("q8_0", 8.5))
    text = render(page)
    assert rows(section(text, "Quality"))["Q8_0"][1:6] == ["not measured"] * 5
    assert [entry["name"] for entry in front(text)["model-index"]] == ["Tiny-1B-Instruct-Q4_K_M"]


def test_sources_that_differ_are_shown_beside_each() -> None:
    other = cards.quality(source=cards.Perplexity(13.2001, 0.09))
    second = cards.gguf("q8_0", 8.5)
    second = dataclasses.replace(second, manifest=dataclasses.replace(second.manifest, quality=(other,)))
    found = rows(section(render(cards.page(cards.gguf("q4_k_m", 4.89, 0.02), second)), "Quality"))
    assert "source, bfloat16" not in found
    assert found["Q4_K_M"][6] == "13.163 ± 0.095" and found["Q8_0"][6] == "13.200 ± 0.090"


def test_two_texts_are_two_tables() -> None:
    second = cards.quality(convention="my notes/gptq-2048@00112233")
    made = cards.manifest(quality=(cards.quality(), second))
    quality = section(render(cards.page(cards.variant(made))), "Quality")
    assert quality.count("| size | perplexity |") == 2 and quality.count("peak memory") == 1
    assert "a text called `my notes` in windows of 2,048 tokens, of which all but the first" in quality


def test_a_perplexity_below_the_source_is_explained() -> None:
    below = cards.manifest(quality=(cards.quality(ratio=cards.Perplexity(0.97, 0.001)),))
    assert "Q4_K_M: perplexity lies below the source's" in render(cards.page(cards.variant(below)))
    assert "lies below the source" not in render(cards.page())


def test_a_quantized_source_is_said_at_the_top() -> None:
    made = cards.manifest(source={"quantized": "gptq, 4 bits"})
    first = render(cards.page(cards.variant(made))).split("## ")[0]
    assert "The source is itself quantized** (gptq, 4 bits)" in first


def test_verdicts_give_way_to_measurements() -> None:
    assert "hard to tell" in render(cards.page(cards.gguf("q8_0", 8.5, 0.0004)))
    assert "hard to tell" not in render(cards.page(cards.gguf("q8_0", 8.5, 0.4)))


@pytest.mark.parametrize(
    ("engine", "command"),
    [
        ("llama.cpp", "llama-server -hf alice/Tiny-1B-Instruct-GGUF:Q4_K_M"),
        ("Ollama", "ollama run hf.co/alice/Tiny-1B-Instruct-GGUF:Q4_K_M"),
        ("LM Studio", "lms get https://huggingface.co/alice/Tiny-1B-Instruct-GGUF@Q4_K_M"),
    ],
)
def test_commands_for_gguf(engine: str, command: str) -> None:
    found = {one.engine: one.content for one in engines.instructions(five())}
    assert command in found[engine]


def test_commands_for_safetensors() -> None:
    page = cards.page(cards.gptq(), repo="alice/Tiny-GPTQ")
    found = {one.engine: one.content for one in engines.instructions(page)}
    assert set(found) == {"transformers+gptqmodel", "vLLM", "SGLang", "ExLlamaV2"}
    assert "vllm serve alice/Tiny-GPTQ" in found["vLLM"]
    assert "'gptqmodel>=7.6'" in found["transformers+gptqmodel"]
    branch = dataclasses.replace(cards.gptq(), branch="4bit")
    shown = render(cards.page(branch, repo="alice/Tiny-GPTQ", branch="4bit"))
    assert "vllm serve alice/Tiny-GPTQ --revision 4bit" in shown
    assert 'from_pretrained("alice/Tiny-GPTQ", revision="4bit"' in shown
    assert "hf download alice/Tiny-GPTQ --revision 4bit --local-dir Tiny-GPTQ-4bit" in shown


@pytest.mark.parametrize("template", [None, "<user>hello"])
@pytest.mark.parametrize(
    ("format", "scheme", "loads", "holds"),
    [
        ("bitsandbytes", "nf4", ("transformers", "SGLang"), "bitsandbytes>="),
        ("compressed_tensors", "w4g128_asym", ("transformers",), "CompressedTensorsConfig(dequantize=True)"),
        ("compressed_tensors", "nvfp4", ("transformers", "vLLM"), "dtype=torch.bfloat16"),
        ("hqq", "w4g64_asymf", ("hqq",), "HQQLinear"),
        ("gptq", "w3g128", ("gptqmodel",), "GPTQModel.load"),
        ("gguf", "q4_0", ("llama.cpp", "transformers"), "gguf_file="),
    ],
)
def test_programs_in_the_card_are_python(
    template: str | None, format: str, scheme: str, loads: tuple[str, ...], holds: str
) -> None:
    made = cards.manifest(format=format, scheme=scheme, engines=loads, source={"dtype": "float16"})
    text = render(cards.page(cards.variant(made, branch='we"ird'), template=template))
    assert holds in text
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert programs
    for program in programs:
        ast.parse(program)
    assert ("apply_chat_template" in text) == (template is not None and "transformers" in loads)


def test_every_engine_that_formats_name_has_a_command() -> None:
    named = {"llama.cpp", "Ollama", "LM Studio", "vLLM", "SGLang", "ExLlamaV2", "hqq", "gptqmodel"}
    assert set(engines._WRITERS) == named | {"transformers", "transformers+gptqmodel"}
    assert "Also loads in MyEngine." in render(
        cards.page(cards.variant(cards.manifest(engines=("MyEngine",))))
    )


def test_engines_that_load_some_variants_say_which() -> None:
    some = dataclasses.replace(
        cards.gguf("q8_0", 8.5), manifest=cards.manifest(scheme="q8_0", engines=("llama.cpp",))
    )
    found = {
        one.engine: one.only for one in engines.instructions(cards.page(cards.gguf("q4_k_m", 4.9), some))
    }
    assert found["llama.cpp"] == () and found["Ollama"] == ("Q4_K_M",)


def test_two_files_with_one_tag_are_asked_for_by_name() -> None:
    careful = cards.gguf("q4_k_m", 5.1)
    careful = dataclasses.replace(careful, files=("careful-Q4_K_M.gguf",))
    page = cards.page(cards.gguf("q4_k_m", 4.89), careful)
    found = {one.engine: one.content for one in engines.instructions(page)}
    assert "-hff" in found["llama.cpp"] and "Ollama" not in found
    assert page.labels() == ("Tiny-1B-Instruct-Q4_K_M", "careful-Q4_K_M")


def test_split_files_are_one_row_and_one_download() -> None:
    parts = tuple(f"Q8_0/Tiny-Q8_0-0000{n}-of-00002.gguf" for n in (1, 2))
    page = cards.page(dataclasses.replace(cards.gguf("q8_0", 8.5), files=parts))
    text = render(page)
    assert "/tree/main/Q8_0) | Q8_0 | 1.31 GB | 2 files |" in text
    assert "--include 'Q8_0*'" in text
    assert "ollama" not in text and ":Q8_0" in text


def test_side_files_are_no_weights() -> None:
    beside = ("config.json", "mmproj-Tiny-F16.gguf", "Tiny.imatrix.gguf", "report/quality.png")
    made = cards.variant()
    assert dataclasses.replace(made, files=(*beside, *made.files)).files == made.files
    shards = cards.gptq().files
    assert dataclasses.replace(cards.gptq(), files=("tokenizer.json", *reversed(shards))).files == shards


def test_another_endpoint_is_set_first_and_ollama_left_out() -> None:
    text = render(cards.page(endpoint="https://hub.example"))
    assert "export HF_ENDPOINT=https://hub.example" in text and "ollama run" not in text
    assert "https://huggingface.co/alice" not in text


def large(**source: Any) -> Page:
    parameters = 8_030_261_248
    variants = []
    for scheme, bits, kl, _ in cards.GGUF:
        made = cards.gguf(scheme, bits, kl)
        changed = dataclasses.replace(
            made.manifest,
            size_bytes=int(parameters * bits / 8),
            source=cards.origin(cache_bytes=131072, parameters=parameters, **source),
        )
        variants.append(dataclasses.replace(made, manifest=changed))
    return cards.page(*variants)


def test_the_memory_table_is_computed() -> None:
    page = large()
    found = rows(section(render(page), "Which one to take"))
    assert found["memory"] == ["context 4,096", "context 8,192", "context 32,768"]
    # 8.03e9 · 4.89 / 8 bytes and 8,192 · 128 KiB and 0.8 GiB are 6.37 GiB of 7
    q4 = next(v for v in page.listed if v.tag == "Q4_K_M")
    assert needed(q4, 8192) == q4.manifest.size_bytes + (1 << 30) + OVERHEAD
    assert found["8 GB"] == ["Q5_K_M", "Q4_K_M", "–"]
    assert found["24 GB"] == ["Q8_0"] * 3


def test_the_memory_table_needs_what_it_is_computed_from() -> None:
    assert "## Which one" not in render(large(context=None))
    assert rows(section(render(large(context=6000)), "Which one to take"))["memory"] == ["context 4,096"]
    assert rows(section(render(large(context=512)), "Which one to take"))["memory"] == ["context 512"]
    unknown = cards.manifest(source={"cache_bytes": None})
    assert "## Memory" not in render(cards.page(cards.variant(unknown)))
    assert "## Memory" in render(cards.page())


def test_how_it_was_made() -> None:
    made = section(render(cards.page()), "How it was made")
    assert "[org/Tiny-1B-Instruct@01234567](https://huggingface.co/org/Tiny-1B-Instruct/tree/0123" in made
    assert "quantkit 0.1.0, torch 2.13.0" in made and "524,288 tokens (256 rows of 2,048)" in made
    assert "chosen with seed 7" in made and "9e20f6b48d9d8316bef2f93c9a638914a07aded3" in made
    assert f"```yaml\n{cards.RECIPE}```" in made
    assert "| `blk.*.attn_norm` | 16 | 32,768 | F32 |" in made
    assert "fallback" not in made
    helped = cards.variant(cards.manifest(fallbacks=3, made={"feedback": True, "kv_cache": "fp8"}))
    made = section(render(cards.page(helped)), "How it was made")
    assert "3 weights needed a fallback" in made and "feedback; kv_cache `fp8`" in made


def test_an_importance_matrix_is_named_without_folders() -> None:
    known = {"imatrix": "my.imatrix.gguf", "sha256": "ab" * 32, "datasets": ["/home/bob/secret/wiki.raw"]}
    text = render(cards.page(cards.variant(cards.manifest(calibration=known))))
    assert "importance matrix `my.imatrix.gguf`, collected from `wiki.raw`" in text
    assert "/home/bob" not in text and "imatrix" in front(text)["tags"]


def test_a_local_source_is_called_by_name() -> None:
    made = cards.variant(cards.manifest(source={"id": "my-model", "revision": None}))
    text = render(cards.page(made))
    assert "a folder called `my-model`, according to the publisher [org/Tiny-1B-Instruct]" in text
    assert "source_revision" not in front(text)["quantkit"]


def test_notes_template_changes_and_licence() -> None:
    notes = own_text.notes("Some *words* of mine | with a bar\n\n<b>and HTML</b>\n", None)
    assert notes is not None
    licence = dataclasses.replace(cards.LICENCE, id="other", name="tiny", link="LICENSE", more=("mit",))
    text = render(
        cards.page(
            notes=notes, template="```\n<|user|>hi\n```", changes=("second", "first | one"), licence=licence
        )
    )
    assert section(text, "Notes").strip() == notes.marked
    assert notes.marked.split("\n")[1:-1] == ["Some *words* of mine | with a bar", "", "<b>and HTML</b>"]
    assert "````\n```\n<|user|>hi\n```\n````" in section(text, "Prompt and context")
    assert section(text, "Changes").strip() == "- second\n- first \\| one"
    assert "other, mit ([tiny](https://huggingface.co/alice/Tiny-1B-Instruct-GGUF/blob/main/LICENSE))" in text
    assert front(text)["license"] == ["other", "mit"]
    stated = dataclasses.replace(cards.LICENCE, id=None, base_models=())
    text = render(cards.page(licence=stated))
    assert "Licence: not stated by the source." in text
    assert not {"license", "base_model", "base_model_relation"} & set(front(text))


def test_our_marks_cannot_be_smuggled_in() -> None:
    with pytest.raises(UsageError, match="quantkit finds its own part"):
        render(cards.page(notes=own_text.notes("<!-- quantkit:end -->", None)))
    mark = own_text.Notes("x", "").marked
    with pytest.raises(UsageError, match="quantkit finds its own part"):
        render(cards.page(cards.variant(cards.manifest(recipe=f"a: |\n{mark}\n"))))


HOSTILE = "`|x|</td><script>alert(1)</script>\n| evil | row |\n**b** [c](javascript:d) ${{7*7}} {{ 7*7 }}"


def test_hostile_names_stay_in_their_cells() -> None:
    made = cards.manifest(
        kept=(Kept(HOSTILE, 1, 2, HOSTILE),),
        notes=(HOSTILE,),
        source={
            "id": HOSTILE,
            "architecture": HOSTILE,
            "dtype": HOSTILE,
            "quantized": HOSTILE,
            "revision": None,
        },
        versions={HOSTILE: HOSTILE},
    )
    checks = (cards.check(problem=HOSTILE, device=HOSTILE, version=HOSTILE),)
    text = render(cards.page(cards.variant(made, checks=checks), changes=(HOSTILE,)))
    shown = re.sub(
        r"(`+).*?\1", "", re.sub(r"^(`{3,}).*?^\1$", "", body(text), flags=re.DOTALL | re.MULTILINE)
    )
    assert "<script" not in shown and "</td>" not in shown and "\n| evil" not in text
    assert "](javascript:" not in shown.replace("\\]", "")
    assert "{{ 7*7 }}" in body(text)
    widths = {len(rows(line).popitem()[1]) for line in text.splitlines() if "F32" in line or "loads" in line}
    assert len(widths) <= 1


def test_markdown_of_strangers() -> None:
    assert markdown.text("a|b\n<c>&_d_ e_f") == "a\\|b &lt;c&gt;&amp;\\_d\\_ e_f"
    assert markdown.code("a`b") == "``a`b``" and markdown.code("`") == "`` ` ``"
    assert markdown.code("a|b", in_table=True) == "`a\\|b`"
    assert markdown.fenced("```") == "````\n```\n````"


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0214, 0.00027, "0.02140 ± 0.00027"),
        (0.000412, 0.00000515, "0.000412 ± 0.000005"),
        (0.0, 0.0, "0 ± 0"),
        (3.1e-7, None, "0.00000031"),
        (1.5, None, "1.50000"),
    ],
)
def test_small_numbers_keep_their_digits(value: float, error: float | None, shown: str) -> None:
    assert numbers.kl(value, error) == shown


def test_the_client_reads_the_metadata(caplog: pytest.LogCaptureFixture) -> None:
    text = render(five())
    card = ModelCard(text)
    data = card.data.to_dict()
    assert data["base_model"] == "org/Tiny-1B-Instruct" and data["base_model_relation"] == "quantized"
    assert data["quantkit"]["source_revision"] == cards.REVISION and data["quantized_by"] == "alice"
    assert data["language"] == ["en", "no"] and data["datasets"] == ["org/training-text"]
    assert data["tags"] == ["quantkit", "gguf", "chat"] and data["library_name"] == "gguf"
    assert data["quantkit"]["bpw"]["Q8_0"] == 8.5 and data["quantkit"]["format"] == "gguf"
    assert card.text.strip().startswith("<!-- quantkit:begin")
    assert metadata.problems(text) == []
    assert "rror" not in caplog.text


def test_model_index_has_an_entry_per_file_with_the_measured_values() -> None:
    index = front(render(five()))["model-index"]
    assert [entry["name"] for entry in index] == [f"Tiny-1B-Instruct-{s.upper()}" for s, *_ in cards.GGUF]
    name, results = model_index_to_eval_results([index[1]])
    assert name == "Tiny-1B-Instruct-Q4_K_M"
    measured = cards.quality(0.0214, 0.9377)
    assert {r.metric_type: r.metric_value for r in results} == {
        "perplexity": measured.target.value,
        "kl_divergence": measured.kl_mean,
        "top1_agreement": measured.top1_agreement,
    }
    assert {(r.dataset_type, r.dataset_config, r.dataset_split) for r in results} == {
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test")
    }
    assert results[0].metric_args["n_ctx"] == 512 and results[0].metric_args["engine"] == "quantkit 0.1.0"
    other = cards.manifest(quality=(cards.quality(convention="squad/gptq-64@00000000"),))
    (entry,) = front(render(cards.page(cards.variant(other))))["model-index"]
    assert entry["results"][0]["dataset"] == {"type": "local-text", "name": "squad"}


@pytest.mark.parametrize(
    ("changes", "library", "tags"),
    [
        ({"format": "gptq", "scheme": "w4g128", "engines": ("transformers+gptqmodel",)}, "transformers",
         {"gptq", "4-bit"}),
        ({"format": "gptq", "scheme": "w8g128", "engines": ("gptqmodel", "vLLM")}, "transformers",
         {"gptq", "8-bit"}),
        ({"format": "compressed_tensors", "scheme": "fp8", "engines": ()}, "transformers",
         {"compressed-tensors", "8-bit", "fp8"}),
        ({"format": "hqq", "scheme": "w4g64_asymf", "engines": ("hqq",)}, "hqq", {"hqq", "4-bit"}),
        ({"format": "compressed_tensors", "scheme": "nvfp4", "engines": ("transformers",)}, "transformers",
         {"compressed-tensors", "4-bit", "nvfp4"}),
    ],
)  # fmt: skip
def test_library_and_tags(changes: dict[str, Any], library: str, tags: set[str]) -> None:
    found = front(render(cards.page(cards.variant(cards.manifest(**changes)))))
    assert found["library_name"] == library and set(found["tags"]) == {"quantkit", "chat", *tags}


def test_paths_of_the_machine_are_not_inherited() -> None:
    card = {"tags": ["ok", "/home/bob/x", "base_model:org/x"], "datasets": ["../data"], "language": "en"}
    text = render(cards.page(cards.variant(cards.manifest(source={"card": card})), template="x"))
    found = front(text)
    assert found["tags"] == ["quantkit", "gguf", "ok", "conversational"] and found["language"] == ["en"]
    assert "datasets" not in found and "/home/bob" not in text


def test_what_is_not_valid_is_not_inherited() -> None:
    """Also where an older quantkit.json holds it as it was written."""
    card = {
        "pipeline_tag": "<script>",
        "language": ["<b>", "en"],
        "datasets": ["x y", "a/b/c", "org/texts"],
        "tags": ["a\x00b", "ok"],
    }
    text = render(cards.page(cards.variant(cards.manifest(source={"card": card}))))
    found = front(text)
    assert found["pipeline_tag"] == "text-generation" and found["language"] == ["en"]
    assert found["datasets"] == ["org/texts"] and found["tags"] == ["quantkit", "gguf", "ok"]
    assert metadata.problems(text) == []


def test_a_licence_that_could_not_be_read() -> None:
    unread = dataclasses.replace(cards.LICENCE, id=None, unread=True)
    text = render(cards.page(licence=unread))
    assert "Licence: not known, for the card of the source cannot be read." in text
    assert "not stated" not in text
    assert "Licence: apache-2.0." in render(cards.page(licence=dataclasses.replace(unread, id="apache-2.0")))


def branches() -> list[cards.Variant]:
    bits = ((2, 2.9, 0.31), (4, 5.44, 0.021), (8, 9.4, 0.0009))
    found = []
    for width, bpw, kl in bits:
        made = cards.gptq(quality=(cards.quality(kl),), recipe=f"bits: {width}\n")
        changed = dataclasses.replace(
            made.manifest, scheme=f"w{width}g128", bits_per_weight=bpw, name=f"gptq-{width}"
        )
        found.append(dataclasses.replace(made, manifest=changed, branch=f"{bpw}bpw"))
    return found


def test_the_main_branch_lists_the_others() -> None:
    made = branches()
    text = render(cards.page(variants=(), siblings=tuple(made), repo="alice/Tiny-GPTQ"))
    links = re.findall(r"\| \[(\S+bpw)\]\((\S+)\)", text)
    assert links[0] == ("2.9bpw", "https://huggingface.co/alice/Tiny-GPTQ/tree/2.9bpw") and len(links) == 3
    assert "vllm serve alice/Tiny-GPTQ --revision 5.44bpw" in text
    assert front(text)["model-index"][0]["name"] == "Tiny-GPTQ 2.9bpw"
    assert "2.9bpw: `model-00001-of-00002.safetensors`" in text


def test_a_branch_points_to_main() -> None:
    first, *others = branches()
    text = render(cards.page(first, branch="2.9bpw", siblings=tuple(others), repo="alice/Tiny-GPTQ"))
    assert text.count("# Tiny-GPTQ, 2.9bpw") == 1
    assert "one of 3 versions; [the main branch](https://huggingface.co/alice/Tiny-GPTQ)" in text
    assert "5.44bpw" not in text and "## Memory" not in text and "bits: 2" in text
    assert front(text)["quantkit"]["bpw"] == 2.9


def test_pages_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="nothing to describe"):
        cards.page(variants=())
    other = cards.variant(cards.manifest(source={"fingerprint": "00", "id": "org/other"}))
    with pytest.raises(UsageError, match="a card describes one"):
        cards.page(cards.variant(), other)


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("license: apache-2.0", "license: [apache-2.0, 3]", "README.md:5 license: must be"),
        ("license: apache-2.0", "license: apache", "5 license: 'apache' is none that the Hub knows"),
        ("license: apache-2.0", "license: other", "README.md:2 license_link: is missing"),
        ("- 'no'", "- no", "README.md:6 language: False is a truth value"),
        ("- chat", "- [chat]", "README.md:10 tags: must be a tag or a list"),
        ("base_model: org/Tiny-1B-Instruct", "base_model: ./x", "README.md:2 base_model: './x' is not an id"),
        ("base_model_relation: quantized\n", "", "README.md:2 base_model_relation: is missing beside"),
        ("library_name: gguf\n", "", "README.md:2 library_name: is missing"),
        ("pipeline_tag: text-generation", "pipeline_tag: [a]", "README.md:9 pipeline_tag: must be a task"),
        ("  results:", "  result:", "entry 1, 'Tiny-1B-Instruct-GGUF', needs a list of `results`"),
        ("    - type: perplexity\n", "    - type: 3\n", "a metric needs a `type`"),
        ("quantized_by: alice", "tags: [again]", "tags: is there twice, first in line 10"),
        ("quantized_by: alice", "a: b: c", "front matter: is not YAML: mapping values are not allowed"),
    ],
)  # fmt: skip
def test_problems_name_the_line(old: str, new: str, says: str) -> None:
    text = render(cards.page())
    assert old in text and metadata.problems(text) == []
    assert any(says in problem for problem in metadata.problems(text.replace(old, new, 1)))


@pytest.mark.parametrize(
    "text", ["", "# A title\n", "---\n---\n# Empty\n", "---\n- a\n---\n", "---\n\x07\n---\n"]
)
def test_no_metadata_is_a_problem(text: str) -> None:
    (problem,) = metadata.problems(text)
    assert problem.startswith("README.md:") and "front matter" in problem


@pytest.mark.parametrize(
    "address",
    [
        "https://x>) **[login](https://evil.example)** <!--",
        "https://x/<b>",
        "https://x y",
        "https://x\n\n# y",
    ],
)
def test_an_address_of_a_stranger_stays_one(address: str) -> None:
    shown = markdown.link("terms", address)
    assert not re.search(
        r"[\s<>]", shown.removeprefix("[terms](<").removesuffix(">)").removeprefix("[terms](")
    )
    licence = dataclasses.replace(cards.LICENCE, id="other", name="own", link=address)
    line = render(cards.page(licence=licence)).partition("## Licence\n\n")[2].splitlines()[0]
    assert line.startswith("Licence: other ([own](") and "<!--" not in line


def test_what_export_made_says_so() -> None:
    made = cards.manifest(repacked={"source": "gptq-w4g32", "target": "awq-w4g32"})
    text = render(cards.page(cards.variant(made)))
    assert "Moved: by `quantkit export` from `gptq-w4g32`" in text
    assert "Moved" not in render(cards.page())


def test_what_has_no_recipe_has_no_sum_of_one() -> None:
    ours = metadata.metadata(cards.page(cards.gguf("Q8_0", 8.5, 0.001)))["quantkit"]
    strangers = metadata.metadata(cards.page(cards.variant(cards.manifest(recipe=""))))["quantkit"]
    assert len(ours["recipe_sha256"]) == 64 and "recipe_sha256" not in strangers

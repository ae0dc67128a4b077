from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quantkit.calibrate import chat
from quantkit.calibrate.text import EvalSpec, FileSource, HubSource, Part, SetSpec, Template
from quantkit.calibrate.tokenizer import load_tokenizer
from quantkit.calibrate.tokens import CalibrationSet, Share, build, build_eval
from quantkit.errors import CalibrationError

Words = Callable[..., Any]
SHARED = Path(__file__).resolve().parents[4] / "shared"


def text_file(path: Path, count: int) -> Path:
    """w0 w1 … : tokens 3, 4, …"""
    path.write_text(" ".join(f"w{n}" for n in range(count)))
    return path


def jsonl(path: Path, rows: list[object]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# Packing


def test_a_raw_text_is_cut_in_order_and_the_tail_dropped(tmp_path: Path, words: Words) -> None:
    made = build(text_file(tmp_path / "a.txt", 11), words(), rows=2, length=5, seed=None)
    assert made.tokens.tolist() == [[3, 4, 5, 6, 7], [8, 9, 10, 11, 12]]
    assert made.tokens.dtype == torch.int32
    assert made.sources == (Share("a.txt", 2, "not stated"),)
    assert torch.equal(build(tmp_path / "a.txt", words(), rows=2, length=5, seed=0).tokens, made.tokens)


def test_bos_begins_the_text_and_every_row(tmp_path: Path, words: Words) -> None:
    made = build(text_file(tmp_path / "a.txt", 9), words(adds_bos=True), rows=2, length=5, seed=None)
    assert made.tokens.tolist() == [[0, 3, 4, 5, 6], [0, 8, 9, 10, 11]]


def test_documents_are_separated_as_in_training(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "w0 w1"}, {"text": "w2"}, {"text": "w3 w4"}])
    eos = build(path, words(), rows=1, length=7, seed=None)
    assert eos.tokens.tolist() == [[3, 4, 1, 5, 1, 6, 7]]
    bos = build(path, words(adds_bos=True), rows=1, length=8, seed=None)
    assert bos.tokens.tolist() == [[0, 3, 4, 0, 5, 0, 6, 7]]
    neither = build(path, words(eos=False), rows=1, length=5, seed=None)
    assert neither.tokens.tolist() == [[3, 4, 5, 6, 7]]


def test_joined_rows_are_one_document(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"text": "w0 w1"}, {"text": "w2"}])
    spec = SetSpec("a", (Part(FileSource(path), join="\n\n"),))
    assert build(spec, words(), rows=1, length=3, seed=None).tokens.tolist() == [[3, 4, 5]]


def test_too_little_text_says_what_was_found(tmp_path: Path, words: Words) -> None:
    with pytest.raises(CalibrationError) as caught:
        build(text_file(tmp_path / "a.txt", 11), words(), rows=3, length=5, seed=7)
    assert "11 tokens" in caught.value.message
    assert "15" in caught.value.message
    assert caught.value.remedy is not None
    assert "at most 2 rows" in caught.value.remedy


@pytest.mark.parametrize(("rows", "length"), [(0, 8), (1, 1)])
def test_no_rows_are_refused(tmp_path: Path, words: Words, rows: int, length: int) -> None:
    with pytest.raises(CalibrationError):
        build(text_file(tmp_path / "a.txt", 11), words(), rows=rows, length=length, seed=None)


def test_max_chars_bounds_the_text(tmp_path: Path, words: Words) -> None:
    spec = SetSpec("a", (Part(FileSource(text_file(tmp_path / "a.txt", 9)), max_chars=8),))
    assert build(spec, words(), rows=1, length=3, seed=None).tokens.tolist() == [[3, 4, 5]]
    with pytest.raises(CalibrationError, match="3 tokens"):
        build(spec, words(), rows=2, length=3, seed=None)


# Order


def test_a_seed_draws_rows_from_the_whole_text(tmp_path: Path, words: Words) -> None:
    path = text_file(tmp_path / "a.txt", 80)
    every = build(path, words(), rows=20, length=4, seed=None).tokens.tolist()
    drawn = build(path, words(), rows=20, length=4, seed=17).tokens.tolist()
    assert drawn != every
    assert sorted(drawn) == every
    assert build(path, words(), rows=6, length=4, seed=17).tokens.tolist() == drawn[:6]
    assert build(path, words(), rows=20, length=4, seed=18).tokens.tolist() != drawn
    # Rows 17, 12 and 2 of the text: a change here changes every calibration that people published.
    assert [row[0] for row in drawn[:3]] == [3 + 4 * place for place in (17, 12, 2)]


def test_the_hash_is_over_shape_and_bytes() -> None:
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    made = CalibrationSet.of(tokens, [Share("a", 2, "none")])
    expected = hashlib.sha256(struct.pack("<2q6i", 2, 3, 1, 2, 3, 4, 5, 6)).hexdigest()
    assert made.sha256 == expected
    assert CalibrationSet.of(tokens.reshape(3, 2), ()).sha256 != expected


# Mixtures


def test_rows_follow_the_shares(tmp_path: Path, words: Words) -> None:
    spec = SetSpec(
        "mix",
        (
            Part(FileSource(text_file(tmp_path / "a.txt", 40)), share=0.5, licence="A"),
            Part(FileSource(text_file(tmp_path / "b.txt", 40)), share=0.3, licence="B"),
            Part(FileSource(text_file(tmp_path / "c.txt", 40)), share=0.2, licence="C"),
        ),
    )
    made = build(spec, words(), rows=7, length=4, seed=3)
    assert made.sources == (Share("a.txt", 4, "A"), Share("b.txt", 2, "B"), Share("c.txt", 1, "C"))
    assert made.tokens.shape == (7, 4)
    one = build(spec, words(), rows=1, length=4, seed=3)
    assert one.sources == (Share("a.txt", 1, "A"),)


@pytest.mark.parametrize("world", [1, 2, 3, 7])
def test_shards_are_the_set(world: int) -> None:
    tokens = torch.arange(14, dtype=torch.int32).reshape(7, 2)
    whole = CalibrationSet.of(tokens, [Share("a", 2, ""), Share("b", 1, ""), Share("c", 4, "")])
    shards = [whole.shard(rank, world) for rank in range(world)]
    assert torch.equal(torch.cat([shard.tokens for shard in shards]).sort(0).values, tokens)
    for rank, shard in enumerate(shards):
        origins = ["a", "a", "b", "c", "c", "c", "c"][rank::world]
        assert [name for share in shard.sources for name in [share.name] * share.rows] == origins
        assert shard.sha256 == CalibrationSet.of(shard.tokens, ()).sha256
    if world == 1:
        assert shards[0].sha256 == whole.sha256


def test_a_dataset_is_recorded_with_its_commit(words: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: [{"text": "w0 w1"}] * 9)
    spec = SetSpec("hub", (Part(HubSource("org/data", revision="a" * 40), licence="MIT"),))
    made = build(spec, words(), rows=2, length=6, seed=None)
    assert made.tokens.tolist() == [[3, 4, 1, 3, 4, 1]] * 2
    assert made.sources == (Share(f"org/data@{'a' * 40}:default/train", 2, "MIT"),)


# Chat

TALK = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]


def chat_rows(path: Path, tokenizer: Any, length: int, template: Template | None = "chat") -> Any:
    return build(path, tokenizer, rows=1, length=length, seed=None, template=template).tokens.tolist()


def test_conversations_go_through_the_template(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK}])
    once = [103, 4, 104, 105, 5, 106]
    assert chat_rows(path, words(chat=True), 12) == [[*once, *once]]
    assert chat_rows(path, words(chat=True, adds_bos=True), 14) == [[0, *once, 0, *once]]


def test_raw_conversations_are_their_contents(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}, {"messages": TALK}])
    assert chat_rows(path, words(chat=True), 5, template=None) == [[4, 5, 1, 4, 5]]


def test_plain_text_becomes_users_messages(tmp_path: Path, words: Words) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w0\n\n" + "w1 " * 700 + "\n\nw2\n\nw3\n")
    (row,) = chat_rows(path, words(chat=True), 707)
    assert row == [103, 3, *[4] * 700, 104, 103, 5, 6, 104]


def test_the_argument_overrides_the_parts(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    spec = SetSpec("a", (Part(FileSource(path), template="chat"),))
    assert build(spec, words(chat=True), rows=1, length=6, seed=None).tokens[0, 0] == 103
    assert build(spec, words(), rows=1, length=2, seed=None, template="raw").tokens.tolist() == [[4, 5]]


def test_a_tokenizer_without_template_is_refused(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(CalibrationError, match="chat template"):
        chat_rows(path, words(), 6)


def test_a_template_that_refuses_is_named(tmp_path: Path, words: Words) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    tokenizer = words(chat=True)
    tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(
        CalibrationError, match=r"makes no text of a .* `a\.jsonl`: TemplateError: no system role"
    ):
        chat_rows(path, tokenizer, 6)


def test_a_template_without_an_end_is_named(
    tmp_path: Path, words: Words, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "SECONDS", 0.2)
    words(chat=True).save_pretrained(tmp_path)
    (tmp_path / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    )
    path = jsonl(tmp_path / "a.jsonl", [{"messages": TALK}])
    with pytest.raises(CalibrationError) as caught:
        chat_rows(path, load_tokenizer(tmp_path), 6)
    assert caught.value.message == (
        "the chat template (`chat_template.jinja`) makes no text of a conversation of `a.jsonl`: "
        "it takes more than 0.2 s"
    )
    assert caught.value.remedy == "set `template: raw`, or use another calibration set"


# Evaluation


def evaluate(path: Path, tokenizer: Any, **options: Any) -> Any:
    return build_eval(EvalSpec("mine", file=path, **options), tokenizer)


def test_llamacpp_windows(tmp_path: Path, words: Words) -> None:
    path = text_file(tmp_path / "a.txt", 18)
    made = evaluate(path, words(), context=8)
    assert made.tokens.tolist() == [list(range(3, 11)), list(range(11, 19))]
    assert (made.score_from, made.scored, made.bos) == (4, 3, None)
    assert (made.available, made.token_count, made.partial) == (2, 18, False)


def test_llamacpp_scores_255_of_512(tmp_path: Path, words: Words) -> None:
    path = tmp_path / "a.txt"
    path.write_text("w1 " * 1030)
    made = evaluate(path, words())
    assert (made.tokens.shape, made.score_from, made.scored) == ((2, 512), 256, 255)


def test_llamacpp_writes_bos_over_the_first_token_of_each_window(tmp_path: Path, words: Words) -> None:
    made = evaluate(text_file(tmp_path / "a.txt", 16), words(adds_bos=True), context=8)
    # 17 tokens with BOS in front; token 10, the eighth word, gives way.
    assert made.tokens.tolist() == [[0, *range(3, 10)], [0, *range(11, 18)]]
    assert (made.bos, made.token_count) == (0, 17)


def test_gptq_windows(tmp_path: Path, words: Words) -> None:
    made = evaluate(text_file(tmp_path / "a.txt", 16), words(adds_bos=True), style="gptq", context=8)
    assert made.tokens.tolist() == [[0, *range(3, 10)], list(range(10, 18))]
    assert (made.score_from, made.scored, made.bos) == (0, 7, 0)


def test_a_short_text_is_refused(tmp_path: Path, words: Words) -> None:
    path = text_file(tmp_path / "a.txt", 15)
    with pytest.raises(CalibrationError) as caught:
        evaluate(path, words(), context=8)
    assert "15 tokens" in caught.value.message
    assert "16" in caught.value.message
    assert evaluate(path, words(), context=8, style="gptq").tokens.shape == (1, 8)


def test_chunks_are_partial(tmp_path: Path, words: Words) -> None:
    path = text_file(tmp_path / "a.txt", 40)
    some = evaluate(path, words(), context=8, chunks=2)
    assert (some.tokens.shape[0], some.available, some.partial) == (2, 5, True)
    assert evaluate(path, words(), context=8, chunks=9).partial is False


def test_the_convention_names_everything_that_changes_the_figure(tmp_path: Path, words: Words) -> None:
    path = text_file(tmp_path / "a.txt", 40)
    other = text_file(tmp_path / "b.txt", 41)
    first = evaluate(path, words(), context=8)
    assert first.convention.startswith("mine/llamacpp-8@")
    assert first.convention == evaluate(path, words(), context=8).convention
    different = [
        evaluate(path, words(), context=16),
        evaluate(path, words(), context=8, chunks=2),
        evaluate(path, words(), context=8, style="gptq"),
        evaluate(path, words(adds_bos=True), context=8),
        evaluate(other, words(), context=8),
    ]
    assert len({made.convention for made in (first, *different)}) == 6


# The protocol of a published table


def shared(name: str) -> Path:
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name}, which is not beside this checkout")
    return path


def test_the_rows_of_the_reference_table() -> None:
    tokenizer = load_tokenizer(shared("models/wiki-llama-7m"))
    text = shared("data/wikitext-2/wiki.valid.tokens")
    spec = SetSpec("valid", (Part(FileSource(text), max_chars=900_000),))
    made = build(spec, tokenizer, rows=160, length=512, seed=None)
    characters = text.read_text(encoding="utf-8")[:900_000]
    ids = tokenizer(characters, add_special_tokens=False, verbose=False)["input_ids"]
    assert len(ids) == 276_295
    assert made.tokens.flatten().tolist() == ids[: 160 * 512]
    assert made.sha256.startswith("dd1e934245547648")


def test_the_windows_of_the_reference_table() -> None:
    tokenizer = load_tokenizer(shared("models/wiki-llama-7m"))
    spec = EvalSpec("test", "gptq", 512, 64, shared("data/wikitext-2/wiki.test.raw"))
    made = build_eval(spec, tokenizer)
    assert (made.tokens.shape, made.available, made.token_count) == ((64, 512), 771, 395_256)
    assert made.bos is None

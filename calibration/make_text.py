"""Build the embedded calibration and evaluation texts.

What: collects the documentation of the Python standard library (docstrings of
its Python and C modules, and the language-reference topics behind ``help()``)
and splits it by document into

* a training text, which is not shipped and is read only by ``make_model.py``;
  the comments of the same modules are added to it, because docstrings alone are
  so few that the model would learn them by heart;
* ``embedded-calib.txt``, whole documents of the training text: a quantizer is
  calibrated on text like the text its model was trained on;
* ``embedded-eval.txt``, held out of both.

Why: the demonstration has to run offline and its perplexities have to be real,
so the package carries its own text under a licence that allows it (PSF-2.0),
and a CPython of the same version with the same extension modules builds it
again, byte for byte.

A document is one module or one topic. Splitting by whole module keeps sibling
methods, which tend to repeat each other, on the same side. What still repeats
across modules is removed from the held-out part: a held-out passage goes when
it shares a 64-character block with the other parts, blocks being cut from those
every 64 characters. Any common run of 127 characters contains such a block, so
none that long survives. Letter case, spacing and mark-up are ignored when
comparing.

How to run, from the repository root:

    python calibration/make_text.py --train-out build/embedded-train.txt
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import platform
import random
import re
from pathlib import Path

from stdlib_docs import Document, collect

LOG = logging.getLogger("make_text")
HERE = Path(__file__).resolve().parent
CALIB_NAME = "embedded-calib.txt"
EVAL_NAME = "embedded-eval.txt"
# The training text marks where a document ends, so that the model learns to
# stop; the shipped texts are plain.
END_OF_DOCUMENT = "<|endoftext|>"
BLOCK = 64
PROVENANCE = """\
# Provenance of the embedded texts

- Source: docstrings of the standard library's Python and C modules, and the
  language-reference topics of `pydoc_data.topics`, of {version}.
- Licence: PSF-2.0 (Python Software Foundation License Version 2), copyright
  Python Software Foundation. Passages that state a licence or a copyright of
  their own were left out. Changes made: docstrings dedented, put under their
  qualified names, selected and shuffled by module.
- Built by: `python calibration/make_text.py --train-out {train_out} --seed {seed}`

| file | bytes | documents | sha256 |
| --- | --- | --- | --- |
{rows}

`{calib}` is part of the text the demonstration model was trained on.
`{held_out}` is in neither the training text nor `{calib}`: it comes from other
modules and topics, and {dropped} of its passages were dropped for sharing a
64-character block with them.

The training text is not shipped. It also has the source comments of its
modules, and holds {train_documents} documents and
{train_bytes} bytes, sha256 `{train_digest}`.
"""


def text_of(document: Document, with_comments: bool = False) -> str:
    """The document as it is written out."""
    extra = document.comments if with_comments else ()
    return "\n\n".join(document.passages + extra) + "\n"


def normalised(text: str) -> str:
    """Text as compared for repeats: lower case, single spaces, no mark-up."""
    return " ".join(re.sub(r"[#*`|\"']+", " ", text.lower()).split())


def blocks_of(documents: list[Document]) -> set[str]:
    """What the documents hold, cut every BLOCK characters."""
    blocks: set[str] = set()
    for document in documents:
        for passage in document.passages + document.comments:
            text = normalised(passage)
            blocks.update(text[i : i + BLOCK] for i in range(0, len(text) - BLOCK + 1, BLOCK))
    return blocks


def without_repeats(document: Document, blocks: set[str]) -> Document:
    """The document less every passage that holds one of the blocks anywhere."""

    def repeats(passage: str) -> bool:
        text = normalised(passage)
        return any(text[i : i + BLOCK] in blocks for i in range(len(text) - BLOCK + 1))

    kept = tuple(passage for passage in document.passages if not repeats(passage))
    return Document(document.name, kept)


def take(documents: list[Document], target: int, largest: int) -> list[Document]:
    """Documents from the front until target bytes, passing over very large ones.

    One long document would otherwise be a fifth of the text by itself.
    """
    taken: list[Document] = []
    total = 0
    for document in documents:
        if total >= target:
            break
        size = len(text_of(document).encode())
        if document.passages and size <= largest:
            taken.append(document)
            total += size
    return taken


def write(path: Path, texts: list[str], separator: str = "\n") -> str:
    """Write the texts one after another and return the file's sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = separator.join(texts).encode()
    path.write_bytes(data)
    LOG.info("%s: %d documents, %d bytes", path.name, len(texts), len(data))
    return hashlib.sha256(data).hexdigest()


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train-out", type=Path, default=Path("build/embedded-train.txt"))
    parser.add_argument("--out", type=Path, default=HERE, help="folder of the shipped texts")
    parser.add_argument("--seed", type=int, default=0, help="seed of the shuffle")
    parser.add_argument("--calib-bytes", type=int, default=450_000)
    parser.add_argument("--eval-bytes", type=int, default=275_000, help="before the repeats go")
    parser.add_argument("--largest", type=int, default=32_000, help="bytes of one document")
    return parser.parse_args()


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    args = parse_arguments()
    documents = collect()
    random.Random(args.seed).shuffle(documents)

    chosen = take(documents, args.eval_bytes, args.largest)
    names = {document.name for document in chosen}
    training = [document for document in documents if document.name not in names]
    blocks = blocks_of(training)
    cleaned = [without_repeats(document, blocks) for document in chosen]
    held_out = [document for document in cleaned if document.passages]
    calibration = take(training, args.calib_bytes, args.largest)

    digests = {
        path: write(path, [text_of(document) for document in part])
        for path, part in (
            (args.out / CALIB_NAME, calibration),
            (args.out / EVAL_NAME, held_out),
        )
    }
    training_texts = [text_of(document, with_comments=True) for document in training]
    training_digest = write(args.train_out, training_texts, END_OF_DOCUMENT)
    counts = {CALIB_NAME: len(calibration), EVAL_NAME: len(held_out)}
    rows = [
        f"| `{path.name}` | {path.stat().st_size} | {counts[path.name]} | `{digest}` |"
        for path, digest in digests.items()
    ]
    report = PROVENANCE.format(
        version=f"{platform.python_implementation()} {platform.python_version()}",
        train_out="build/embedded-train.txt",
        seed=args.seed,
        rows="\n".join(rows),
        calib=CALIB_NAME,
        held_out=EVAL_NAME,
        dropped=sum(len(d.passages) for d in chosen) - sum(len(d.passages) for d in held_out),
        train_documents=len(training),
        train_bytes=args.train_out.stat().st_size,
        train_digest=training_digest,
    )
    (args.out / "PROVENANCE.md").write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main()

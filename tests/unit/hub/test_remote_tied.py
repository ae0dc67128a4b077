"""Head and embedding are both stored and said to be one: of headers, what is said is believed."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from quantkit.run.plan import plan
from tests.hubserver import HubServer
from tests.models import save_tiny
from tests.remote import recipe, use

pytestmark = pytest.mark.usefixtures("sleeps")


def test_a_head_that_is_the_embedding_once_more(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny("llama", tmp_path / "tied", tie_word_embeddings=True)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with HubServer() as hub:
        hub.add("org/tied", folder)
        use(hub, monkeypatch)
        remote, local = (
            plan(recipe(source, "gptq:w4g32"), cache_dir=cache, headers_only=True).to_json()["targets"]
            for source in ("org/tied", str(folder))
        )
    assert remote == local
    assert not list(cache.rglob("*.safetensors"))

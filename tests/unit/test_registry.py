from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from quantkit import registry
from quantkit.errors import RecipeError


@pytest.mark.parametrize("kind", ["methods", "formats", "transforms", "allocate"])
def test_the_folder_is_the_registry(kind: registry.Kind) -> None:
    folder = Path(registry.__file__).parent / kind
    files = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    assert registry.names(kind) == tuple(sorted(n for n in files if not n.startswith("_")))


def test_known_names() -> None:
    assert {"gptq", "rtn"} <= set(registry.names("methods"))
    assert {"gptq", "compressed_tensors"} <= set(registry.names("formats"))
    assert "smoothquant" in registry.names("transforms")


def test_load_gives_the_module() -> None:
    module = registry.load("methods", "rtn")
    assert module.__name__ == "quantkit.methods.rtn"
    assert module.quantizer(module.Params()).accepts is not None


def test_unknown_names_get_a_suggestion_and_the_list() -> None:
    with pytest.raises(RecipeError, match=r"unknown method 'gptp'; did you mean 'gptq'\?") as caught:
        registry.load("methods", "gptp")
    assert caught.value.remedy is not None and "rtn" in caught.value.remedy
    with pytest.raises(RecipeError, match=r"(?m)unknown format 'zzz'$"):
        registry.load("formats", "zzz")
    with pytest.raises(RecipeError, match=r"unknown transform 'smothquant'; did you mean 'smoothquant'\?"):
        registry.load("transforms", "smothquant")


@pytest.mark.parametrize("name", ["../errors", "__init__", "quantkit.errors", "", "rtn.Params"])
def test_only_files_of_the_folder_are_plugins(name: str) -> None:
    with pytest.raises(RecipeError, match="unknown method"):
        registry.load("methods", name)


def test_an_error_inside_a_plugin_is_shown_as_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import quantkit.methods

    (tmp_path / "broken.py").write_text("import no_such_module_at_all\n")
    monkeypatch.setattr(quantkit.methods, "__path__", [*quantkit.methods.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "names", lambda kind: ("broken",))
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        registry.load("methods", "broken")


def test_listing_imports_no_plugin() -> None:
    code = (
        "import sys; from quantkit import registry\n"
        "for kind in ('methods', 'formats', 'transforms'): registry.names(kind)\n"
        "assert 'torch' not in sys.modules and 'quantkit.methods.gptq' not in sys.modules"
    )
    root = Path(registry.__file__).parent.parent
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root)

"""What importing the floor loads: the wall that keeps it small enough for a device."""

import importlib.util
import json
import pkgutil
import subprocess
import sys

import pytest

import medgemma_runtime

FORBIDDEN = (
    "torch",
    "transformers",
    "onnx",
    "onnx_ir",
    "pydicom",
    "matplotlib",
    "coremltools",
    "sentencepiece",
)


def modules() -> list[str]:
    found = pkgutil.walk_packages(medgemma_runtime.__path__, prefix="medgemma_runtime.")
    return sorted(module.name for module in found)


def loaded_by(*names: str) -> set[str]:
    """The top-level packages that another process has loaded after importing `names`."""
    code = (
        f"import importlib, json, sys\n"
        f"for name in {list(names)!r}:\n"
        f"    importlib.import_module(name)\n"
        f"print(json.dumps(sorted({{name.split('.')[0] for name in sys.modules}})))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout))


def test_the_list_of_modules_is_not_empty() -> None:
    assert {"medgemma_runtime.cli", "medgemma_runtime.backends.ort"} <= set(modules())


def test_no_module_loads_a_training_stack_or_an_optional_package() -> None:
    loaded = loaded_by(*modules())
    assert "medgemma_runtime" in loaded
    assert loaded.isdisjoint(FORBIDDEN)


@pytest.mark.parametrize("name", ["manifest", "artifact", "session", "text", "embed", "cli"])
def test_the_engine_is_loaded_only_to_run_a_component(name: str) -> None:
    assert "onnxruntime" not in loaded_by(f"medgemma_runtime.{name}")


def test_the_manifest_needs_no_images_and_no_tokenizer() -> None:
    loaded = loaded_by("medgemma_runtime.manifest", "medgemma_runtime.artifact")
    assert loaded.isdisjoint({"PIL", "tokenizers", "typer", "rich"})


@pytest.mark.parametrize("package", FORBIDDEN)
def test_the_check_would_see_a_forbidden_package(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    if package in ("torch", "transformers", "coremltools"):
        pytest.skip("takes seconds to import; onnx and pydicom show the same")
    assert package in loaded_by(package)

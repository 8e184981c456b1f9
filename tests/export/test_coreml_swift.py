"""The Swift example spells every name as the package does; that it compiles, only a Mac can say."""

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("medgemma_export.targets.coreml_mil")

from medgemma_export.build import build
from medgemma_export.recipe import Recipe
from medgemma_export.targets import TARGETS
from medgemma_runtime.backends.mil import MilProgram

SOURCES = Path(__file__).parents[2] / "export/examples/coreml_swift/Sources/MedGemmaDecoder"


def keys(source, structure):
    """The JSON keys of a Decodable: its CodingKeys, or its properties."""
    [body] = re.findall(rf"struct {structure}: Decodable {{\n(.*?)\n}}", source, re.S)
    named = re.findall(r'case \w+ = "(\w+)"', body)
    return set(named or re.findall(r"^    let (\w+):", body, re.M))


def test_the_names_in_swift_are_those_of_a_package(tmp_path):
    recipe = Recipe(
        model="sample:medgemma-tiny",
        revision=None,
        target="coreml",
        scheme=TARGETS["coreml"].scheme("int4"),
        components=("embed", "decoder"),
        out=tmp_path / "artifact",
        context=112,
    )
    artifact = build(recipe, progress=lambda *step: None)
    source = (SOURCES / "Names.swift").read_text()
    names = dict(re.findall(r'static let (\w+) = "(\w+)"', source))
    program = MilProgram.open(artifact.directory / artifact.manifest.components["decoder"].program)
    facts = json.loads(program.metadata[names["sizes"]])
    assert set(program.functions) == {names["prefill"], names["decode"]}

    behind = {name for name in names.values() if name.startswith("_")}
    kinds = set(re.findall(r'found.append\(\("(\w+)"', source))
    assert kinds == {key for key, value in facts.items() if isinstance(value, dict)}
    taken = {kind + suffix for kind in kinds for suffix in behind} | {names["embeddings"]}
    assert set(program.functions["decode"].inputs) == taken
    assert set(program.functions["prefill"].inputs) == taken | {names["last"]}
    for function in program.functions.values():
        assert set(function.outputs) == {names["logits"]}

    assert keys(source, "DecoderSizes") == set(facts)
    assert keys(source, "LayerRows") == set(facts["local"]) == set(facts["global"])
    described = json.loads((artifact.directory / "coreml/embedding.json").read_text())
    assert keys(source, "EmbeddingFile") == set(described)
    assert keys(source, "EmbeddingPiece") == set(described["pieces"][0])


def test_no_other_file_of_the_example_spells_a_name():
    for path in SOURCES.glob("*.swift"):
        if path.name != "Names.swift":
            quoted = re.findall(r'"([^"\\]*)"', path.read_text())
            assert not [text for text in quoted if re.fullmatch(r"\w+_\w+|logits|prefill|decode", text)]

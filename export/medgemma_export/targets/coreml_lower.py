"""Builds the functions of a Core ML package and writes it."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np

from medgemma_export.models.spec import Component, ModelSpec
from medgemma_export.targets.coreml import Units
from medgemma_export.targets.coreml_builder import SCALES, MilBuilder
from medgemma_export.targets.coreml_channels import ChannelOps
from medgemma_export.targets.coreml_decoder import StaticDecoder, describe_decoder, prefix
from medgemma_export.targets.coreml_features import Feature, FunctionFeatures
from medgemma_export.targets.coreml_mil import (
    COREMLTOOLS_VERSION,
    Placeholder,
    Program,
    StateTensorPlaceholder,
    Var,
    new_function,
    types,
)
from medgemma_export.targets.coreml_ops import Cache, CacheSlot, MilOps, StepInputs
from medgemma_export.targets.coreml_package import WEIGHTS_PATH, WeightFile, write_package
from medgemma_export.targets.coreml_parts import DecoderPart, cut_decoder
from medgemma_export.targets.coreml_rows import RowPlaces, describe_embedding, write_rows
from medgemma_export.targets.coreml_unpack import compare_storage
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.manifest import ComponentEntry, TensorSpec

__all__ = ["Lowering", "DIRECTORY"]

DIRECTORY = "coreml"
"""Of the packages in an artifact."""

Build = Callable[[Program, WeightFile], dict[str, FunctionFeatures]]
"""Adds functions to a program, their weights to a file, and says what they take and give."""

_MIL_TYPES = {"float16": types.fp16, "float32": types.fp32, "int32": types.int32, "image": types.fp32}


@dataclass(kw_only=True)
class Lowering:
    """One artifact's packages.

    Attributes:
        model: What is lowered.
        weights: Where weights come from.
        directory: Of the artifact.
        note: Told what was written for each weight.
        units: Whose layout encoders get.
    """

    model: ModelSpec
    weights: QuantizedWeights
    directory: Path
    note: Callable[[PackedWeight], None]
    units: Units
    _rows: dict[str, RowPlaces] = field(default_factory=dict)

    def component(self, component: Component) -> dict[str, ComponentEntry]:
        """Write a component; what goes in and comes out, of it and of the parts that it is cut to."""
        (self.directory / DIRECTORY).mkdir(exist_ok=True)
        if component.name == "embed":
            return {component.name: self._embedding(component)}
        if component.name == "decoder" and self.model.prompt is not None:
            if self.units == "ane":
                decoder = describe_decoder(component, self.model.prompt, is_host_held=True)
                return self._chain(component, decoder)
            decoder = describe_decoder(component, self.model.prompt)
            functions = self._package(
                component,
                lambda program, file: self._decoder_functions(component, decoder, program, file),
                {"decoder": json.dumps(decoder.facts())},
            )
            inputs = decoder.specs(self._kind)
            outputs: Sequence[TensorSpec] = [_like(functions["decode"].outputs[0])]
        else:
            functions = self._package(
                component, lambda program, file: self._encoder_function(component, program, file), {}
            )
            [features] = functions.values()
            inputs = tuple(_static(spec, component, features) for spec in component.inputs)
            outputs = [_static(spec, component, features) for spec in component.outputs]
        return {component.name: _entry(component, inputs, outputs)}

    def _package(
        self, component: Component, build: Build, facts: Mapping[str, str]
    ) -> dict[str, FunctionFeatures]:
        """Write a package: the functions as `build` makes them, and what it says of itself."""
        program, package = Program(), self.directory / DIRECTORY / f"{component.name}.mlpackage"
        with WeightFile(package / WEIGHTS_PATH) as file:
            functions = build(program, file)
        write_package(
            package,
            program,
            file,
            functions,
            summary=f"{self.model.architecture}, {component.name}. {self.model.intended_use}",
            licence=self.model.licence,
            version=version("medgemma-edge"),
            facts={
                "architecture": self.model.architecture,
                "component": component.name,
                "units": self.units,
                "com.github.apple.coremltools.version": COREMLTOOLS_VERSION,
                **facts,
                "plan_sha256": self.weights.plan.sha256,
            },
        )
        compare_storage(package, component, self.weights.plan)
        self._remember_rows(package, file)
        return functions

    def _chain(self, component: Component, decoder: StaticDecoder) -> dict[str, ComponentEntry]:
        """The decoder's parts, and the file that says in which order they run."""
        *parts, head = cut_decoder(component, decoder, self.weights.plan)
        entries = {}
        for part in parts:
            self._package(part.component, partial(self._part_functions, part), {})
            entries[part.component.name] = _entry(part.component, *part.specs())
        [features] = self._package(head.component, partial(self._head_function, head), {}).values()
        inputs, outputs = ([_like(each) for each in group] for group in (features.inputs, features.outputs))
        entries[head.component.name] = _entry(head.component, inputs, outputs)
        facts = {
            "sizes": decoder.facts(),
            "layers": [prefix(is_local=kind) for kind in decoder.layers],
            "parts": [part.component.name for part in parts],
            "head": head.component.name,
        }
        path = self.directory / DIRECTORY / f"{component.name}.json"
        path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        return {
            component.name: ComponentEntry(
                program=f"{DIRECTORY}/{path.name}",
                inputs=tuple(_fixed(spec, {"batch": 1}) for spec in (component.inputs[0],)),
                outputs=tuple(_fixed(spec, {"batch": 1}) for spec in (component.outputs[0],)),
            ),
            **entries,
        }

    @property
    def _half(self) -> bool:
        return self.weights.plan.activations == "float16"

    @property
    def _kind(self) -> Literal["float16", "float32"]:
        return "float16" if self._half else "float32"

    def _builder(self, file: WeightFile) -> MilBuilder:
        return MilBuilder(weights=self.weights, file=file, note=self.note, half=self._half)

    def _encoder_function(
        self, component: Component, program: Program, file: WeightFile
    ) -> dict[str, FunctionFeatures]:
        """One function from one image or text to its features."""
        inputs = [_encoder_input(spec) for spec in component.inputs]
        function = new_function({feature.name: _placeholder(feature) for feature in inputs})
        with function:
            mil = self._builder(file)
            ops = ChannelOps(mil=mil) if self.units == "ane" else MilOps(mil=mil)
            given = dict(function.inputs)
            for feature in inputs:
                if feature.kind == "image":
                    given[feature.name] = self._normalized(mil, given[feature.name])
            results = component.forward(ops, given)
            results = {name: ops.output(value, name) for name, value in results.items()}
            function.set_outputs(list(results.values()))
        program.add_function("main", function)
        outputs = [
            Feature(
                name=spec.name,
                kind="float32",
                shape=tuple(results[spec.name].shape),
                description=spec.description,
            )
            for spec in component.outputs
        ]
        return {"main": FunctionFeatures(inputs=inputs, outputs=outputs)}

    def _normalized(self, mil: MilBuilder, pixels: Var) -> Var:
        spec = self.model.image
        if spec is None:
            raise ValueError("a model that takes images has an image spec")
        mean, std = np.array(spec.mean), np.array(spec.std)
        scale, bias = (spec.rescale / std).astype(np.float32), (-mean / std).astype(np.float32)
        return mil.normalize_pixels(pixels, scale, bias)

    def _decoder_functions(
        self, component: Component, decoder: StaticDecoder, program: Program, file: WeightFile
    ) -> dict[str, FunctionFeatures]:
        """`prefill` and `decode` over the same weights and states."""
        functions = {}
        for name, tokens in (("prefill", decoder.chunk), ("decode", 1)):
            inputs = decoder.inputs(tokens, self._kind, has_last=tokens > 1)
            states = decoder.states()
            placeholders = {feature.name: _placeholder(feature) for feature in inputs}
            placeholders |= {
                feature.name: StateTensorPlaceholder(feature.shape, dtype=types.fp16) for feature in states
            }
            function = new_function(placeholders)
            with function:
                ops = MilOps(mil=self._builder(file))
                logits = ops.output(_decode(component, decoder, ops, function.inputs), "logits")
                function.set_outputs([logits])
            program.add_function(name, function)
            shape = tuple(logits.shape)
            output = Feature(name="logits", kind="float32", shape=shape, description="after the last token")
            functions[name] = FunctionFeatures(inputs=inputs, outputs=[output], states=states)
        program.default_function_name = "decode"
        program.export_as_multifunction = True
        return functions

    def _part_functions(
        self, part: DecoderPart, program: Program, file: WeightFile
    ) -> dict[str, FunctionFeatures]:
        """`prefill` and `decode` over some layers; caches come in, new keys and values go out."""
        functions = {}
        for name, tokens in (("prefill", part.decoder.chunk), ("decode", 1)):
            features = FunctionFeatures(inputs=part.inputs(tokens), outputs=part.outputs(tokens))
            function = new_function({feature.name: _placeholder(feature) for feature in features.inputs})
            with function:
                mil = self._builder(file)
                results = _run_part(part, ChannelOps(mil=mil), function.inputs)
                outputs = [mil.result(results[item.name], item.name) for item in features.outputs]
                function.set_outputs(outputs)
            program.add_function(name, function)
            functions[name] = features
        program.default_function_name = "decode"
        program.export_as_multifunction = True
        return functions

    def _head_function(
        self, part: DecoderPart, program: Program, file: WeightFile
    ) -> dict[str, FunctionFeatures]:
        """One function from the stream of a token to its logits, in pieces of the vocabulary."""
        given = part.inputs(1)
        function = new_function({feature.name: _placeholder(feature) for feature in given})
        with function:
            ops = ChannelOps(mil=self._builder(file))
            pieces = part.component.forward(ops, dict(function.inputs))["logits"]
            pieces = pieces if isinstance(pieces, tuple) else (pieces,)
            results = [ops.output(piece, f"logits_{index}") for index, piece in enumerate(pieces)]
            function.set_outputs(results)
        program.add_function("main", function)
        outputs = [
            Feature(name=each.name, kind="float32", shape=tuple(each.shape), description="after the token")
            for each in results
        ]
        return {"main": FunctionFeatures(inputs=given, outputs=outputs)}

    def _remember_rows(self, package: Path, file: WeightFile) -> None:
        """Where tables lie that a package holds as its output head."""
        path = (package / WEIGHTS_PATH).relative_to(self.directory).as_posix()
        for row in self.weights.plan.rows:
            if row.role == "table" and row.name in file.starts:
                self._rows[row.name] = RowPlaces(
                    path=path,
                    values=file.starts[row.name],
                    scales=file.starts.get(f"{row.name}{SCALES}"),
                )

    def _embedding(self, component: Component) -> ComponentEntry:
        embedding = describe_embedding(component)
        path = self.directory / DIRECTORY / "embedding.json"
        write_rows(path, embedding, self.weights, self._rows, self.note, half=self._half)
        one = {"batch": 1}
        return ComponentEntry(
            program=f"{DIRECTORY}/{path.name}",
            inputs=tuple(_fixed(spec, one) for spec in component.inputs),
            outputs=tuple(_fixed(spec, one) for spec in component.outputs),
        )


def _decode(component: Component, decoder: StaticDecoder, ops: MilOps, given: dict[str, Var]) -> Var:
    """The component's own computation, with states for caches and inputs for masks and rotary tables."""
    rotary, masks, caches = {}, {}, {}
    for kind in decoder.kinds:
        stem = prefix(is_local=kind)
        rotary[decoder.rotary(is_local=kind)] = (given[f"{stem}_cos"], given[f"{stem}_sin"])
        masks[kind] = given[f"{stem}_mask"]
        caches[kind] = Cache(state=given[f"{stem}_cache"], slot=given[f"{stem}_slot"])
    ops.step = StepInputs(rotary=rotary, masks=masks, last=given.get("last"))
    inputs: dict[str, Any] = dict.fromkeys((spec.name for spec in component.inputs), None)
    inputs["inputs_embeds"] = given["inputs_embeds"]
    counts = {True: 0, False: 0}
    for layer, kind in enumerate(decoder.layers):
        slot = CacheSlot(cache=caches[kind], layer=counts[kind])
        counts[kind] += 1
        for part in ("key", "value"):
            inputs[f"past_key_values.{layer}.{part}"] = slot
    return component.forward(ops, inputs)["logits"]


def _run_part(part: DecoderPart, ops: ChannelOps, given: dict[str, Var]) -> dict[str, Var]:
    """A part's own computation, with inputs for caches, masks and rotary tables."""
    rotary, masks = {}, {}
    for is_local in part.kinds:
        stem = prefix(is_local=is_local)
        rotary[part.decoder.rotary(is_local=is_local)] = (given[f"{stem}_cos"], given[f"{stem}_sin"])
        masks[is_local] = given[f"{stem}_mask"]
    ops.step = StepInputs(rotary=rotary, masks=masks, last=None)
    inputs: dict[str, Any] = dict.fromkeys((spec.name for spec in part.component.inputs), None)
    inputs["hidden"] = given["hidden"]
    caches = [(layer, kind) for layer in part.layers for kind in ("key", "value")]
    for layer, kind in caches:
        inputs[f"past_key_values.{layer}.{kind}"] = given[f"{kind}_cache_{layer}"]
    results = part.component.forward(ops, inputs)
    new = {f"{kind}_{layer}": results[f"present.{layer}.{kind}"] for layer, kind in caches}
    return {"next_hidden": results["hidden"], **new}


def _entry(
    component: Component, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> ComponentEntry:
    return ComponentEntry(
        program=f"{DIRECTORY}/{component.name}.mlpackage", inputs=tuple(inputs), outputs=tuple(outputs)
    )


def _encoder_input(spec: TensorSpec) -> Feature:
    shape = tuple(1 if isinstance(dim, str) else dim for dim in spec.shape)
    if spec.name == "pixel_values":
        text = "an RGB image of this size; scale and bias are in the program"
        return Feature(name=spec.name, kind="image", shape=shape, description=text)
    return Feature(name=spec.name, kind="int32", shape=shape, description=spec.description)


def _placeholder(feature: Feature) -> Placeholder:
    return Placeholder(feature.shape, dtype=_MIL_TYPES[feature.kind])


def _static(spec: TensorSpec, component: Component, features: FunctionFeatures) -> TensorSpec:
    """A declared input or output with the size that the program gives it."""
    [feature] = [found for found in (*features.inputs, *features.outputs) if found.name == spec.name]
    return replace(spec, shape=feature.shape)


def _fixed(spec: TensorSpec, sizes: dict[str, int]) -> TensorSpec:
    shape = tuple(sizes.get(dim, dim) if isinstance(dim, str) else dim for dim in spec.shape)
    return replace(spec, shape=shape)


def _like(feature: Feature) -> TensorSpec:
    return TensorSpec(
        name=feature.name,
        dtype=feature.kind,  # type: ignore[arg-type]
        shape=feature.shape,
        description=feature.description,
    )

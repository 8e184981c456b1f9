"""ExecuTorch for Android and embedded CPUs: one `model.pte` with a method for every component.

- XNNPACK multiplies int4 in blocks of 32 and int8 per channel by activations that it rounds to int8, one
  range for each token; what it cannot take runs in ExecuTorch's own kernels;
- pixels go in as uint8: the normalization is in the program, so no app can get it wrong;
- weights lie in the program's file, or in a `model.ptd` beside it that programs ask by name;
- keys and values lie in buffers of the program. Layers with a window keep a ring of them;
- an embedding has one column more than the model's width: how many tokens of the same image follow. Vision
  features count down, texts have 0. From it the decoder makes its mask, so that ExecuTorch's own runners,
  which only pass embeddings on, let the tokens of an image see each other too.
"""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from medgemma_export.models.spec import Component, ModelSpec
from medgemma_quantization.plan import PackedWeight, QuantPlan, refuse_palettes
from medgemma_quantization.scheme import INT8, SCHEMES, Scheme, SchemeName
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.backends.executorch import METHODS, weights_path
from medgemma_runtime.errors import EdgeError
from medgemma_runtime.manifest import ComponentEntry, PromptSpec, TensorSpec

if TYPE_CHECKING:
    from medgemma_export.torch_ops import IntegerLinear

__all__ = ["ExecutorchTarget", "Delegate", "PROGRAM", "SHARES", "STEP"]

Delegate = Literal["xnnpack", "portable", "coreml", "qnn", "vulkan", "openvino"]

PROGRAM = "model.pte"

STEP = 512
"""Tokens of one call at most."""

# What a phone gives an app, less the weights of a 4B model at int4.
_MAX_CACHE_BYTES = 1 << 30

SHARES = "delegation.json"
"""What the delegate took of each method: operations, operations left to kernels, and calls in a run."""

# Delegates that this version does not lower to, and why. Tried with ExecuTorch 1.5.1.
_ELSEWHERE = {
    "qnn": "it needs Qualcomm's AI Engine Direct SDK (QNN_SDK_ROOT; qpm.qualcomm.com), an ExecuTorch built "
    "with it, and calibrated activations",
    "vulkan": "ExecuTorch's lowering to Vulkan stops at attention without a cache and at attention with a "
    "mask, and its runtime is built with the Vulkan SDK's glslc (vulkan.lunarg.com)",
    "openvino": "the OpenVINO before 2026 that ExecuTorch 1.5.1 runs (pip install 'executorch[openvino]') "
    "needs an nncf that does not import with PyTorch 2.13, and it crashes on what OpenVINO 2026 compiles",
}


@dataclass(frozen=True, kw_only=True)
class ExecutorchTarget:
    """See `Target`.

    Attributes:
        delegate: Who computes: `xnnpack`; `portable` for ExecuTorch's own kernels alone; `coreml`,
            which takes encoders in float32.
        separate_weights: Whether weights get a file of their own, beside the program's.
    """

    cuts_tables: ClassVar[bool] = False
    delegate: Delegate = "xnnpack"
    separate_weights: bool = False

    def scheme(self, name: SchemeName) -> Scheme:
        """See `Target`. XNNPACK has blocks of int4 only, so int8 tables are stored per channel."""
        scheme = SCHEMES[name]
        return replace(scheme, table=INT8) if name == "int8" else scheme

    def check(self, model: ModelSpec, plan: QuantPlan) -> None:
        """See `Target`."""
        if self.delegate in _ELSEWHERE:
            raise EdgeError(
                f"delegate {self.delegate} is not lowered to by this version: {_ELSEWHERE[self.delegate]}; "
                "or use --delegate xnnpack, coreml or portable"
            )
        if self.delegate == "coreml" and any(part.name == "decoder" for part in model.components):
            raise EdgeError(
                "delegate coreml takes encoders only in this version and the model has a decoder; use "
                "--target coreml, which writes Core ML packages with the same integers"
            )
        if self.delegate == "coreml" and self.separate_weights:
            raise EdgeError(
                "--separate-weights was asked for and delegate coreml keeps weights in its own form; leave "
                "the option out, or use --delegate xnnpack or portable"
            )
        refuse_palettes(plan, "XNNPACK")
        heads = {
            weight.name
            for component in model.components
            if component.name == "decoder"
            for weight in component.weights()
            if weight.role == "table"
        }
        for row in plan.rows:
            storage = row.storage
            if storage.bits == 16:
                raise EdgeError(
                    f"{row.name}: the plan asks for {storage}, and XNNPACK multiplies float32 activations by "
                    "float32 weights; use --precision fp32, int8 or int4"
                )
            if storage.is_float:
                continue
            if self.delegate != "xnnpack" and (row.role == "linear" or row.name in heads):
                raise EdgeError(
                    f"{row.name}: the plan asks for {storage}, and delegate {self.delegate} multiplies "
                    "floats only in this version; use --precision fp32, or --delegate xnnpack"
                )
            if storage.bits == 4 and (not storage.block or storage.block % 32):
                raise EdgeError(
                    f"{row.name}: the plan asks for {storage}, and XNNPACK's int4 kernels take blocks of 32 "
                    "or a multiple; give it a block of 32"
                )
            if storage.bits == 8 and storage.block and (row.role == "linear" or row.name in heads):
                raise EdgeError(
                    f"{row.name}: the plan asks for {storage}, and XNNPACK multiplies int8 per channel only; "
                    "leave its block out, or give it 4 bits"
                )
        has_integers = any(row.role == "linear" and not row.storage.is_float for row in plan.rows)
        if has_integers and plan.activations != "int8-dynamic":
            raise EdgeError(
                f"scheme {plan.scheme} keeps activations {plan.activations}, and XNNPACK's integer kernels "
                'round them to int8; say activations = "int8-dynamic"'
            )
        for component in model.components:
            if component.name == "decoder" and model.prompt is not None:
                _check_context(component, model.prompt)

    def lower(
        self,
        model: ModelSpec,
        weights: QuantizedWeights,
        directory: Path,
        *,
        progress: Callable[[int, int], None],
    ) -> tuple[dict[str, ComponentEntry], list[PackedWeight]]:
        """See `Target`."""
        from medgemma_export.targets.executorch_lower import lower_program, trace  # takes seconds to import
        from medgemma_export.targets.executorch_stand_ins import StandIns

        packed: list[PackedWeight] = []

        def note(weight: PackedWeight) -> None:
            packed.append(weight)
            progress(min(len(packed), len(weights.plan.rows)), len(weights.plan.rows))

        step, stand_ins = _step(model.prompt), StandIns(are_filled=self.delegate == "coreml")
        programs = {
            METHODS[component.name]: trace(
                component, weights, note, stand_ins, image=model.image, prompt=model.prompt, step=step
            )
            for component in model.components
        }
        shares = lower_program(
            programs,
            _constants(model),
            directory / PROGRAM,
            stand_ins,
            delegate=self.delegate,
            data=weights_path(directory / PROGRAM) if self.separate_weights else None,
        )
        report = {
            "delegate": self.delegate,
            "methods": {name: asdict(share) for name, share in shares.items()},
        }
        (directory / SHARES).write_text(json.dumps(report, indent=1), encoding="utf-8")
        entries = {component.name: _entry(component, model.prompt) for component in model.components}
        return entries, packed

    def integer_linear(self) -> "IntegerLinear":
        """See `Target`."""
        from medgemma_export.emulation import executorch_integer_linear

        return executorch_integer_linear


def _step(prompt: PromptSpec | None) -> int:
    return 1 if prompt is None else min(prompt.context, max(STEP, prompt.tokens_per_image))


def _check_context(component: Component, prompt: PromptSpec) -> None:
    # An image, the tokens that stand around it, and one of the answer.
    least = prompt.tokens_per_image + 16
    if prompt.context < least:
        raise EdgeError(
            f"a context of {prompt.context} tokens holds no question and answer, which take {least}; "
            "name a longer --context"
        )
    local = min(prompt.context, prompt.window or 1)
    cache_bytes = 0
    for spec in component.inputs:
        if spec.name.startswith("past_key_values."):
            rows = local if spec.shape[2] == "past_local" else prompt.context
            cache_bytes += 4 * rows * int(spec.shape[1]) * int(spec.shape[3])
    if cache_bytes > _MAX_CACHE_BYTES:
        raise EdgeError(
            f"an ExecuTorch program reserves its caches when it is loaded, and {prompt.context} tokens take "
            f"{cache_bytes / 1e9:.1f} GB; name a shorter --context, such as 4096"
        )


def _constants(model: ModelSpec) -> dict[str, Any]:
    """What ExecuTorch's runners ask a program for, by the names that they know."""
    prompt = model.prompt
    [*tables] = [
        weight.shape[0]
        for component in model.components
        for weight in component.weights()
        if weight.role == "table"
    ]
    if prompt is None or not tables:
        return {}
    return {
        "get_bos_id": prompt.bos_id,
        "get_eos_ids": list(prompt.stop_ids),
        "get_max_seq_len": _step(prompt),
        "get_max_context_len": prompt.context,
        "get_vocab_size": tables[0],
        "use_kv_cache": True,
        "use_sdpa_with_kv_cache": True,
        "enable_dynamic_shape": True,
    }


def _entry(component: Component, prompt: PromptSpec | None) -> ComponentEntry:
    """What the component's method takes and gives: one item at a time, caches inside."""
    inputs, outputs = component.inputs, tuple(_widened(spec, component) for spec in component.outputs)
    if component.name in ("image", "vision"):
        inputs = tuple(
            replace(
                spec,
                dtype="uint8",
                shape=(1, *spec.shape[1:]),
                description="an RGB image of the size that the manifest's image spec says; not normalized",
            )
            for spec in inputs
        )
    elif component.name == "decoder":
        [embeddings] = [_widened(spec, component) for spec in inputs if spec.name == "inputs_embeds"]
        positions = TensorSpec(
            name="cache_position",
            dtype="int64",
            shape=("sequence",),
            description="position of each token, counted from the start of the conversation",
        )
        inputs = (embeddings, positions)
        outputs = tuple(spec for spec in outputs if not spec.name.startswith("present."))
    else:
        inputs = tuple(_widened(spec, component) for spec in inputs)
    fixed = [
        tuple(
            replace(spec, shape=tuple(1 if dim == "batch" else dim for dim in spec.shape)) for spec in specs
        )
        for specs in (inputs, outputs)
    ]
    return ComponentEntry(program=PROGRAM, inputs=fixed[0], outputs=fixed[1])


def _widened(spec: TensorSpec, component: Component) -> TensorSpec:
    """The spec of embeddings and image features, with the column that says how many of the image follow."""
    if spec.name not in ("inputs_embeds", "image_features"):
        return spec
    width = int(spec.shape[-1]) + 1
    note = "; the last column says how many tokens of the same image follow"
    return replace(spec, shape=(*spec.shape[:-1], width), description=spec.description + note)

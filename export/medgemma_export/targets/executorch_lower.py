"""Lowers components to one ExecuTorch program.

Every component becomes a small module that turns a method's arguments into what the component's `forward`
takes; `torch.export` traces it, XNNPACK takes its share, and the rest runs in ExecuTorch's kernels.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.config import (
    ALL_PARTITIONER_CONFIGS,
    CosConfig,
    GeluConfig,
    SinConfig,
)
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.backends.xnnpack.xnnpack_preprocess import XnnpackBackend
from executorch.exir import EdgeCompileConfig, ExecutorchBackendConfig, to_edge_transform_and_lower
from executorch.exir.backend.compile_spec_schema import CompileSpec
from executorch.exir.backend.partitioner import DelegationSpec, PartitionResult
from executorch.exir.backend.utils import tag_constant_data
from executorch.exir.passes import MemoryPlanningPass
from torch import Tensor, nn
from torch.fx import Node
from torch.fx.passes.infra.partitioner import Partition

from medgemma_export.models.spec import Component
from medgemma_export.targets.executorch_coreml import coreml_partitioner
from medgemma_export.targets.executorch_file import write_program
from medgemma_export.targets.executorch_layers import mark_names, write_layers
from medgemma_export.targets.executorch_program import Constants
from medgemma_export.targets.executorch_stand_ins import StandIns
from medgemma_quantization.plan import PackedWeight
from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.backends.executorch import METHODS
from medgemma_runtime.manifest import ImageSpec, PromptSpec

__all__ = ["Share", "lower_program", "trace"]

# XNNPACK's sine and cosine are polynomials for small angles, and positions turn by thousands of radians; its
# GELU is the exact one, whichever form is asked for.
_LEFT_TO_KERNELS = (SinConfig, CosConfig, GeluConfig)

_OF_IMAGES = (METHODS["image"], METHODS["vision"])

# Tells XNNPACK's lowering to leave out the passes for convolutions and for what training leaves behind.
_LINEAR_ONLY = CompileSpec("dqlinear_partitioner", b"")


class _Xnnpack(XnnpackPartitioner):  # type: ignore[misc]
    """Takes what XNNPACK computes as we want it computed.

    Args:
        has_images: Whether there are convolutions.
    """

    def __init__(self, *, has_images: bool) -> None:
        super().__init__(configs=[kept for kept in ALL_PARTITIONER_CONFIGS if kept not in _LEFT_TO_KERNELS])
        specs = [] if has_images else [_LINEAR_ONLY]
        self.delegation_spec = DelegationSpec(XnnpackBackend.__name__, specs)

    def ops_to_not_decompose(
        self, program: torch.export.ExportedProgram
    ) -> tuple[list[torch._ops.OpOverload], None]:
        """Without the test of each node, for which the whole program would be traced twice more.

        Before it is lowered, with sizes of tensors, which are decomposed into themselves: where
        `ExecutorchOps` calls core operators only, the program need not be traced for it at all.
        """
        kept = [torch.ops.aten.linear.default]
        return kept if program.dialect == "EDGE" else [*kept, torch.ops.aten.sym_size.int], None

    def generate_partitions(self, program: torch.export.ExportedProgram) -> list[Partition]:
        """Cut the program at kernels only: what follows the same number of them goes together.

        XNNPACK's own way merges nodes in pairs and leaves three partitions a layer where rounded inputs are
        shared. A path from a partition through a kernel leads to a later one, so there are no cycles.
        """
        taken = {
            node
            for group in self.get_matched_nodes_from_configs(program)
            for node in group
            if node.op == "call_function"
        }
        steps: dict[Node, int] = {}
        for node in program.graph.nodes:
            inputs = [before for before in node.all_input_nodes if before.op == "call_function"]
            steps[node] = max(
                (steps[before] + (node in taken and before not in taken) for before in inputs), default=0
            )
        partitions: dict[int, list[Node]] = {}
        for node in reversed(program.graph.nodes):
            if node not in taken:
                continue
            if all(before.op != "call_function" for before in node.all_input_nodes):
                # A weight goes with its product.
                steps[node] = min((steps[user] for user in node.users if user in taken), default=0)
            partitions.setdefault(steps[node], []).append(node)
        return [Partition(id=step, nodes=reversed(nodes)) for step, nodes in partitions.items()]

    def partition(self, program: torch.export.ExportedProgram) -> PartitionResult:
        """See XNNPACK's; constants go with those that read them."""
        result = super().partition(program)
        tag_constant_data(result.tagged_exported_program)
        return result


class _Images(nn.Module):
    """[1, 3, rows, columns] uint8 to what an image component gives.

    With `counts_down` the result is [1, tokens, H + 1], a decoder's embeddings of one image.
    """

    def __init__(self, component: Component, constants: Constants, image: ImageSpec, tokens: int) -> None:
        super().__init__()
        self._component, self.constants, self._rescale = component, constants, image.rescale
        self.mean = nn.Buffer(torch.tensor(image.mean).reshape(1, 3, 1, 1))
        self.std = nn.Buffer(torch.tensor(image.std).reshape(1, 3, 1, 1))
        self.following = nn.Buffer(torch.arange(tokens - 1, -1, -1.0).reshape(-1, 1)) if tokens else None

    def forward(self, pixels: Tensor) -> Tensor:
        """See the class."""
        values = (pixels.to(torch.float32) * self._rescale - self.mean) / self.std
        outputs = self._component.forward(self.constants.ops(), {"pixel_values": values})
        result: Tensor = next(iter(outputs.values()))
        if self.following is None:
            return result
        return torch.cat((result, self.following), -1)[None]


class _Texts(nn.Module):
    """[1, length] ids to a text's embedding."""

    def __init__(self, component: Component, constants: Constants) -> None:
        super().__init__()
        self._component, self.constants = component, constants

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        outputs = self._component.forward(self.constants.ops(), {"input_ids": ids[0]})
        result: Tensor = next(iter(outputs.values()))
        return result


class _Tokens(nn.Module):
    """[1, S] ids to a decoder's embeddings [1, S, H + 1]: no token follows in the same image."""

    def __init__(self, component: Component, constants: Constants) -> None:
        super().__init__()
        self._component, self.constants = component, constants

    def forward(self, ids: Tensor) -> Tensor:
        """See the class."""
        inputs = {"input_ids": ids[0], "image_features": None}
        [result] = self._component.forward(self.constants.ops(), inputs).values()
        return torch.nn.functional.pad(result, (0, 1))[None]


class _Decoder(nn.Module):
    """Embeddings [1, S, H + 1] at positions [S] to the logits after the last of them, [1, 1, vocabulary]."""

    def __init__(
        self, component: Component, constants: Constants, caches: Mapping[str, tuple[int, ...]]
    ) -> None:
        super().__init__()
        self._component, self.constants = component, constants
        self._caches = {name: name.replace(".", "__") for name in caches}
        for name, shape in caches.items():
            self.register_buffer(self._caches[name], torch.zeros(shape), persistent=False)

    def forward(self, embeddings: Tensor, positions: Tensor) -> Tensor:
        """See the class."""
        inputs = {
            "inputs_embeds": embeddings[0, :, :-1],
            "position_ids": positions,
            "image_blocks": embeddings[0, :, -1],
            "attention_mask": None,
            "local_start": None,
        }
        caches = {name: getattr(self, held) for name, held in self._caches.items()}
        logits: Tensor = self._component.forward(self.constants.ops(), inputs | caches)["logits"]
        return logits[None]


@dataclass(frozen=True, kw_only=True)
class Share:
    """What a delegate took of a method.

    Attributes:
        delegated: Operations that it computes.
        kernels: Operations that are left to ExecuTorch's kernels.
        calls: How often it is called in a run.
    """

    delegated: int
    kernels: int
    calls: int


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A component, ready for `torch.export`."""

    module: nn.Module
    arguments: tuple[Tensor, ...]
    dynamic_shapes: tuple[dict[int, Any] | None, ...]


def trace(
    component: Component,
    weights: QuantizedWeights,
    note: Callable[[PackedWeight], None],
    stand_ins: StandIns,
    *,
    image: ImageSpec | None,
    prompt: PromptSpec | None,
    step: int,
) -> torch.export.ExportedProgram:
    """A component as PyTorch's exporter sees it, before anything is packed."""
    with _quiet(), torch.no_grad():
        traced = _traced(component, weights, note, stand_ins, image=image, prompt=prompt, step=step)
        return mark_names(
            torch.export.export(
                traced.module, traced.arguments, dynamic_shapes=traced.dynamic_shapes, strict=False
            )
        )


def _traced(
    component: Component,
    weights: QuantizedWeights,
    note: Callable[[PackedWeight], None],
    stand_ins: StandIns,
    *,
    image: ImageSpec | None,
    prompt: PromptSpec | None,
    step: int,
) -> Traced:
    context = prompt.context if prompt else 1
    constants = Constants(component, weights, note, stand_ins, step=step, context=context)
    sequence = torch.export.Dim("sequence", min=1, max=max(2, step))  # a range of one is refused
    shapes = {spec.name: spec.shape for spec in component.inputs}
    match component.name:
        case "image" | "vision":
            assert image is not None
            tokens = prompt.tokens_per_image if prompt and component.name == "vision" else 0
            pixels = torch.zeros((1, 3, image.height, image.width), dtype=torch.uint8)
            return Traced(
                module=_Images(component, constants, image, tokens),
                arguments=(pixels,),
                dynamic_shapes=(None,),
            )
        case "text":
            ids = torch.zeros((1, int(shapes["input_ids"][1])), dtype=torch.int64)
            return Traced(module=_Texts(component, constants), arguments=(ids,), dynamic_shapes=(None,))
        case "embed":
            ids = torch.zeros((1, 2), dtype=torch.int64)
            return Traced(
                module=_Tokens(component, constants), arguments=(ids,), dynamic_shapes=({1: sequence},)
            )
        case "decoder":
            assert prompt is not None
            local = min(context, prompt.window or 1)
            caches = {
                name: (1, local if shape[2] == "past_local" else context, int(shape[1]), int(shape[3]))
                for name, shape in shapes.items()
                if name.startswith("past_key_values.")
            }
            width = int(shapes["inputs_embeds"][2])
            return Traced(
                module=_Decoder(component, constants, caches),
                arguments=(torch.zeros(1, 2, width + 1), torch.arange(2)),
                dynamic_shapes=({1: sequence}, {0: sequence}),
            )
    raise ValueError(f"no method is known for the component {component.name!r}")


def lower_program(
    programs: Mapping[str, torch.export.ExportedProgram],
    constants: Mapping[str, Any],
    path: Path,
    stand_ins: StandIns,
    *,
    delegate: str,
    data: Path | None = None,
) -> dict[str, Share]:
    """Write exported methods as one program.

    Args:
        programs: By method name.
        constants: What the methods that only return a constant return.
        path: The .pte file.
        stand_ins: The weights that methods hold stand-ins of.
        delegate: What takes all it can, `portable` for nothing.
        data: A .ptd file for the weights; None leaves them in the program's.

    Returns:
        What the delegate took of each method. Beside the program, `layers.json` says where it shows its
        layers.
    """
    partitioners = {name: _partitioners(delegate, has_images=name in _OF_IMAGES) for name in programs}
    config = EdgeCompileConfig(_check_ir_validity=False, _skip_dim_order=True)
    with _quiet(), torch.no_grad(), stand_ins.in_xnnpack():
        edge = to_edge_transform_and_lower(
            dict(programs),
            partitioner=partitioners,
            constant_methods=dict(constants),
            compile_config=config,
        )
        edge.compile_config = config  # which `to_backend` forgets: orders of axes would be checked once more
        shares = {name: _share(edge.exported_program(name)) for name in programs}
        lowered = edge.to_executorch(
            ExecutorchBackendConfig(memory_planning_pass=MemoryPlanningPass(share_mutable_buffers=False))
        )
    without_weights = path.with_suffix(".lowered")
    with without_weights.open("wb") as file:
        lowered.write_to_file(file)
    if stand_ins.weights:
        write_program(without_weights, path, stand_ins, data=data)
        without_weights.unlink()
    else:
        without_weights.rename(path)
    write_layers(path.parent, {name: lowered.exported_program(name) for name in programs})
    return shares


def _partitioners(delegate: str, *, has_images: bool) -> list[Any]:
    if delegate == "portable":
        return []
    return [_Xnnpack(has_images=has_images) if delegate == "xnnpack" else coreml_partitioner()]


def _share(program: torch.export.ExportedProgram) -> Share:
    delegated = kernels = calls = 0
    for node in program.graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        if "executorch_call_delegate" in str(node.target):
            module = getattr(program.graph_module, node.args[0].target)
            inside = module.original_module.graph_module.graph.nodes
            delegated += sum(1 for inner in inside if inner.op == "call_function")
            calls += 1
        elif "getitem" not in str(node.target):
            kernels += 1
    return Share(delegated=delegated, kernels=kernels, calls=calls)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings of the exporter's own libraries, which no user can act on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield

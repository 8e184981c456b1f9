"""Records the residual stream between the layers of the original model, by hooks of PyTorch's modules."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medgemma_runtime.layers import kept_tokens

if TYPE_CHECKING:
    from torch import Tensor, nn

__all__ = ["layer_states"]


def layer_states(model: "nn.Module", run: Callable[[], Any]) -> NDArray[np.float32]:
    """What enters the first layer of a tower or decoder, and what leaves each.

    Args:
        model: One whose layers are its only list of modules that is called `layers`.
        run: Runs it once, on one item.

    Returns:
        [layers + 1, kept tokens, H], see `kept_tokens`.
    """
    import torch

    states: list[Tensor] = []
    with torch.inference_mode(), _noting(_layers(model), states):
        run()
    whole = torch.cat(states).float().cpu().numpy()
    return np.ascontiguousarray(whole[:, kept_tokens(whole.shape[1])])


def _layers(model: "nn.Module") -> "nn.ModuleList":
    import torch

    [layers] = [
        module
        for name, module in model.named_modules()
        if name.rpartition(".")[2] == "layers" and isinstance(module, torch.nn.ModuleList)
    ]
    return layers


@contextmanager
def _noting(layers: "nn.ModuleList", states: "list[Tensor]") -> Iterator[None]:
    def enters(_: Any, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        states.append(given[0] if given else named["hidden_states"])

    def leaves(_: Any, __: Any, result: Any) -> None:
        states.append(result[0] if isinstance(result, tuple) else result)

    hooks = [layers[0].register_forward_pre_hook(enters, with_kwargs=True)]
    hooks += [layer.register_forward_hook(leaves) for layer in layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()

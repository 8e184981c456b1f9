"""A decoder in parts, each of some layers, whose caches the host holds: see `medgemma_runtime.host_cache`."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict, TypeAdapter

from medgemma_runtime.artifact import Artifact
from medgemma_runtime.backends.mil import Mode, Observer
from medgemma_runtime.backends.mil_session import MilSession
from medgemma_runtime.backends.static_decoder import Conversation
from medgemma_runtime.errors import ArtifactError
from medgemma_runtime.host_cache import HostCache
from medgemma_runtime.manifest import ComponentEntry
from medgemma_runtime.static_cache import StaticSizes, read_sizes

__all__ = ["HostDecoder"]

_CACHE = "key_cache_"


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """The JSON file of a decoder in parts: how they are fed, and the components of the artifact in order."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    sizes: dict[str, Any]
    layers: tuple[str, ...]
    parts: tuple[str, ...]
    head: str


_CHAIN: TypeAdapter[_Chain] = TypeAdapter(_Chain)


class HostDecoder:
    """Runs the parts of a decoder one after the other. See `StaticDecoder`.

    Args:
        artifact: An opened artifact.
        component: The decoder's name in the manifest, whose program is the JSON file.
        mode: How much of the programs' fp16 is honoured.
        observe: Called with every tensor of the layers.

    Raises:
        ArtifactError: If the JSON file is not to the form, or the parts are not all layers in order.
    """

    def __init__(
        self, artifact: Artifact, component: str, *, mode: Mode, observe: Observer | None = None
    ) -> None:
        self.entry = artifact.component(component)
        path = artifact.path(self.entry.program)
        try:
            chain = _CHAIN.validate_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(
                f"{self.entry.program} is not to the form: {str(error).splitlines()[0]}; export again"
            ) from None
        self._sizes: StaticSizes = read_sizes(json.dumps(chain.sizes))
        self._layers = chain.layers
        entries = {name: artifact.component(name) for name in (*chain.parts, chain.head)}
        _check_order(self.entry.program, chain, entries)
        self._parts = [MilSession(artifact, name, mode=mode, observe=observe) for name in chain.parts]
        self._head = MilSession(artifact, chain.head, mode=mode)
        sessions = (*self._parts, self._head)
        self.load_seconds = sum(session.load_seconds for session in sessions)

    def begin(self) -> Conversation:
        """See `StaticDecoder`."""
        [keys] = [spec for spec in self._parts[0].entry.inputs if spec.name == f"{_CACHE}0"]
        cache = HostCache(self._sizes, self._layers, width=int(keys.shape[1]))
        return _Conversation(self._parts, self._head, cache)

    def close(self) -> None:
        """See `StaticDecoder`."""
        for session in (*self._parts, self._head):
            session.close()


class _Conversation:
    """See `Conversation`."""

    def __init__(self, parts: list[MilSession], head: MilSession, cache: HostCache) -> None:
        self._parts, self._head, self._cache, self.length = parts, head, cache, 0

    def steps(self, blocks: NDArray[np.int64]) -> Iterator[slice]:
        return self._cache.steps(blocks)

    def read(self, embeddings: NDArray[Any], blocks: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        step = self._cache.step(embeddings, blocks)
        hidden: NDArray[Any] = step.hidden
        new: dict[str, NDArray[Any]] = {}
        for part in self._parts:
            known = {"hidden": hidden, **step.inputs, **self._cache.arrays}
            outputs = part.run({spec.name: known[spec.name] for spec in part.entry.inputs})
            hidden = outputs.pop("next_hidden")
            new |= outputs
        self._cache.keep(step, new)
        self.length = self._cache.length
        last = len(embeddings) - 1
        pieces = self._head.run({"hidden": hidden[:, :, :, last : last + 1]})
        names = [spec.name for spec in self._head.entry.outputs]
        return {"logits": np.concatenate([pieces[name] for name in names], axis=1)[None]}


def _check_order(name: str, chain: _Chain, entries: Mapping[str, ComponentEntry]) -> None:
    """Every layer once and in order: what one part gives is what the next one takes."""
    found = [
        int(spec.name.removeprefix(_CACHE))
        for part in chain.parts
        for spec in entries[part].inputs
        if spec.name.startswith(_CACHE)
    ]
    if found != list(range(len(chain.layers))):
        raise ArtifactError(
            f"{name} says that {', '.join(chain.parts)} are the {len(chain.layers)} layers of the decoder in "
            f"order, and they hold the layers {', '.join(map(str, found)) or 'none'}; export again"
        )

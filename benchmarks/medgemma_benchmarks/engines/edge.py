"""This project's own runtime, on an artifact with the components `embed` and `decoder`."""

from importlib.metadata import version
from pathlib import Path

import numpy as np

from medgemma_runtime.artifact import open_artifact
from medgemma_runtime.backends import open_session
from medgemma_runtime.decoder import Decoder
from medgemma_runtime.errors import ArtifactError


class Edge:
    """A `worker.Engine`."""

    name = "medgemma-edge"

    def __init__(self, model: str, *, threads: int) -> None:
        # Whoever started this process has checked the hashes.
        artifact = open_artifact(Path(model), check_hashes=False)
        if artifact.manifest.prompt is None:
            raise ArtifactError(f"{artifact.directory.name} has no prompt spec; export it again")
        self.version = version("medgemma-edge")
        embed, decoder = (open_session(artifact, part, threads=threads) for part in ("embed", "decoder"))
        self._decoder = Decoder(embed, decoder, artifact.manifest.prompt)

    def start(self, tokens: int) -> None:
        """See `worker.Engine`."""
        self._cache = self._decoder.new_cache(tokens)

    def prefill(self, ids: list[int]) -> int:
        """See `worker.Engine`."""
        return int(self._decoder.read(self._cache, np.array(ids, np.int64)).argmax())

    def step(self, token: int) -> int:
        """See `worker.Engine`."""
        return self.prefill([token])


def load(model: str, *, threads: int, context: int) -> Edge:
    """Open an artifact; its caches are made for each conversation, so that `context` changes nothing."""
    return Edge(model, threads=threads)

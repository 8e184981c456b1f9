"""Hashes of the integers that were made for an artifact, equal for all targets of one plan.

They are taken before a target packs the integers. So equal files do not prove what two artifacts carry: that
each carries what was made for it, `compare_hashes` asks of integers read back, as packing references do. Of
integers that samples had a part in, which nobody can make again from the checkpoint, they are the record.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from medgemma_quantization.weights import QuantizedWeights
from medgemma_runtime.errors import ArtifactError

__all__ = ["INTEGERS_NAME", "compare_hashes", "hash_integers", "read_hashes", "write_hashes"]

INTEGERS_NAME = "integers.json"


def hash_integers(weights: QuantizedWeights, names: Iterable[str] | None = None) -> dict[str, str]:
    """SHA-256 of each weight that the plan stores as integers, by name.

    Hashed are its integers as `pack_integers` packs them, row by row, and then its scales (of a palette its
    values) as little-endian float32.

    Args:
        weights: Where they are.
        names: Of which weights; None for all. Those that stay float are left out.
    """
    rows = weights.plan.by_name
    return {name: _hash(weights, name) for name in names or rows if not rows[name].storage.is_float}


def write_hashes(hashes: dict[str, str], directory: Path) -> None:
    """Write `integers.json`, sorted by name."""
    text = json.dumps(hashes, indent=1, sort_keys=True)
    (directory / INTEGERS_NAME).write_text(f"{text}\n", encoding="utf-8")


def read_hashes(directory: Path) -> dict[str, str]:
    """Read `integers.json` of an artifact.

    Raises:
        ArtifactError: If it is absent or something else.
    """
    path = directory / INTEGERS_NAME
    try:
        return TypeAdapter(dict[str, str]).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValidationError):
        raise ArtifactError(f"{path} holds no hashes of integers; export the model again") from None


def compare_hashes(found: dict[str, str], stated: dict[str, str]) -> None:
    """Hold integers against those that an artifact says were made.

    Args:
        found: Hashes of some of its weights.
        stated: Its `integers.json`.

    Raises:
        ArtifactError: Naming the first weight that differs.
    """
    for name, sha256 in found.items():
        if stated.get(name) != sha256:
            raise ArtifactError(
                f"the integers of {name} are not those that were made for the artifact; its weight file is "
                "damaged or was packed wrongly: export again"
            )


def _hash(weights: QuantizedWeights, name: str) -> str:
    digest = hashlib.sha256()
    digest.update(weights.stored_values(name).data)
    digest.update(weights.scales(name).astype("<f4", copy=False).data)
    return digest.hexdigest()

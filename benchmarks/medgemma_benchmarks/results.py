"""Parity, latency, generation and quantization reports as JSON files."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from medgemma_benchmarks.generation import GenerationReport
from medgemma_benchmarks.latency import LatencyReport
from medgemma_benchmarks.parity_report import ParityReport
from medgemma_benchmarks.quantization_report import QuantizationReport
from medgemma_runtime.errors import EdgeError

__all__ = ["Result", "to_json", "read_result"]

Result = ParityReport | LatencyReport | GenerationReport | QuantizationReport

_ADAPTERS: dict[str, TypeAdapter[Any]] = {
    "parity": TypeAdapter(ParityReport),
    "latency": TypeAdapter(LatencyReport),
    "generation": TypeAdapter(GenerationReport),
    "quantization": TypeAdapter(QuantizationReport),
}


def to_json(results: Result | list[ParityReport]) -> str:
    """One report as an object, several as a list; a value that could not be computed is null, never NaN."""
    data = [asdict(result) for result in results] if isinstance(results, list) else asdict(results)
    return json.dumps(data, indent=2, allow_nan=False) + "\n"


def read_result(path: Path) -> list[Result]:
    """Read what `to_json` wrote: one report or several.

    Raises:
        EdgeError: If the file is absent, no JSON, or no such report.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise EdgeError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise EdgeError(f"{path} is no JSON file: {error}") from None
    return [_read_one(path, item) for item in (data if isinstance(data, list) else [data])]


def _read_one(path: Path, data: object) -> Result:
    kind = data.get("report") if isinstance(data, dict) else None
    if not isinstance(kind, str) or kind not in _ADAPTERS:
        raise EdgeError(
            f"{path} is no parity, latency, generation or quantization report; give files that --out of "
            "medgemma-parity, medgemma-bench or medgemma-reference quantization wrote"
        )
    try:
        report: Result = _ADAPTERS[kind].validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise EdgeError(
            f"{path} is not to the form of this version: {where}: {first['msg']}; measure again"
        ) from None
    return report

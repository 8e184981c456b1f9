"""The ways to find integers: one file for each, and this table."""

from typing import Literal

from medgemma_quantization.methods import gptq, rounding, search
from medgemma_quantization.methods.method import Method, Rounder

__all__ = ["Method", "MethodName", "Rounder", "METHODS"]

MethodName = Literal["rtn", "search", "gptq"]

METHODS: dict[MethodName, Method] = {
    "rtn": Method(find=rounding.nearest, samples="none"),
    "search": Method(find=search.searched, samples="optional"),
    "gptq": Method(find=gptq.gptq, samples="needed"),
}

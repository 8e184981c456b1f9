"""The ways to find integers: one file for each, and this table."""

from typing import Literal

from medgemma_quantization.methods import awq, gptq, rounding, search, smoothquant
from medgemma_quantization.methods.method import Method, Rounder

__all__ = ["Method", "MethodName", "Rounder", "METHODS"]

MethodName = Literal["rtn", "search", "gptq", "awq", "awq-search", "awq-gptq", "smoothquant"]

METHODS: dict[MethodName, Method] = {
    "rtn": Method(find=rounding.nearest, samples="none", sees_inputs=False),
    "search": Method(find=search.searched, samples="optional", sees_inputs=True),
    "gptq": Method(find=gptq.gptq, samples="needed", sees_inputs=True),
    "awq": Method(find=rounding.nearest, samples="needed", sees_inputs=False, factors=awq.awq_factors),
    "awq-search": Method(find=search.searched, samples="needed", sees_inputs=True, factors=awq.awq_factors),
    "awq-gptq": Method(find=gptq.gptq, samples="needed", sees_inputs=True, factors=awq.awq_factors),
    "smoothquant": Method(
        find=rounding.nearest, samples="needed", sees_inputs=False, factors=smoothquant.smooth()
    ),
}

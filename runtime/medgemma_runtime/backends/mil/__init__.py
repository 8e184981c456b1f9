"""Evaluates Core ML's ML Programs (`.mlpackage`) with numpy: no Mac, no Core ML framework, no coremltools.

`MilProgram.open(path)` reads a package, checks it and maps its weights; `run` evaluates one of its functions
in one of three modes (`medgemma_runtime.backends.mil.arithmetic`). It answers three questions on any machine:
is the converted graph right, are the packed weights right, and does it stay inside the range of fp16? What
only Apple's compilers decide, such as which operator runs where, it cannot answer.

Nothing here needs the rest of the runtime but its errors.
"""

from medgemma_runtime.backends.mil.arithmetic import Mode
from medgemma_runtime.backends.mil.contents import Contents, Weight, contents
from medgemma_runtime.backends.mil.function import OPERATORS, Function
from medgemma_runtime.backends.mil.program import MilProgram, NotFiniteTensorError, Observer, State

__all__ = [
    "MilProgram",
    "Mode",
    "Function",
    "Contents",
    "Weight",
    "contents",
    "NotFiniteTensorError",
    "Observer",
    "State",
    "OPERATORS",
]

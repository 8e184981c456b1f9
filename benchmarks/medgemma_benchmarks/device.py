"""The machine that numbers were measured on: what explains speed, and nothing that names place or person."""

import os
import platform
import re
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from pydantic import ConfigDict

from medgemma_runtime.errors import missing_package

__all__ = ["DeviceDescription", "describe_device", "usable_cores"]

# Instruction sets that decide which int8, fp16 and bf16 kernels an engine picks. x86: AVX2 baseline, VNNI
# dot products, AMX tiles. Arm: asimddp and i8mm are the int8 dot product and matrix multiply.
_FLAGS = (
    "avx2",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "fphp",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
    "sme",
)
_CPUINFO = Path("/proc/cpuinfo")
_PACKAGES = ("medgemma-edge", "onnxruntime", "numpy", "pillow", "tokenizers")


@dataclass(frozen=True, kw_only=True)
class DeviceDescription:
    """Where something ran.

    Attributes:
        cpu: Model name.
        architecture: Such as `x86_64` or `arm64`.
        flags: The instruction sets it has, of those that matter for speed here.
        logical_cores: Hardware threads this process may use.
        physical_cores: Cores of the machine; None when unknown.
        memory_bytes: Main memory.
        governor: Frequency policy of core 0, such as `performance`; None when unreadable.
        system: Operating system and release.
        threads: Threads for one operator; None where the engine chose.
        versions: Of Python and the packages involved.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", allow_inf_nan=False)

    cpu: str
    architecture: str
    flags: tuple[str, ...]
    logical_cores: int
    physical_cores: int | None
    memory_bytes: int
    governor: str | None
    system: str
    threads: int | None
    versions: dict[str, str]


def describe_device(*, threads: int | None) -> DeviceDescription:
    """Describe this machine, without its name, its paths or its users.

    Args:
        threads: What the run was told to use, to be recorded with it.

    Raises:
        EdgeError: If psutil is not installed.
    """
    try:
        import psutil
    except ImportError:
        raise missing_package("psutil", extra="bench", purpose="describe the device") from None
    cpu, flags = _cpu()
    return DeviceDescription(
        cpu=cpu,
        architecture=platform.machine(),
        flags=flags,
        logical_cores=usable_cores(),
        physical_cores=psutil.cpu_count(logical=False),
        memory_bytes=psutil.virtual_memory().total,
        governor=_governor(),
        system=_system(),
        threads=threads,
        versions={"python": platform.python_version()} | _versions(),
    )


def _cpu() -> tuple[str, tuple[str, ...]]:
    """Model name and relevant flags, from Linux's /proc/cpuinfo or macOS's sysctl."""
    if _CPUINFO.is_file():
        rows = {
            key.strip(): value.strip()
            for key, _, value in (line.partition(":") for line in _CPUINFO.read_text().splitlines())
            if key.strip()
        }
        # x86 names them flags, Arm Features; Arm has no model name, only part numbers.
        present = set((rows.get("flags") or rows.get("Features") or "").split())
        name = rows.get("model name") or rows.get("Hardware")
        if not name and "CPU part" in rows:
            name = f"Arm implementer {rows.get('CPU implementer')} part {rows['CPU part']}"
        return name or platform.machine(), tuple(flag for flag in _FLAGS if flag in present)
    if platform.system() == "Darwin":
        name = _sysctl("machdep.cpu.brand_string") or platform.machine()
        arm = {"asimddp": "FEAT_DotProd", "i8mm": "FEAT_I8MM", "bf16": "FEAT_BF16", "fphp": "FEAT_FP16"}
        return name, tuple(flag for flag in _FLAGS if _sysctl(f"hw.optional.arm.{arm.get(flag)}") == "1")
    return platform.processor() or platform.machine(), ()


def _sysctl(key: str) -> str | None:
    result = subprocess.run(["sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip() if result.returncode == 0 else None


def _system() -> str:
    """Name and numbers of the release; what follows the numbers can name a build machine."""
    numbers = re.match(r"[0-9.]*", platform.release())
    return f"{platform.system()} {numbers[0] if numbers else ''}".strip()


def usable_cores() -> int:
    """Hardware threads that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _governor() -> str | None:
    path = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
    try:
        return path.read_text().strip()
    except OSError:
        return None


def _versions() -> dict[str, str]:
    found = {}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found

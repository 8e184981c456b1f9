import getpass
import os
import platform
import sys
from dataclasses import asdict

import pytest

from medgemma_benchmarks import device
from medgemma_benchmarks.device import describe_device
from medgemma_runtime.errors import EdgeError

pytest.importorskip("psutil")


def test_it_describes_this_machine() -> None:
    found = describe_device(threads=3)
    assert found.cpu
    assert found.architecture == platform.machine()
    assert 1 <= found.logical_cores <= (os.cpu_count() or 1)
    assert found.memory_bytes > 2**28
    assert found.threads == 3
    assert {"python", "onnxruntime", "numpy"} <= set(found.versions)


def test_it_names_neither_the_machine_nor_its_user() -> None:
    text = str(asdict(describe_device(threads=None)))
    for private in (platform.node(), os.getcwd(), os.path.expanduser("~"), sys.prefix):
        assert private not in text
    assert f"'{getpass.getuser()}'" not in text


def test_the_release_keeps_its_numbers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "release", lambda: "6.8.0-31-build-of-somebody")
    monkeypatch.setattr(platform, "system", lambda: "Linux")
    assert describe_device(threads=None).system == "Linux 6.8.0"


def test_flags_of_x86_and_arm_are_read(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = tmp_path / "cpuinfo"
    monkeypatch.setattr(device, "_CPUINFO", info)
    info.write_text("processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu avx2 avx512_vnni amx_int8\n")
    found = describe_device(threads=None)
    assert (found.cpu, found.flags) == ("Some CPU", ("avx2", "avx512_vnni", "amx_int8"))
    info.write_text("Features\t: fp asimddp i8mm\nCPU implementer\t: 0x41\nCPU part\t: 0xd4f\n")
    found = describe_device(threads=None)
    assert (found.cpu, found.flags) == ("Arm implementer 0x41 part 0xd4f", ("asimddp", "i8mm"))


def test_a_missing_psutil_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(EdgeError, match=r"psutil is needed to describe the device .*medgemma-edge\[bench\]"):
        describe_device(threads=None)

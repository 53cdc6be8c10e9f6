"""What `doctor` finds on a machine that lacks something."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from p2pinfer import doctor
from p2pinfer.doctor import Level
from p2pinfer.model import zendnn


def test_a_working_machine_has_no_failure() -> None:
    """Where the tests run, a node of the bundled model could run, apart from taken ports."""
    findings = {finding.check: finding for finding in doctor.examine("demo")}
    assert list(findings) == ["python", "torch", "cpu", "kernels", "memory", "ports", "model"]
    del findings["ports"]  # a node may be running here
    assert [f for f in findings.values() if f.level is Level.FAIL] == []


def test_an_old_python_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python older than 3.11 is a failure."""
    monkeypatch.setattr(doctor, "OLDEST_PYTHON", (99, 0))
    assert doctor.check_python().level is Level.FAIL


def test_a_missing_torch_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without torch there is one failure, with what to do, and no further question about it."""
    monkeypatch.setitem(sys.modules, "torch", None)
    (finding,) = doctor.check_torch()
    assert finding.level is Level.FAIL and "install" in finding.advice


def test_a_cpu_without_bfloat16_is_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that emulates bfloat16 is told, with the number format that suits it."""
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset({"avx2"}))
    findings = {finding.check: finding for finding in doctor.check_torch()}
    assert findings["cpu"].level is Level.WARN and "float32" in findings["cpu"].advice


def test_kernels_that_are_not_the_fastest_are_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a processor of AMD's without its library: why it is not used, and what to install."""
    monkeypatch.setattr(doctor, "cpu_flags", lambda: frozenset({"avx512f"}))
    monkeypatch.setattr(zendnn, "is_of_vendor", lambda: True)
    monkeypatch.setattr(zendnn, "missing", lambda: "zentorch 2.13.0 is not for torch 2.15.0")
    finding = doctor.check_kernels()
    assert finding.level is Level.WARN and finding.detail.endswith("not for torch 2.15.0")
    assert "install the zentorch" in finding.advice
    monkeypatch.setattr(zendnn, "is_of_vendor", lambda: False)
    assert doctor.check_kernels().level is Level.OK


def test_cpu_flags_are_read_as_linux_lists_them(tmp_path: Path) -> None:
    """The first CPU's flags are read; without the file there are none."""
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nflags\t\t: fpu avx2\nflags\t\t: other\n")
    assert doctor.cpu_flags(file) == {"fpu", "avx2"}
    assert doctor.cpu_flags(tmp_path / "none") == frozenset()


@pytest.mark.parametrize(
    ("available", "level"),
    [(8 << 30, Level.OK), (1 << 30, Level.WARN), (1 << 20, Level.FAIL)],
)
def test_memory_levels(available: int, level: Level, monkeypatch: pytest.MonkeyPatch) -> None:
    """Little free memory is a warning, too little is a failure."""
    memory = SimpleNamespace(available=available, total=16 << 30)
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    finding = doctor.check_memory()
    assert finding.level is level and bool(finding.advice) == (level is not Level.OK)


def test_ports_taken_and_free() -> None:
    """A port that is listened on is named; a free address passes; a foreign one does not."""
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen(1)
        port = min(other.getsockname()[1], 65533)
        taken = doctor.check_ports(f"127.0.0.1:{port}")
    assert taken.level is Level.FAIL and "in use" in taken.detail
    assert doctor.check_ports("192.0.2.1:7720").level is Level.FAIL


def test_ports_that_one_program_holds_are_one_line() -> None:
    """Ports that are taken for one reason are named together, once."""
    finding = doctor.check_ports("192.0.2.1:7720")
    assert finding.detail.startswith("7720, 7721, 7722: ")
    assert ";" not in finding.detail


def test_a_missing_model_fails(tmp_path: Path) -> None:
    """A folder without a model is a failure that names it."""
    finding = doctor.check_model(str(tmp_path))
    assert finding.level is Level.FAIL and str(tmp_path) in finding.detail


@pytest.mark.parametrize(("available", "advice"), [(4 << 20, "free memory"), (None, "nodes")])
def test_a_model_larger_than_memory_is_a_warning(
    available: int | None, advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not fit alone is told with how many nodes would hold it."""
    memory = SimpleNamespace(available=available or doctor.MEMORY_NEEDED + (2 << 20))
    monkeypatch.setattr(doctor.psutil, "virtual_memory", lambda: memory)
    finding = doctor.check_model("demo")
    assert finding.level is Level.WARN and advice in finding.advice

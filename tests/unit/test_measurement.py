"""The machine's speed: measured once, remembered, and measured anew when that is of no use."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest
import torch

from p2pinfer import measurement
from p2pinfer.core.orders import Speed
from p2pinfer.core.speed import GB_S_PER_THREAD
from p2pinfer.measurement import (
    BUSY_FRESH_S,
    FRESH_S,
    Record,
    introduction,
    machine_id,
    machine_speed,
)
from p2pinfer.model.speed import ProductRate, product_rate, read_bandwidth
from p2pinfer.pipe import WorkerConfig
from p2pinfer.types import DType

CPU = torch.device("cpu")


def speed(folder: Path, told: str = "auto") -> Speed:
    """The speed of this machine as a node finds it out."""
    return machine_speed(told, dtype=DType.FLOAT32, quant="none", device=CPU, folder=folder)


def record(folder: Path) -> Record:
    """The measurement that lies in a folder."""
    (path,) = folder.iterdir()
    return msgspec.json.decode(path.read_bytes(), type=Record)


def change(folder: Path, **changes: object) -> None:
    """Make the measurement in a folder another one."""
    (path,) = folder.iterdir()
    path.write_bytes(msgspec.json.encode(msgspec.structs.replace(record(folder), **changes)))


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Measuring takes no time, and gives what stands in the list."""
    rates = [12.0]
    monkeypatch.setattr(
        measurement, "product_rate", lambda *_, **__: ProductRate(rates[-1], busy=False)
    )
    monkeypatch.setattr(measurement, "read_bandwidth", lambda *_: 2 * rates[-1])
    return rates


def test_products_and_memory_are_measured() -> None:
    """Both speeds of this machine are above nothing and below anything that exists."""
    assert 0.01 < product_rate(torch.float32, CPU).gb_s < 10_000
    assert 0.01 < product_rate(torch.float32, CPU, quant="int4").gb_s < 10_000
    cpus = sorted(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    assert 0.01 < read_bandwidth(cpus, seconds=0.02, size=64 << 20) < 100_000
    assert (sorted(os.sched_getaffinity(0)), torch.get_num_threads()) == (cpus, before)


def test_a_measurement_is_remembered(tmp_path: Path, quick: list[float]) -> None:
    """Who starts later gets what the first one measured."""
    first = speed(tmp_path / "new")
    quick.append(50.0)
    assert first == speed(tmp_path / "new")
    assert (first.product_gb_s, first.read_gb_s, first.machine) == (12.0, 24.0, machine_id(CPU))
    assert first.weight == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize(
    "changes",
    [
        {"key": "another processor"},
        {"machine": "0" * 16},
        {"measured_at": time.time() - 2 * FRESH_S},
        {"measured_at": time.time() + 3600},
        {"busy": True, "measured_at": time.time() - 2 * BUSY_FRESH_S},
    ],
)
def test_what_is_stale_is_measured_anew(
    tmp_path: Path, quick: list[float], changes: dict[str, object]
) -> None:
    """Another boot, processor or version, or a measurement that is old, does not count."""
    speed(tmp_path)
    change(tmp_path, **changes)
    quick.append(50.0)
    assert speed(tmp_path).product_gb_s == 50.0


def test_a_busy_machine_is_measured_once_for_all_that_start(
    tmp_path: Path, quick: list[float]
) -> None:
    """Nodes that start together get one figure, however bad it is."""
    speed(tmp_path)
    change(tmp_path, busy=True)
    quick.append(50.0)
    assert speed(tmp_path).product_gb_s == 12.0


def test_measuring_anew_counts_for_nodes_that_start_together(
    tmp_path: Path, quick: list[float]
) -> None:
    """What was measured before this process began is of no use, what came after is."""
    speed(tmp_path)
    change(tmp_path, measured_at=measurement.STARTED_AT - 1)
    quick.append(50.0)
    assert speed(tmp_path, "measure").product_gb_s == 50.0
    quick.append(70.0)
    assert speed(tmp_path, "measure").product_gb_s == 50.0


def test_a_weight_does_not_follow_noise(tmp_path: Path, quick: list[float]) -> None:
    """A second measurement near the first one leaves the weight as it was."""
    weight = speed(tmp_path).weight
    change(tmp_path, measured_at=0.0)
    quick.append(12.5)
    assert speed(tmp_path) == Speed(
        product_gb_s=12.5, read_gb_s=25.0, weight=weight, machine=machine_id(CPU)
    )


@pytest.mark.parametrize("content", [b"", b"{", b'{"key": 3}', b"\xff" * 5000])
def test_a_damaged_file_is_measured_over(
    tmp_path: Path, quick: list[float], content: bytes
) -> None:
    """What cannot be read is replaced."""
    speed(tmp_path)
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert speed(tmp_path).product_gb_s == 12.0
    assert record(tmp_path).product_gb_s == 12.0


def test_without_a_folder_it_is_measured_each_time(tmp_path: Path, quick: list[float]) -> None:
    """A cache that cannot be had is no reason not to start."""
    (tmp_path / "file").write_text("in the way")
    assert speed(tmp_path / "file").product_gb_s == 12.0
    quick.append(50.0)
    assert speed(tmp_path / "file").product_gb_s == 50.0


def test_a_told_speed_is_taken_as_it_is(tmp_path: Path) -> None:
    """Nothing is measured or remembered where somebody says how fast the node is."""
    told = speed(tmp_path, "4")
    assert (told.product_gb_s, told.weight) == (4.0, 4.0 / GB_S_PER_THREAD)
    assert speed(tmp_path, "off") == Speed(machine=machine_id(CPU))
    assert not list(tmp_path.iterdir())


def test_each_accelerator_is_a_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes of one machine share its memory, those of two of its accelerators do not."""
    ids = {machine_id(torch.device(name)) for name in ("cpu", "cuda:0", "cuda:1")}
    assert len(ids) == 3
    monkeypatch.setattr(measurement, "BOOT_ID_FILE", Path("/nowhere"))
    assert machine_id(CPU) == ""


def test_a_processor_has_a_name_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the system does not say which processor it is, the platform's word counts."""
    assert measurement._cpu_model()
    monkeypatch.setattr(measurement, "CPU_FILE", Path("/nowhere"))
    assert measurement._cpu_model()


def test_a_witness_measures_nothing() -> None:
    """It says how many threads and how much memory it has, and nothing of products."""
    config = WorkerConfig(
        node_id="0" * 16,
        boot_id="0" * 16,
        name="w",
        listen_host="127.0.0.1",
        step_port=1,
        bulk_port=2,
        device="cpu",
        threads=1,
        speed="auto",
    )
    said = introduction(config, CPU)
    assert (said.numeric_class, said.speed) == ("", Speed())

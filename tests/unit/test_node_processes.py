"""What a node's processes stand on: identity and lock, signals, children that end with parents."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from p2pinfer.clock import LoopClock
from p2pinfer.config import NodeSettings
from p2pinfer.errors import UsageError
from p2pinfer.lifeline import PARENT_VARIABLE, child_environment, die_with_parent
from p2pinfer.model import zendnn
from p2pinfer.node_setup import worker_config
from p2pinfer.pipe import PipeClosed
from p2pinfer.signals import StopSignals
from p2pinfer.state_dir import NODE_ID_FILE, StateDir
from p2pinfer.types import Member
from p2pinfer.worker_process import SPINS, WorkerProcess, environment

DEADLINE_S = 20
PRODUCTS_DEADLINE_S = 100


def test_a_node_keeps_its_identity(tmp_path: Path) -> None:
    """The id is drawn once, 16 hexadecimal digits, and found again after a restart."""
    with StateDir(tmp_path / "new" / "state") as state:
        first = state.node_id
    assert len(bytes.fromhex(first)) == 8
    with StateDir(tmp_path / "new" / "state") as state:
        assert state.node_id == first
    with StateDir(tmp_path / "other") as state:
        assert state.node_id != first


def test_two_processes_do_not_share_a_state_dir(tmp_path: Path) -> None:
    """The second is told which folder is in use; when the first is gone it may have it."""
    with (
        StateDir(tmp_path) as state,
        pytest.raises(UsageError, match="another node of this machine is using it"),
    ):
        StateDir(tmp_path)
    state.close()
    with StateDir(tmp_path) as again:
        assert again.node_id == state.node_id


def test_a_damaged_identity_is_not_replaced_silently(tmp_path: Path) -> None:
    """The file is named, with what to do about it."""
    (tmp_path / NODE_ID_FILE).write_text("hello\n")
    with pytest.raises(UsageError, match=r"node_id is damaged.*remove it to become a new node"):
        StateDir(tmp_path)


def test_a_state_dir_that_cannot_be_is_a_usage_error(tmp_path: Path) -> None:
    """A path through a file names the flag."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"--state-dir .*cannot be used"):
        StateDir(tmp_path / "file" / "state")


def test_a_stop_signal_is_a_flag_and_a_readable_descriptor() -> None:
    """SIGTERM and Ctrl-C set `asked` and wake the poll; handlers are given back at the end."""
    before = signal.getsignal(signal.SIGTERM)
    for number in (signal.SIGTERM, signal.SIGINT):
        with StopSignals() as signals:
            assert not signals.asked
            os.kill(os.getpid(), number)
            assert select.select((signals,), (), (), DEADLINE_S)[0]
            assert signals.asked
            signals.drain()
            assert not select.select((signals,), (), (), 0)[0]
            signals.wake()
            assert select.select((signals,), (), (), DEADLINE_S)[0]
    assert signal.getsignal(signal.SIGTERM) is before
    signals.wake()  # a thread that comes late does no harm


def test_the_loops_clock_never_goes_back() -> None:
    """Standstills and a machine's sleep are time that passed; what goes back is not."""
    raw = [100.0]
    clock = LoopClock(lambda: raw[0])
    raw[0] += 3600.0
    assert clock() == 3700.0
    raw[0] -= 1.0
    assert clock() == 3700.0
    assert LoopClock()() <= LoopClock()()


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    """The grandchild holds our pipe open; its end shows that the kernel killed it."""
    reader, writer = os.pipe()
    child = (
        "import os, signal; from p2pinfer.lifeline import die_with_parent; die_with_parent(); "
        f"os.write({writer}, b'up'); signal.pause()"
    )
    parent = textwrap.dedent(f"""
        import signal, subprocess, sys
        from p2pinfer.lifeline import child_environment
        subprocess.Popen([sys.executable, "-c", {child!r}], pass_fds=({writer},),
                         env=child_environment())
        signal.pause()
    """)
    with subprocess.Popen([sys.executable, "-c", parent], pass_fds=(writer,)) as process:
        os.close(writer)
        assert select.select((reader,), (), (), DEADLINE_S)[0]
        assert os.read(reader, 2) == b"up"
        process.kill()
        assert select.select((reader,), (), (), DEADLINE_S)[0]
        assert os.read(reader, 1) == b""
    os.close(reader)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks the Linux kernel")
def test_a_child_that_comes_too_late_ends_at_once() -> None:
    """When the parent has ended before the child could ask the kernel, the child exits."""
    gone = run_python("import os; print(os.getpid())").stdout.strip()
    with pytest.raises(SystemExit):
        die_with_parent({PARENT_VARIABLE: gone})


def test_who_has_no_named_parent_lives_on() -> None:
    """Started by a shell, or by a process whose own parent was named, nothing happens."""
    die_with_parent({})
    die_with_parent({PARENT_VARIABLE: "1"})
    assert child_environment(A="b")[PARENT_VARIABLE] == str(os.getpid())


@pytest.fixture
def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A module that speaks the pipe and then behaves as its first order's model folder says."""
    (tmp_path / "fake_worker.py").write_text(
        textwrap.dedent("""
        import os, signal, sys
        from p2pinfer.core.events import LinkLost
        from p2pinfer.model import kernels
        from p2pinfer.pipe import worker_side
        signal.signal(signal.SIGTERM, signal.SIG_IGN if "stubborn" in os.environ else 0)
        pipe = worker_side(int(sys.argv[2]))
        if "crash" in os.environ:
            sys.exit(3)
        pipe.send(LinkLost(node_id=os.environ["OMP_NUM_THREADS"].zfill(16)))
        if "stubborn" in os.environ:
            while True:
                signal.pause()
        import select
        from p2pinfer.pipe import PipeClosed
        try:
            while pipe.receive() is None:
                select.select((pipe,), (), ())
        except PipeClosed:
            pass
        """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    return "fake_worker"


def first_report(worker: WorkerProcess, deadline_s: float = DEADLINE_S) -> object:
    """The worker's first report, within the deadline; raises `PipeClosed` if there is none."""
    assert select.select((worker.pipe,), (), (), deadline_s)[0]
    return worker.pipe.receive()


def test_a_worker_is_told_its_threads_before_it_starts_and_ends_when_asked(
    fake_worker: str,
) -> None:
    """OpenMP's settings are in its environment; asked to stop, it is reaped."""
    worker = WorkerProcess(threads=3, module=fake_worker)
    assert getattr(first_report(worker), "node_id", "") == "3".zfill(16)
    worker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_worker_that_dies_leaves_its_exit_code(
    fake_worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The closed pipe tells of the death, the obituary how."""
    monkeypatch.setenv("crash", "1")
    worker = WorkerProcess(threads=1, module=fake_worker)
    with pytest.raises(PipeClosed):
        first_report(worker)
    assert "exited with code 3" in worker.obituary()
    worker.stop()


def test_a_killed_worker_is_named_by_its_signal(fake_worker: str) -> None:
    """SIGKILL from outside is told, with its most likely cause."""
    worker = WorkerProcess(threads=1, module=fake_worker)
    first_report(worker)
    os.kill(worker.pid, signal.SIGKILL)
    assert worker.obituary() == "the worker was ended by SIGKILL (out of memory?)"
    worker.stop()


def test_a_worker_that_does_not_listen_is_killed(
    fake_worker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that ignores the order and SIGTERM is gone within seconds all the same."""
    monkeypatch.setenv("stubborn", "1")
    monkeypatch.setattr("p2pinfer.worker_process.STOP_S", 0.1)
    monkeypatch.setattr("p2pinfer.worker_process.TERMINATE_S", 0.1)
    worker = WorkerProcess(threads=1, module=fake_worker)
    first_report(worker)
    assert worker.obituary() == "the worker closed its pipe and hung"
    worker.stop()
    worker = WorkerProcess(threads=1, module=fake_worker)
    first_report(worker)
    worker.stop()
    with pytest.raises(ProcessLookupError):
        os.kill(worker.pid, 0)


def test_a_worker_gets_the_kernels_that_its_node_was_told() -> None:
    """And no other than that node's."""
    member = Member(node_id="a" * 16, boot_id="b" * 16, name="n", address="tcp://127.0.0.1:7720")
    for kernels in ("auto", "onednn", "zendnn"):
        settings = NodeSettings(name="n", kernels=kernels)
        assert worker_config(settings, None, None, member).kernels == kernels


@pytest.mark.parametrize("library", ["onednn", "zendnn"])
def test_a_worker_does_not_grow_with_every_size_of_batch(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the product library keeps ready of each row count has a limit: without one, as many row
    counts as these take more than 600 MiB of oneDNN; with it about 100."""
    if library == "zendnn" and zendnn.missing():
        pytest.skip(f"ZenDNN cannot multiply here: {zendnn.missing()}")
    (tmp_path / "many_sizes.py").write_text(
        textwrap.dedent("""
        import os, select, sys
        import psutil
        import torch
        from p2pinfer.core.events import LinkLost
        from p2pinfer.model import kernels
        from p2pinfer.model.linear import pack
        from p2pinfer.pipe import worker_side
        pipe = worker_side(int(sys.argv[2]))
        torch.set_num_threads(1)
        kernels.use(os.environ["LIBRARY"])
        shapes = (384, 256), (256, 64), (512, 256), (256, 128), (640, 256)
        products = [(pack(torch.randn(rows, inputs)), inputs) for rows, inputs in shapes]
        assert kernels.library(torch.float32, torch.device("cpu")) == os.environ["LIBRARY"]
        memory = psutil.Process().memory_info
        before = memory().rss
        for rows in range(4, 260):
            for product, inputs in products:
                product(torch.zeros(rows, inputs))
        grown = (memory().rss - before) >> 20
        pipe.send(LinkLost(node_id=str(grown).zfill(16)))
        select.select((pipe,), (), ())
        """)
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("LIBRARY", library)
    worker = WorkerProcess(threads=1, module="many_sizes")
    try:
        grown_mib = int(getattr(first_report(worker, PRODUCTS_DEADLINE_S), "node_id", ""))
    finally:
        worker.stop()
    assert grown_mib < 250


@pytest.mark.parametrize(
    ("threads", "quant", "cores", "spins"),
    [(1, "none", 2, 0), (2, "none", 2, SPINS), (2, "int4", 2, 0), (2, "none", 1, 0)],
)
def test_only_threads_that_multiply_on_cores_of_their_own_wait_awake(
    threads: int, quant: str, cores: int, spins: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the user has set stays as it is."""
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert environment(threads, quant, cores)["GOMP_SPINCOUNT"] == str(spins)
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert environment(threads, quant, cores)["GOMP_SPINCOUNT"] == "77"

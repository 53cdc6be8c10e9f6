"""Start, watch and end the worker: the process that holds tensors, beside the daemon."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Final

from p2pinfer.config import available_cpus
from p2pinfer.lifeline import child_environment
from p2pinfer.pipe import DaemonPipe, daemon_side

WORKER_MODULE: Final = "p2pinfer.worker_main"

STOP_S: Final = 2.0
"""How long a worker may take to finish what it is doing, after which it is terminated."""

TERMINATE_S: Final = 1.0
"""How long it may take to obey SIGTERM, after which it is killed."""


KEPT_PRIMITIVES: Final = 128
"""Products of one shape and row count that oneDNN, and torch's own layer above it, each keep ready.
One takes up to a megabyte; left alone they keep 1,024, and a worker grows by most of a gigabyte as
batches of all sizes come by. To make one anew takes about half a millisecond, once for all layers
of a step."""

MAX_OMP_THREADS: Final = 1 << 16
"""More than machines have: a limit of the user's could leave products fewer than they count on."""

SPINS: Final = 10_000
"""How often a thread of OpenMP looks for the next product before it sleeps: tenths of a millisecond
or less, as long as the processor's pause instruction takes. Products of single units are shorter
than it takes to wake a thread."""


class WorkerProcess:
    """A running worker and the pipe to it."""

    def __init__(
        self,
        threads: int,
        *,
        quant: str = "none",
        cpus: Sequence[int] = (),
        module: str = WORKER_MODULE,
    ) -> None:
        """`cpus` are the processors that it is pinned to, by default those that this process may
        use."""
        here, there = socket.socketpair()
        pinned = ["--cpus", ",".join(map(str, cpus))] if cpus else []
        with there:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module, "--pipe-fd", str(there.fileno()), *pinned],
                pass_fds=(there.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=2,  # stdout is for results
                env=environment(threads, quant, len(cpus) or available_cpus()),
                # Not in the terminal's group: Ctrl-C means what the daemon makes of it.
                process_group=0,
            )
        self.pipe: DaemonPipe = daemon_side(here)

    @property
    def pid(self) -> int:
        """The worker's process id."""
        return self._process.pid

    def obituary(self) -> str:
        """How the worker ended, once its pipe is closed (it is killed if it lives on)."""
        try:
            code = self._process.wait(TERMINATE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return "the worker closed its pipe and hung"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the worker was ended by {signal.Signals(-code).name}{hint}"
        return f"the worker exited with code {code}; its own message is above"

    def stop(self) -> None:
        """End the worker: close its pipe, which it obeys as an order, then terminate, then kill.

        What it was told before (`StopWorker`, say) it still reads. It is reaped on return.
        """
        self.pipe.close()
        for patience, harder in ((STOP_S, signal.SIGTERM), (TERMINATE_S, signal.SIGKILL)):
            try:
                self._process.wait(patience)
                return
            except subprocess.TimeoutExpired:
                self._process.send_signal(harder)
        self._process.wait()


def _tunables(given: str) -> str:
    """The C library's settings: those `given`, and huge pages for large pieces of memory unless
    these say something of it."""
    kind = "glibc.malloc.hugetlb"
    return given if kind in given else ":".join(filter(None, (given, f"{kind}=1")))


def environment(threads: int, quant: str, cores: int) -> dict[str, str]:
    """What a worker must be told before it imports torch: OpenMP reads it when it is loaded.

    Threads wait for the next product awake only where torch multiplies and each of them has a core.
    Otherwise they would take the cores from one another, or from the threads of the library that
    multiplies quantised weights.
    """
    count = str(threads)
    spins = SPINS if quant == "none" and 1 < threads <= cores else 0
    chosen = {
        "GOMP_SPINCOUNT": str(spins),
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(KEPT_PRIMITIVES),
        "LRU_CACHE_CAPACITY": str(KEPT_PRIMITIVES),
    }
    return child_environment(
        OMP_NUM_THREADS=count,
        MKL_NUM_THREADS=count,
        OMP_WAIT_POLICY="passive",
        # Products with fewer threads than were asked for are wrong ones, of every library.
        OMP_DYNAMIC="false",
        OMP_THREAD_LIMIT=str(MAX_OMP_THREADS),
        # numpy's, which nothing here needs: it would start while numpy is imported, and keep the
        # low priority of that.
        OPENBLAS_NUM_THREADS="1",
        # Weights on huge pages: fewer misses of the address cache while they are streamed. What
        # torch allocates, and what other libraries do (glibc 2.35 and later).
        THP_MEM_ALLOC_ENABLE="1",
        GLIBC_TUNABLES=_tunables(os.environ.get("GLIBC_TUNABLES", "")),
        # The tokenizer's thread pool is of no use beside torch's.
        TOKENIZERS_PARALLELISM="false",
        # Who tunes these knows better.
        **{name: os.environ.get(name, value) for name, value in chosen.items()},
    )

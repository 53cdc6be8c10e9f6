"""Several nodes on this one machine, as one cluster: for a first look, for tests, for measurements.

Each node is a true `p2pinfer node start` process on the loopback interface. They end with this
process, however it ends (`lifeline.py`), and nobody else's process is touched.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

import psutil

from p2pinfer.client import Client
from p2pinfer.config import (
    MAX_PORT,
    PORTS_PER_NODE,
    NodeSettings,
    as_flags,
    available_cpus,
    format_address,
    load_settings,
    read_config,
)
from p2pinfer.errors import ERROR_CODES, ClusterError, UsageError
from p2pinfer.lifeline import child_environment
from p2pinfer.limits import MAX_NODES
from p2pinfer.model.checkpoint import content_id
from p2pinfer.model.config import resolve_model
from p2pinfer.node_setup import LocalModel

HOST: Final = "127.0.0.1"
PORT_STEP: Final = 10
READY_S: Final = 300.0
"""How long a large model may take to load; a node that fails says so much earlier."""

STOP_S: Final = 8.0
"""How long a node may take to leave, after which it is killed."""

POLL_S: Final = 0.1
WATCH_S: Final = 1.0
STATUS_S: Final = 2.0

ERROR_MARKS: Final = ("error: ", "error (")
"""How the line begins in which a program of ours says why it ends."""

Progress = Callable[[str], None]


@dataclass(frozen=True)
class LocalNode:
    """One node's process. `log` is the file with all it said."""

    name: str
    address: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def pid(self) -> int:
        """The daemon's process id."""
        return self.process.pid

    @property
    def last_error(self) -> str:
        """What its last error line says; empty if it wrote none."""
        lines = self.log.read_text(errors="replace").splitlines()
        errors = [line for line in lines if line.startswith(ERROR_MARKS)]
        return errors[-1].partition(": ")[2] if errors else ""

    @property
    def ending(self) -> str:
        """How its process ended, as what a sentence says of it; empty while it runs."""
        code = self.process.poll()
        if code is None:
            return ""
        if code == 0:
            return "left"
        if code < 0:
            hint = "; out of memory?" if code == -signal.SIGKILL else ""
            return f"was killed ({signal.Signals(-code).name}{hint})"
        said = self.last_error
        return f"ended with exit code {code}" + (f": {said}" if said else "")


class StartStop(ABC):
    """What is started when it is entered, and stopped when it is left. A context manager."""

    @abstractmethod
    def start(self) -> None:
        """Start all of it; what was started before a failure is stopped by `stop`."""

    @abstractmethod
    def stop(self) -> None:
        """Stop what was started, be it all or a part."""

    def __enter__(self) -> Self:
        """It is started."""
        try:
            self.start()
        except BaseException:  # Ctrl-C while it starts must leave no process behind either
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """It is stopped."""
        self.stop()


def end(nodes: Sequence[LocalNode]) -> None:
    """End the processes of these nodes: ask all, then kill. All are reaped on return."""
    for node in nodes:
        node.process.terminate()
    deadline = time.monotonic() + STOP_S
    for node in nodes:
        try:
            node.process.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            node.process.kill()
            node.process.wait()


class LocalCluster(StartStop):
    """`nodes` nodes of one model; node i listens on `base_port` + 10 i. A context manager.

    `options` are more settings by field name (`layout`, `dtype`, ...), the same for all nodes.
    Threads are shared out equally unless given; with `pin`, so are the CPUs. `on_progress` gets a
    line now and then while the cluster starts, and one when it is stopped. `folder` keeps logs and
    state if given; otherwise both are removed at the end, unless the cluster failed.
    """

    def __init__(
        self,
        nodes: int,
        *,
        model: str = "demo",
        base_port: int = 7720,
        threads: int | None = None,
        pin: bool = False,
        options: Mapping[str, Any] | None = None,
        config_file: Path | None = None,
        on_progress: Progress | None = None,
        folder: Path | None = None,
    ) -> None:
        if not 1 <= nodes <= MAX_NODES:
            raise UsageError(f"--nodes {nodes}: a cluster has 1 to {MAX_NODES} nodes")
        highest = MAX_PORT - PORT_STEP * (nodes - 1)
        if not 1 <= base_port <= highest:
            raise UsageError(
                f"--base-port {base_port}: allowed is 1 to {highest} for {nodes} nodes, which "
                f"listen {PORT_STEP} ports apart"
            )
        self._count = nodes
        self._base_port = base_port
        self._pin = pin
        self._config_file = config_file
        self._cpus = _allowed_cpus()
        shared = {
            "min_nodes": nodes,
            # Whoever starts several on one machine wants to see them work together.
            "use_nodes": "all",
            "threads": max(1, len(self._cpus) // nodes),
            # All nodes see the same free memory: KV may have half of it, in equal shares.
            "kv_memory": psutil.virtual_memory().available // (2 * nodes),
        }
        from_file = read_config(config_file) if config_file else {}
        given = {**_given(options or {}), **_given({"threads": threads}), "model": model}
        self._options = {k: v for k, v in shared.items() if k not in from_file} | given
        self._tell = on_progress or (lambda line: None)
        self._keep = folder is not None
        self._folder = folder or Path()
        self.nodes: list[LocalNode] = []

    def start(self, timeout: float = READY_S) -> None:
        """Start all nodes and return when the cluster is ready with all of them.

        Raises `UsageError` for wrong settings, `ClusterError` when a node ends or time is up; its
        message has the node's own last error.
        """
        # Once for all nodes, which would otherwise all hash a large model at the same time.
        folder = resolve_model(self._options["model"])
        self._tell(f"checking the model in {folder}")
        content_id(folder)
        if self._keep:
            self._folder.mkdir(parents=True, exist_ok=True)
        else:
            self._folder = Path(tempfile.mkdtemp(prefix="p2pinfer-"))
        for index in range(self._count):
            self.nodes.append(self.start_node(index))
        self._await_ready(timeout)

    def start_node(self, index: int, **changes: Any) -> LocalNode:
        """Start node `index` (again), with `changes` to its settings; does not wait for it."""
        name = f"node{index + 1}"
        own: dict[str, Any] = {
            "name": name,
            "listen": format_address(HOST, self._base_port + PORT_STEP * index),
            "state_dir": str(self._folder / name),
        }
        if index:
            own["join"] = (format_address(HOST, self._base_port),)
        if self._pin:
            own["cpus"] = ",".join(map(str, self._cpus_of(index)))
        values = {**self._options, **own, **changes}
        load_settings(values, self._config_file)  # wrong settings are told here, not in a log
        config = ["--config", str(self._config_file)] if self._config_file else []
        log = self._folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "p2pinfer", "node", "start", *config, *as_flags(values)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment(),
                # Ctrl-C is for this process, which then ends its nodes in order.
                process_group=0,
            )
        return LocalNode(name=name, address=values["listen"], process=process, log=log)

    def stop(self) -> None:
        """End this cluster's own processes: ask, then kill. All are reaped on return."""
        living = [node for node in self.nodes if not node.ending]
        if living:
            self._tell(f"stopping {_nodes(len(living))}")
        end(self.nodes)
        self.nodes.clear()
        if not self._keep and self._folder != Path():
            shutil.rmtree(self._folder, ignore_errors=True)

    def status(self, index: int = 0) -> dict[str, Any]:
        """The cluster as node `index` sees it."""
        return Client([self.nodes[index].address], timeout=STATUS_S).status()

    def check_alive(self) -> None:
        """Raise `ClusterError` with its last words if a node has ended."""
        for node in self.nodes:
            if node.ending:
                raise self._failure("node_lost", f"{node.name} {node.ending}")

    def watch(self, on_loss: Progress) -> NoReturn:
        """Watch over the cluster, which goes on without nodes that end: `on_loss` is told of each.

        Raises `ClusterError` when the last one has ended.
        """
        living = list(self.nodes)
        lost: list[str] = []
        pause = threading.Event()
        while living:
            for node in [node for node in living if node.ending]:
                living.remove(node)
                lost.append(f"{node.name} {node.ending}")
                if left := len(living):
                    on_loss(f"{lost[-1]}; {_nodes(left)} {'goes' if left == 1 else 'go'} on")
            if living:
                pause.wait(WATCH_S)
        raise self._failure("node_lost", f"{'; '.join(lost)}: no node is left")

    def _failure(self, code: str, message: str) -> ClusterError:
        """The error to raise; the logs, which may tell more, are kept."""
        self._keep = True
        return ClusterError(code, f"{message} (logs: {self._folder})", retryable=ERROR_CODES[code])

    def _await_ready(self, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        pause = threading.Event()
        told = ""
        while True:
            self.check_alive()
            waiting = self._waits_for()
            if not waiting:
                return
            if waiting != told:
                told = waiting
                self._tell(waiting)
            if time.monotonic() >= deadline:
                raise self._failure(
                    "not_ready", f"the cluster is not ready after {timeout:g} s: {waiting}"
                )
            pause.wait(POLL_S)

    def _waits_for(self) -> str:
        """What the cluster waits for; empty once every node says that it is ready, and votes."""
        for index, node in enumerate(self.nodes):
            try:
                status = self.status(index)
            except ClusterError:
                return f"{node.name} starts"
            if not status["ready"]:
                return f"{node.name}: {status.get('waiting') or 'the plan is being adopted'}"
            if len(status["voters"]) < len(self.nodes):
                return f"{node.name}: all nodes to have a vote"
        return ""

    def _cpus_of(self, index: int) -> list[int]:
        """As many CPUs as a node has threads; nodes share them where there are too few for all."""
        each = min(int(self._options["threads"]), len(self._cpus))
        if each * self._count > len(self._cpus):
            each = max(1, len(self._cpus) // self._count)
        first = index * each % len(self._cpus)
        return self._cpus[first : first + each]


def start_local(
    nodes: int,
    *,
    base_port: int,
    config_file: Path | None = None,
    flags: Mapping[str, Any] | None = None,
    on_progress: Progress | None = None,
) -> int:
    """`cluster start`: print one JSON line when the cluster is ready, then run until Ctrl-C.

    A node that ends by itself is told on stderr; the others go on. Returns 0; raises `UsageError`
    for a damaged model, for what can never become ready or a port that is taken, and `ClusterError`
    when a node ends before the cluster is ready, or when the last one has ended.
    """
    options = _given(flags or {})
    settings = load_settings(options, config_file)
    _check_placeable(settings, nodes)
    options.pop("model", None)
    cluster = LocalCluster(
        nodes,
        model=settings.model,
        base_port=base_port,
        options=options,
        config_file=config_file,
        on_progress=on_progress,
    )
    check_ports(base_port, nodes)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with cluster:
            print(json.dumps(_announcement(cluster)), flush=True)
            cluster.watch(lambda line: print(line, file=sys.stderr, flush=True))
    except KeyboardInterrupt:
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def free_base_port(nodes: int, host: str = HOST) -> int:
    """A base port such that every port of `nodes` local nodes is free now."""
    first, last = 20_000, 32_000 - PORT_STEP * nodes
    while True:
        base = first + secrets.randbelow(last - first)
        if all(_is_free(host, port) for port in _ports(base, nodes)):
            return base


def check_ports(base_port: int, nodes: int) -> None:
    """Raise `UsageError` naming the first port of `nodes` local nodes that is taken."""
    for port in _ports(base_port, nodes):
        if not _is_free(HOST, port):
            raise UsageError(
                f"port {port} is taken on {HOST}: another node or program listens there; stop it, "
                "or choose another --base-port"
            )


def _check_placeable(settings: NodeSettings, nodes: int) -> None:
    """Refuse at once what `nodes` nodes would wait for in vain."""
    if settings.min_nodes > nodes:
        raise UsageError(
            f"--min-nodes {settings.min_nodes} of a cluster of --nodes {nodes} will never be there"
        )
    stages, _, height = settings.layout.partition("x")
    if stages.isdigit() and int(stages) * int(height) > nodes:
        raise UsageError(
            f"--layout {settings.layout} needs {int(stages) * int(height)} nodes, but --nodes is "
            f"{nodes}"
        )
    layers = LocalModel.open(settings).config.num_hidden_layers
    if stages.isdigit() and int(stages) > layers:
        raise UsageError(
            f"--layout {settings.layout} has {stages} stages, but the model only {layers} layers"
        )


def _ports(base_port: int, nodes: int) -> list[int]:
    """Every port that `nodes` local nodes listen on."""
    return [
        base_port + PORT_STEP * node + offset
        for node in range(nodes)
        for offset in range(PORTS_PER_NODE)
    ]


def _is_free(host: str, port: int) -> bool:
    with socket.socket() as probe:
        # As libzmq binds: connections of a node that has just ended do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _announcement(cluster: LocalCluster) -> dict[str, Any]:
    status = cluster.status()
    return {
        "event": "cluster_ready",
        "nodes": [
            {"name": node.name, "address": node.address, "pid": node.pid} for node in cluster.nodes
        ],
        "cluster_id": status["cluster_id"],
        "model": status["model"]["name"],
    }


def _nodes(count: int) -> str:
    return f"{count} node" if count == 1 else f"{count} nodes"


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None and value != ()}


def _allowed_cpus() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(available_cpus()))

"""Nodes in network namespaces of their own, joined by a bridge: cables can be pulled.

Needs root and `ip` (iproute2). Nothing outside the namespaces made here is touched: the bridge has
one too. A thread of the test enters the bridge's namespace to speak to the nodes.
"""

from __future__ import annotations

import ctypes
import os
import secrets
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from p2pinfer.cluster import LocalNode, StartStop, end
from p2pinfer.config import as_flags, format_address
from p2pinfer.lifeline import child_environment
from tests.faults.watching import until, whole

PORT = 7720
NETWORK = "10.77.0"
CLONE_NEWNET = 0x40000000
NETNS_DIR = Path("/run/netns")
Value = TypeVar("Value")


def why_not() -> str:
    """Why no namespaces can be had here; empty when they can."""
    if not sys.platform.startswith("linux"):
        return "needs Linux"
    if os.geteuid() != 0:
        return "needs root"
    if shutil.which("ip") is None or shutil.which("nsenter") is None:
        return "needs ip (iproute2) and nsenter (util-linux)"
    name = f"p2p-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"ip netns add: {made.stderr.strip()}"
    bridge = ["ip", "-n", name, "link", "add", "bridge", "type", "bridge"]
    done = subprocess.run(bridge, capture_output=True, text=True, check=False)
    run("netns", "del", name)
    return f"no bridge: {done.stderr.strip()}" if done.returncode else ""


def run(*arguments: str) -> None:
    """Run `ip` with these arguments."""
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"


def enter(namespace: str) -> None:
    """Move the calling thread, and the threads that it starts, to a network namespace."""
    with (NETNS_DIR / namespace).open("rb") as handle:
        _setns(handle.fileno())


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """The calling thread, and those that it starts, in a network namespace; then back again."""
    with Path("/proc/thread-self/ns/net").open("rb") as home:
        enter(namespace)
        try:
            yield
        finally:
            _setns(home.fileno())


def _setns(handle: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(handle, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns: the network namespace cannot be entered")


class NamespacedCluster(StartStop):
    """`count` nodes, each in a namespace of its own, joined by a bridge. A context manager.

    `options` are settings of all nodes by field name.
    """

    def __init__(self, count: int, *, folder: Path, **options: Any) -> None:
        self._folder = folder
        self._options = {"model": "demo", "threads": 1, "min_nodes": count} | options
        tag = secrets.token_hex(3)
        self._names = [f"p2p-{tag}-{index + 1}" for index in range(count)]
        self.switch = f"p2p-{tag}-switch"
        self.nodes: list[LocalNode] = []

    def start(self) -> None:
        """Make the namespaces, and return when the cluster is ready with all nodes as voters."""
        self._lay_cables()
        for index in range(len(self._names)):
            self.nodes.append(self.start_node(index))
        until(self.all_vote, what="the cluster")

    def _lay_cables(self) -> None:
        run("netns", "add", self.switch)
        run("-n", self.switch, "link", "set", "lo", "up")
        run("-n", self.switch, "link", "add", "bridge", "type", "bridge")
        run("-n", self.switch, "addr", "add", f"{NETWORK}.254/24", "dev", "bridge")
        run("-n", self.switch, "link", "set", "bridge", "up")
        for index, name in enumerate(self._names):
            port = f"node{index + 1}"
            run("netns", "add", name)
            run("-n", name, "link", "set", "lo", "up")
            pair = ("type", "veth", "peer", "name", "eth0", "netns", name)
            run("-n", self.switch, "link", "add", port, *pair)
            run("-n", self.switch, "link", "set", port, "master", "bridge", "up")
            run("-n", name, "addr", "add", f"{self._host(index)}/24", "dev", "eth0")
            run("-n", name, "link", "set", "eth0", "up")

    @staticmethod
    def _host(index: int) -> str:
        return f"{NETWORK}.{index + 1}"

    def start_node(self, index: int) -> LocalNode:
        """Start node `index` (again) in its namespace; does not wait for it."""
        name, address = f"node{index + 1}", format_address(self._host(index), PORT)
        values = self._options | {
            "name": name,
            "listen": address,
            "state_dir": str(self._folder / name),
        }
        if index:
            values["join"] = (format_address(self._host(0), PORT),)
        log = self._folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(
                [
                    *("nsenter", f"--net={NETNS_DIR / self._names[index]}"),
                    *(sys.executable, "-m", "p2pinfer", "node", "start", *as_flags(values)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=child_environment(),
                process_group=0,
            )
        return LocalNode(name=name, address=address, process=process, log=log)

    def stop(self) -> None:
        """End the nodes and remove the namespaces. Safe to call at any time."""
        end(self.nodes)
        self.nodes.clear()
        for name in (*self._names, self.switch):
            if (NETNS_DIR / name).exists():
                run("netns", "del", name)

    # --- asking -----------------------------------------------------------------------------------

    def within(self, ask: Callable[[], Value], namespace: str = "") -> Value:
        """What `ask` returns, or raises, in a thread that is in a namespace (or at the bridge)."""
        results: list[Value] = []
        errors: list[BaseException] = []

        def work() -> None:
            try:
                enter(namespace or self.switch)
                results.append(ask())
            except BaseException as error:  # an assertion or a skip too: the caller raises it
                errors.append(error)

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def namespace(self, node: LocalNode) -> str:
        """The namespace that a node is in: from there it can be asked when its cable is out."""
        return self._names[int(node.name.removeprefix("node")) - 1]

    def all_vote(self) -> bool:
        """Whether every node says that the cluster is ready, with all of them as voters."""
        return self.within(lambda: whole(self.nodes, len(self._names)))

    # --- faults -----------------------------------------------------------------------------------

    def pull(self, node: LocalNode) -> None:
        """Pull a node's cable at the bridge."""
        run("-n", self.switch, "link", "set", node.name, "down")

    def plug(self, node: LocalNode) -> None:
        """Put it back."""
        run("-n", self.switch, "link", "set", node.name, "up")

    def part(self, one: LocalNode, other: LocalNode) -> None:
        """Nothing that one of two nodes sends reaches the other any more."""
        for here, there in ((one, other), (other, one)):
            run("-n", self.namespace(here), "route", "add", "blackhole", self._route_to(there))

    def join(self, one: LocalNode, other: LocalNode) -> None:
        """They reach each other again."""
        for here, there in ((one, other), (other, one)):
            run("-n", self.namespace(here), "route", "del", "blackhole", self._route_to(there))

    def _route_to(self, node: LocalNode) -> str:
        return f"{self._host(int(node.name.removeprefix('node')) - 1)}/32"

"""Nodes and local clusters as real processes: how they start, what stops them, what is left."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from p2pinfer.client import Client
from p2pinfer.cluster import LocalCluster, free_base_port
from p2pinfer.config import available_cpus
from p2pinfer.errors import ClusterError, UsageError
from p2pinfer.priority import PROMPT_NS, STARTING
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Accepted, Finished
from tests.faults.blows import processes
from tests.faults.watching import facts, kill, status, until
from tests.processes.command_line import DEADLINE_S, all_gone, family, finish, node_flags, start_cli
from tests.time_slices import grants_time_slices, time_slice

PROMPT = "Once upon a time"


def is_free(port: int) -> bool:
    """Whether nobody listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


# --- starting -------------------------------------------------------------------------------------


def test_joining_nobody_is_given_up(tmp_path: Path) -> None:
    """After --join-timeout the node ends with the address and what to do."""
    flags = node_flags(tmp_path, free_base_port(1))
    nobody = f"127.0.0.1:{free_base_port(1)}"
    code, _, err = finish(start_cli(*flags, "--join", nobody, "--join-timeout", "0.5"))
    assert code == 1
    assert f"error: no node answered at tcp://{nobody}" in err.splitlines()[-1]


def test_a_request_before_the_cluster_is_ready_waits_and_is_served(tmp_path: Path) -> None:
    """It is told what it waits for, and goes on when the second node is there."""
    cluster = LocalCluster(2, threads=1, base_port=free_base_port(2), folder=tmp_path)
    try:
        cluster.nodes.append(cluster.start_node(0))
        client = Client([cluster.nodes[0].address])
        until(lambda: status(cluster.nodes[0]))
        events = client.submit(PROMPT, SamplingParams(max_tokens=4))
        accepted = next(events)
        assert isinstance(accepted, Accepted)
        assert accepted.waiting
        cluster.nodes.append(cluster.start_node(1))
        assert isinstance(list(events)[-1], Finished)
    finally:
        cluster.stop()


@pytest.mark.skipif(sys.platform != "linux", reason="threads have no priority of their own")
def test_a_node_imports_at_a_low_priority_and_computes_at_the_usual_one(tmp_path: Path) -> None:
    """No thread that a step waits for is left with the priority of an import; they all have the
    short time slices, where the system has them."""
    with LocalCluster(1, threads=2, base_port=free_base_port(1), folder=tmp_path) as cluster:
        until(lambda: status(cluster.nodes[0]).get("ready"), what="the node")
        usual = os.getpriority(os.PRIO_PROCESS, 0)
        for process in processes(cluster.nodes[0]):
            slices = set()
            for thread in process.threads():
                with suppress(ProcessLookupError, FileNotFoundError):  # it has ended meanwhile
                    nice = os.getpriority(os.PRIO_PROCESS, thread.id)
                    assert nice == usual or nice != STARTING
                    if nice == usual and grants_time_slices():
                        slices.add(time_slice(Path(f"/proc/{process.pid}/task/{thread.id}/sched")))
            assert slices == ({PROMPT_NS} if grants_time_slices() else set())


@pytest.mark.skipif(available_cpus() < 2, reason="there are no two CPUs")
@pytest.mark.skipif(sys.platform != "linux", reason="no choice of processors")
def test_a_pinned_worker_has_its_processors_to_itself(tmp_path: Path) -> None:
    """Every thread of the node's control process keeps off them."""
    first, *others = sorted(os.sched_getaffinity(0))
    with LocalCluster(
        1, threads=1, base_port=free_base_port(1), folder=tmp_path, pin=True
    ) as cluster:
        until(lambda: status(cluster.nodes[0]).get("ready"), what="the node")
        found = processes(cluster.nodes[0])
        assert len(found) == 2
        for process in found:
            cpus = set(others) if process.pid == cluster.nodes[0].pid else {first}
            for thread in process.threads():
                with suppress(ProcessLookupError):  # it has ended meanwhile
                    assert os.sched_getaffinity(thread.id) == cpus


def test_a_node_waits_for_what_is_left_of_its_former_life(tmp_path: Path) -> None:
    """The worker of a node that was killed may end some time after it: until then it has a port."""
    port = free_base_port(1)
    with LocalCluster(1, threads=1, base_port=port, folder=tmp_path) as cluster:
        kill(*cluster.nodes)
        until(lambda: is_free(port + 1), what="the end of the worker")
        with socket.create_server(("127.0.0.1", port + 1)):
            cluster.nodes[0] = cluster.start_node(0)
            until(lambda: facts(cluster.nodes[0], "port_taken"), what="the new node, which waits")
        until(lambda: status(cluster.nodes[0]).get("ready"), what="the node")


# --- what cannot start ----------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_taken_port_is_named(tmp_path: Path, offset: int) -> None:
    """Any of a node's three ports: exit code 2 and the port's number, and nothing was started."""
    port = free_base_port(1)
    with socket.create_server(("127.0.0.1", port + offset)):
        code, _, err = finish(start_cli(*node_flags(tmp_path, port)))
    assert code == 2
    assert f"error: port {port + offset} is taken on 127.0.0.1" in err.splitlines()[-1]


def test_a_missing_model_is_named(tmp_path: Path) -> None:
    """Exit code 2 and the folder."""
    flags = node_flags(tmp_path, free_base_port(1))
    code, _, err = finish(start_cli(*flags, "--model", str(tmp_path / "none")))
    assert code == 2
    assert f"{tmp_path / 'none'}: no such model folder" in err.splitlines()[-1]


def test_a_state_dir_in_use_is_named(tmp_path: Path) -> None:
    """Two nodes of one name on one machine do not share their identity."""
    with LocalCluster(1, threads=1, base_port=free_base_port(1), folder=tmp_path):
        code, _, err = finish(start_cli(*node_flags(tmp_path, free_base_port(1), "node1")))
    assert code == 2
    assert "another node of this machine is using it" in err.splitlines()[-1]


def test_a_local_cluster_tells_why_a_node_ended(tmp_path: Path) -> None:
    """The error has the node's own last error line."""
    port = free_base_port(2)
    cluster = LocalCluster(2, threads=1, base_port=port, folder=tmp_path)
    with (
        socket.create_server(("127.0.0.1", port + 10)),
        pytest.raises(
            ClusterError, match=f"node2 ended with exit code 2: port {port + 10} is taken"
        ),
        cluster,
    ):
        pass
    assert cluster.nodes == []
    with pytest.raises(UsageError, match="1 to 16 nodes"):
        LocalCluster(17)


def test_a_client_says_that_nobody_is_there() -> None:
    """All addresses are named, with the command that starts a node."""
    one, two = (f"127.0.0.1:{free_base_port(1)}" for _ in range(2))
    with pytest.raises(ClusterError, match=f"tcp://{one}, tcp://{two}.*p2pinfer node start"):
        Client([one, two]).status()
    reply = Client([one]).submit_json_object(PROMPT, SamplingParams())
    assert reply["finish_reason"] == "error"
    assert reply["error"]["code"] == "not_ready"


# --- losing a worker ------------------------------------------------------------------------------


def test_a_node_whose_worker_is_killed_ends_and_says_so(tmp_path: Path) -> None:
    """A daemon does not outlive its worker: exit code 1 and the signal in its last line."""
    with LocalCluster(1, threads=1, base_port=free_base_port(1), folder=tmp_path) as cluster:
        node = cluster.nodes[0]
        _, worker = family(node.pid)
        worker.kill()
        assert node.process.wait(DEADLINE_S) == 1
        assert "SIGKILL" in node.last_error


# --- leaving --------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_signal_ends_a_node_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    """Exit code 0 within seconds, systemd is told, no process and no socket file is left."""
    port = free_base_port(1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(DEADLINE_S)
        node = start_cli(*node_flags(tmp_path, port), NOTIFY_SOCKET=str(tmp_path / "notify"))
        assert manager.recv(64) == b"READY=1"
        processes = family(node.pid)
        assert len(processes) == 2
        began = time.monotonic()
        node.send_signal(number)
        code, _, err = finish(node)
        assert code == 0, err
        assert time.monotonic() - began < 5
        assert manager.recv(64) == b"STOPPING=1"
    assert all_gone(processes)
    left = sorted(path.name for path in (tmp_path / "lone").iterdir())
    assert left == ["cluster.json", "node_id"]


def test_a_stop_signal_ends_a_node_that_is_still_starting(tmp_path: Path) -> None:
    """While its worker starts it ends just as cleanly."""
    node = start_cli(*node_flags(tmp_path, free_base_port(1)))
    assert node.stderr is not None
    assert "node_started" in node.stderr.readline()
    processes = family(node.pid)
    node.send_signal(signal.SIGTERM)
    assert finish(node)[0] == 0
    assert all_gone(processes)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_cluster_start_leaves_no_process(number: signal.Signals) -> None:
    """Ended or killed, `cluster start` takes all its nodes and their workers with it."""
    port = free_base_port(2)
    process = start_cli("cluster", "start", "--nodes", "2", "--base-port", str(port))
    assert process.stdout is not None
    ready = json.loads(process.stdout.readline())
    assert ready["event"] == "cluster_ready"
    assert [node["name"] for node in ready["nodes"]] == ["node1", "node2"]
    assert [node["address"] for node in ready["nodes"]] == [
        f"tcp://127.0.0.1:{port}",
        f"tcp://127.0.0.1:{port + 10}",
    ]
    processes = family(process.pid)
    assert {node["pid"] for node in ready["nodes"]} < {p.pid for p in processes}
    assert len(processes) == 5
    process.send_signal(number)
    assert finish(process)[0] == (0 if number is signal.SIGTERM else -signal.SIGKILL)
    until(lambda: all_gone(processes))


def test_cluster_start_goes_on_until_no_node_is_left() -> None:
    """Each killed node is told, the founder too; the rest serve on; at the end logs are kept."""
    port = free_base_port(3)
    process = start_cli("cluster", "start", "--nodes", "3", "--base-port", str(port))
    assert process.stdout is not None and process.stderr is not None
    node1, node2, node3 = json.loads(process.stdout.readline())["nodes"]
    os.kill(node1["pid"], signal.SIGKILL)
    told = next(line for line in process.stderr if "node1" in line and "killed" in line)
    assert told == "node1 was killed (SIGKILL; out of memory?); 2 nodes go on\n"
    client = Client([node2["address"]])
    until(lambda: client.status()["ready"] and len(client.status()["voters"]) == 2)
    assert isinstance(list(client.submit(PROMPT, SamplingParams(max_tokens=2)))[-1], Finished)
    for node in (node2, node3):
        os.kill(node["pid"], signal.SIGKILL)
    code, _, err = finish(process)
    last = err.splitlines()[-1]
    assert code == 1
    assert last.startswith("error (node_lost): node1 was killed (SIGKILL; out of memory?); ")
    assert "no node is left (logs: " in last
    logs = Path(last.rpartition("logs: ")[2].removesuffix(")"))
    assert (logs / "node2.log").exists()
    shutil.rmtree(logs)

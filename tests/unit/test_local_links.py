"""Frames over Unix sockets: whole and in order, however they come, and what ends a connection."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from p2pinfer import local_links
from p2pinfer.limits import MAX_STEP_BYTES
from p2pinfer.local_links import MAX_INCOMING, Arrival, LocalLinks, local_address
from p2pinfer.wire.codec import HEADER, MAGIC, decode, encode
from tests.wire_examples import EXAMPLES

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="abstract names are Linux's")

DEADLINE_S = 20.0
FRAMES = tuple(encode(EXAMPLES[label]) for label in ("step", "partial", "hidden", "candidates"))
LARGE = HEADER.pack(MAGIC, 1, 0, 66, 1 << 20, 0) + bytes(range(256)) * (1 << 12)
"""A frame of a megabyte by its header; nobody looks inside it here."""


class Node:
    """One node's local links, and what they took in."""

    def __init__(self, boot_id: str, *, listens: bool = True) -> None:
        self.boot_id = boot_id
        self.poller = zmq.Poller()
        self.links = LocalLinks(self.poller)
        self.arrived: list[Arrival] = []
        if listens:
            self.links.listen(boot_id)

    def turn(self, timeout_ms: int = 10) -> None:
        """Wait for the sockets, and take in what is there."""
        self.links.read(dict(self.poller.poll(timeout_ms)))
        while (arrival := self.links.receive()) is not None:
            self.arrived.append(arrival)

    @property
    def frames(self) -> list[bytes]:
        """Every frame so far."""
        return [bytes(frame) for _, frame in self.arrived if frame is not None]

    @property
    def ends(self) -> int:
        """Connections that have ended."""
        return sum(frame is None for _, frame in self.arrived)


MakeNode = Callable[..., Node]


@pytest.fixture
def node() -> Iterator[MakeNode]:
    """Makes nodes whose boot ids are this test's own, and closes them."""
    made: list[Node] = []

    def make(*, listens: bool = True) -> Node:
        made.append(Node(f"{os.getpid()}-{time.monotonic_ns()}", listens=listens))
        return made[-1]

    yield make
    for each in made:
        each.links.shutdown()
        each.links.shutdown()


def until(wanted: Callable[[], bool], *nodes: Node) -> None:
    """Let the nodes work until it is so."""
    deadline = time.monotonic() + DEADLINE_S
    while not wanted():
        assert time.monotonic() < deadline, [each.arrived for each in nodes]
        for each in nodes:
            each.turn()


def connected(to: Node) -> socket.socket:
    """A connection to a node by which bytes can be sent as they please."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(local_address(to.boot_id))
    return link


def test_frames_come_whole_and_in_order(node: MakeNode) -> None:
    """They come on one route, which is another one for another connection."""
    here, there, other = node(), node(), node()
    for sender in (there, other):
        sender.links.reach([here.boot_id])
        assert sender.links.reaches(here.boot_id)
        assert all(sender.links.send(here.boot_id, frame) for frame in FRAMES)
    until(lambda: len(here.frames) == 2 * len(FRAMES), here)
    by_route: dict[bytes, list[bytes]] = {}
    for route, frame in here.arrived:
        assert frame is not None
        by_route.setdefault(route, []).append(bytes(frame))
    assert list(by_route.values()) == [list(FRAMES)] * 2


def test_who_has_patience_takes_in_what_comes_meanwhile(node: MakeNode) -> None:
    """Without patience only what is there already is taken in."""
    here, there = node(), node()
    there.links.reach([here.boot_id])
    here.turn()
    assert not here.links.glance(0.0)
    assert not here.links.glance(0.01)
    sender = threading.Timer(0.05, there.links.send, (here.boot_id, FRAMES[0]))
    sender.start()
    assert here.links.glance(DEADLINE_S)
    sender.join()
    assert here.links.receive() is not None


def test_a_frame_may_come_byte_by_byte(node: MakeNode) -> None:
    """Neither headers nor bodies are whole when they come."""
    here = node()
    with connected(here) as link:
        for byte in b"".join(FRAMES):
            link.send(bytes((byte,)))
            here.turn(0)
        until(lambda: len(here.frames) == len(FRAMES), here)
    assert here.frames == list(FRAMES)
    assert [type(decode(frame)) for frame in here.frames] == [
        type(EXAMPLES[label]) for label in ("step", "partial", "hidden", "candidates")
    ]


def test_what_comes_next_may_be_received_into_memory_of_ones_own(node: MakeNode) -> None:
    """What it is not for is put back, and comes whole and in order."""
    here, there = node(), node()
    there.links.reach([here.boot_id])
    there.links.send(here.boot_id, FRAMES[0])
    until(lambda: len(here.frames) == 1, here)
    (route, _), memory = here.arrived[0], memoryview(bytearray(len(FRAMES[1])))
    assert here.links.receive_into(b"another", memory, 0.0) == 0
    assert here.links.receive_into(route, memory, 0.0) == 0
    there.links.send(here.boot_id, FRAMES[1])
    assert here.links.receive_into(route, memory, time.monotonic() + DEADLINE_S) == len(memory)
    assert memory == FRAMES[1]
    there.links.send(here.boot_id, FRAMES[2] + FRAMES[3])
    size = here.links.receive_into(route, memory, time.monotonic() + DEADLINE_S)
    here.links.put_back(route, bytes(memory[:size]))
    assert here.links.receive_into(route, memory, 0.0) == 0, "a frame is half there"
    until(lambda: len(here.frames) == 3, here)
    assert here.frames == [FRAMES[0], FRAMES[2], FRAMES[3]]
    there.links.shutdown()
    assert here.links.receive_into(route, memory, time.monotonic() + DEADLINE_S) == 0
    until(lambda: here.ends == 1, here)


def test_what_is_put_back_may_begin_no_frame(node: MakeNode) -> None:
    """Then the connection ends, as if it had been read."""
    here = node()
    with connected(here) as link:
        link.sendall(FRAMES[0])
        until(lambda: len(here.frames) == 1, here)
        link.sendall(b"GET / HTTP/1.1\r\n\r\n")
        (route, _), memory = here.arrived[0], memoryview(bytearray(256))
        size = here.links.receive_into(route, memory, time.monotonic() + DEADLINE_S)
        here.links.put_back(route, bytes(memory[:size]))
        assert link.recv(1) == b""
    here.turn()
    assert here.ends == 1


def test_memory_of_the_sender_is_its_own_again(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What did not fit into the socket is kept as it was when it was sent."""
    monkeypatch.setattr(local_links, "BUFFER_BYTES", 1 << 16)
    here, there = node(), node()
    there.links.reach([here.boot_id])
    memory = bytearray(LARGE)
    assert there.links.send(here.boot_id, memoryview(memory))
    here.turn(0)
    assert not here.frames, "the rest of it waits"
    memory[len(memory) // 2 :] = bytes(len(memory) - len(memory) // 2)
    until(lambda: len(here.frames) == 1, here, there)
    assert here.frames == [LARGE]


def test_two_that_send_each_other_megabytes_do_not_wait_for_ever(node: MakeNode) -> None:
    """What does not fit is kept and sent on while what comes is read; small frames stay behind."""
    one, other = node(), node()
    one.links.reach([other.boot_id])
    other.links.reach([one.boot_id])
    sent = [LARGE, FRAMES[0]] * 16
    for frame in sent:
        assert one.links.send(other.boot_id, frame)
        assert other.links.send(one.boot_id, frame)
    until(lambda: len(one.frames) == len(other.frames) == len(sent), one, other)
    assert one.frames == other.frames == sent


def test_a_peer_that_dies_within_a_frame_ends_its_connection(node: MakeNode) -> None:
    """What was whole before is handed on first."""
    here = node()
    with connected(here) as link:
        link.sendall(FRAMES[0] + LARGE[:100_000])
        until(lambda: bool(here.frames), here)
    until(lambda: here.ends == 1, here)
    assert here.frames == [FRAMES[0]]
    assert here.arrived[-1][1] is None


@pytest.mark.parametrize(
    "start",
    [
        b"GET / HTTP/1.1\r\n",
        HEADER.pack(MAGIC, 1, 0, 66, MAX_STEP_BYTES, 0),
        HEADER.pack(MAGIC, 1, 0, 65, 9 << 20, 0),
        HEADER.pack(MAGIC, 2, 0, 66, 8, 0),
        HEADER.pack(MAGIC, 1, 0, 66, 8, 1),
    ],
    ids=["stranger", "too long", "too long for its kind", "other major", "reserved"],
)
def test_what_begins_no_frame_is_handed_on_and_ends_the_connection(
    node: MakeNode, start: bytes
) -> None:
    """No memory is taken for what it announces, nothing after it is read, and who sent it is sent
    away."""
    here = node()
    with connected(here) as link:
        link.sendall(FRAMES[0] + start + FRAMES[1])
        until(lambda: here.ends == 1, here)
        assert here.frames == [FRAMES[0], start]
        assert link.recv(1) == b""


def test_a_frame_of_an_unknown_kind_is_no_reason_to_end(node: MakeNode) -> None:
    """A later minor may have it; the next frame begins after it."""
    here = node()
    unknown = HEADER.pack(MAGIC, 1, 9, 999, 100, 0) + bytes(100)
    with connected(here) as link:
        link.sendall(unknown + FRAMES[0])
        until(lambda: len(here.frames) == 2, here)
    assert here.frames == [unknown, FRAMES[0]]


def test_a_connection_that_broke_is_given_up_for_that_boot(node: MakeNode) -> None:
    """It is not tried again while plans name the peer, and is when they did not for once."""
    here, there = node(), node()
    here.links.reach([there.boot_id])
    there.links.shutdown()
    assert not here.links.send(there.boot_id, FRAMES[0])
    there.links.listen(there.boot_id)
    here.links.reach([there.boot_id])
    assert not here.links.reaches(there.boot_id)
    assert not here.links.send(there.boot_id, FRAMES[0])
    here.links.reach([])
    here.links.reach([there.boot_id])
    assert here.links.send(there.boot_id, FRAMES[0])


def test_a_peer_that_breaks_while_frames_wait_for_it_is_given_up(node: MakeNode) -> None:
    """The next frame is not taken, and nothing of it is waited for."""
    here, there = node(), node()
    here.links.reach([there.boot_id])
    for _ in range(8):
        assert here.links.send(there.boot_id, LARGE)
    assert dict(here.poller.poll(0)) == {}
    there.turn()
    there.links.shutdown()
    until(lambda: not here.links.reaches(there.boot_id), here)
    assert not here.links.send(there.boot_id, FRAMES[0])


def test_a_peer_that_reads_nothing_is_not_sent_more_than_a_limit(
    node: MakeNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is given up, as a step link whose queue is full."""
    monkeypatch.setattr(local_links, "MAX_UNSENT_BYTES", 3 << 20)
    here, there = node(), node()
    here.links.reach([there.boot_id])
    taken = 0
    while here.links.send(there.boot_id, LARGE):
        taken += 1
        assert taken < 100
    assert taken > 3
    assert not here.links.reaches(there.boot_id)


def test_who_does_not_listen_has_no_local_links(node: MakeNode) -> None:
    """Nobody is connected to, and nobody is met."""
    silent, there = node(listens=False), node()
    silent.links.reach([there.boot_id])
    there.links.reach([silent.boot_id, "f" * 16])
    assert not silent.links.reaches(there.boot_id)
    assert not there.links.reaches(silent.boot_id)
    silent.turn(0)


def test_a_name_that_is_taken_means_no_local_links(node: MakeNode) -> None:
    """Whoever has it is nobody that this node would send to."""
    there = node()
    second = LocalLinks(zmq.Poller())
    second.listen(there.boot_id)
    second.reach([there.boot_id])
    assert not second.reaches(there.boot_id)


def test_links_to_peers_of_no_plan_are_closed(node: MakeNode) -> None:
    """The peer sees the end."""
    here, there = node(), node()
    here.links.reach([there.boot_id])
    here.links.send(there.boot_id, FRAMES[0])
    until(lambda: bool(there.frames), there)
    here.links.reach([])
    until(lambda: there.ends == 1, there)
    assert not here.links.reaches(there.boot_id)


def test_only_so_many_connections_are_taken(node: MakeNode) -> None:
    """One more is closed at once; the others stay."""
    here = node()
    links = []
    try:
        for _ in range(MAX_INCOMING):
            links.append(connected(here))
            here.turn()
        with connected(here) as one_more:
            here.turn()
            one_more.settimeout(DEADLINE_S)
            assert one_more.recv(1) == b""
        links[0].sendall(FRAMES[0])
        until(lambda: here.frames == [FRAMES[0]], here)
    finally:
        for link in links:
            link.close()


def test_without_file_descriptors_there_are_no_local_links(node: MakeNode) -> None:
    """Who waits to be met is told so, and the node does not look at them again and again."""
    here, there = node(), node()
    there.links.reach([here.boot_id])
    other = LocalLinks(zmq.Poller())
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with open(os.devnull) as lowest:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest.fileno(), hard))
        try:
            other.listen("f" * 16)
            here.links.reach([there.boot_id])
            here.turn()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not here.links.reaches(there.boot_id)
    assert dict(here.poller.poll(0)) == {}
    assert not there.links.send(here.boot_id, FRAMES[0])
    there.links.reach(["f" * 16])
    assert not there.links.reaches("f" * 16)


AS_ANOTHER = """
import socket, sys
link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
link.connect(chr(0) + sys.argv[1])
link.settimeout(20)
sys.exit(0 if link.recv(1) == b"" else 1)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_another_user_is_sent_away(node: MakeNode) -> None:
    """Whatever it would say."""
    here = node()
    stranger = subprocess.Popen(
        ["/usr/bin/env", "python3", "-I", "-c", AS_ANOTHER, local_address(here.boot_id)[1:]],
        user=65534,
        cwd="/",
    )
    until(lambda: stranger.poll() is not None, here)
    assert stranger.returncode == 0
    assert here.arrived == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be another user")
def test_nothing_is_sent_to_another_user(node: MakeNode) -> None:
    """A peer's name may be taken by anybody."""
    here = node()
    os.seteuid(65534)
    try:
        impostor = node()
    finally:
        os.seteuid(0)
    here.links.reach([impostor.boot_id])
    assert not here.links.reaches(impostor.boot_id)

"""Sockets on the loopback: queues, limits, link facts, and bytes from strangers."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Iterator

import pytest
import zmq

from p2pinfer.errors import UsageError
from p2pinfer.transport import LinkEvent, LinkKind, PairLimits, Reply, SocketPair

LIMITS = PairLimits(max_message_bytes=1 << 16, send_hwm=8, recv_hwm=8)
DEADLINE_S = 10.0

MakePair = Callable[[], SocketPair]


@pytest.fixture
def make_pair() -> Iterator[MakePair]:
    """Makes socket pairs in one context and closes them all."""
    context = zmq.Context()
    pairs: list[SocketPair] = []

    def make() -> SocketPair:
        pairs.append(SocketPair(context, limits=LIMITS))
        return pairs[-1]

    yield make
    for pair in pairs:
        pair.shutdown()
    context.term()


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listening(pair: SocketPair) -> str:
    """Bind a pair and return its address."""
    port = free_port()
    pair.bind("127.0.0.1", port)
    return f"tcp://127.0.0.1:{port}"


class Watcher:
    """Collects what pairs see until a wanted thing is there."""

    def __init__(self, *pairs: SocketPair) -> None:
        self.pairs = pairs
        self.events: list[LinkEvent] = []
        self.received: list[tuple[bytes, bytes]] = []
        self.answers: list[tuple[str, bytes]] = []

    def until(self, wanted: Callable[[], bool], *, within: float = DEADLINE_S) -> None:
        deadline = time.monotonic() + within
        while not wanted():
            assert time.monotonic() < deadline, (self.events, self.received, self.answers)
            poller = zmq.Poller()
            for pair in self.pairs:
                for each in pair.pollables():
                    poller.register(each, zmq.POLLIN)
            poller.poll(20)
            for pair in self.pairs:
                self.events += pair.events()
                self.answers += pair.receive_answers()
                while (received := pair.receive()) is not None:
                    self.received.append(received)

    def saw(self, address: str, kind: LinkKind) -> Callable[[], bool]:
        return lambda: LinkEvent(address, kind) in self.events


def test_a_frame_arrives_and_its_route_takes_the_answer(make_pair: MakePair) -> None:
    """What is sent on a link comes with a route, and a reply to it comes back on that link."""
    near, far = make_pair(), make_pair()
    address = listening(far)
    near.open(address)
    watcher = Watcher(near, far)
    watcher.until(watcher.saw(address, LinkKind.UP))
    assert near.send(address, b"hello")
    watcher.until(lambda: bool(watcher.received))
    route, frame = watcher.received[0]
    assert frame == b"hello"
    assert far.reply(route, memoryview(b"welcome")) is Reply.SENT
    watcher.until(lambda: watcher.answers == [(address, b"welcome")])


def test_open_and_close_are_idempotent_and_change_the_version(make_pair: MakePair) -> None:
    """Opening twice is one link; closing twice is one closing; `version` tells of each change."""
    pair = make_pair()
    address = f"tcp://127.0.0.1:{free_port()}"
    pair.open(address)
    pair.open(address)
    assert (pair.addresses, pair.version, len(pair.pollables())) == ((address,), 1, 4)
    pair.close(address)
    pair.close(address)
    assert (pair.addresses, pair.version, len(pair.pollables())) == ((), 2, 2)
    pair.shutdown()
    pair.shutdown()


def test_a_frame_for_nobody_is_not_queued(make_pair: MakePair) -> None:
    """Sending fails at once without a link, and on a link that is not connected."""
    pair = make_pair()
    address = f"tcp://127.0.0.1:{free_port()}"
    assert not pair.send(address, b"x")
    pair.open(address)
    assert not pair.send(address, b"x")


def test_a_refused_connect_is_told_and_tried_again(make_pair: MakePair) -> None:
    """A link to a port where nobody listens says RETRIED, and comes up when somebody does."""
    pair, late = make_pair(), make_pair()
    port = free_port()
    address = f"tcp://127.0.0.1:{port}"
    pair.open(address)
    watcher = Watcher(pair, late)
    watcher.until(watcher.saw(address, LinkKind.RETRIED))
    late.bind("127.0.0.1", port)
    watcher.until(watcher.saw(address, LinkKind.UP))


def test_a_full_queue_is_a_value_and_not_a_hang(make_pair: MakePair) -> None:
    """A peer that never reads makes `send` return False after a bounded number of frames."""
    near, far = make_pair(), make_pair()
    address = listening(far)
    near.open(address)
    watcher = Watcher(near)
    watcher.until(watcher.saw(address, LinkKind.UP))
    frame = bytes(LIMITS.max_message_bytes)
    began = time.monotonic()
    sent = 0
    while near.send(address, frame):
        sent += 1
        assert sent < 10_000
    assert sent >= LIMITS.send_hwm
    assert time.monotonic() - began < DEADLINE_S


def test_a_client_that_never_reads_fills_its_route_only(make_pair: MakePair) -> None:
    """Replies to a client that does not read become FULL, while another's are still SENT."""
    node, idle, other = make_pair(), make_pair(), make_pair()
    address = listening(node)
    idle.open(address)
    other.open(address)
    idle_watcher, watcher = Watcher(idle), Watcher(node, other)
    idle_watcher.until(idle_watcher.saw(address, LinkKind.UP))
    assert idle.send(address, b"idle")
    watcher.until(lambda: len(watcher.received) == 1)
    watcher.until(watcher.saw(address, LinkKind.UP))
    assert other.send(address, b"other")
    watcher.until(lambda: len(watcher.received) == 2)
    (idle_route, _), (other_route, _) = watcher.received
    frame = bytes(LIMITS.max_message_bytes)
    replies = 0
    while (reply := node.reply(idle_route, frame)) is Reply.SENT:
        replies += 1
        assert replies < 10_000
    assert reply is Reply.FULL
    assert node.reply(other_route, b"y") is Reply.SENT
    watcher.until(lambda: (address, b"y") in watcher.answers)


def test_a_reply_to_a_connection_that_is_gone_says_so(make_pair: MakePair) -> None:
    """The route of a closed connection is GONE, and a new connection is another route."""
    node, client = make_pair(), make_pair()
    address = listening(node)
    client.open(address)
    watcher = Watcher(node, client)
    watcher.until(watcher.saw(address, LinkKind.UP))
    client.send(address, b"first")
    watcher.until(lambda: len(watcher.received) == 1)
    client.close(address)
    watcher.until(watcher.saw("", LinkKind.DOWN))
    first = watcher.received[0][0]
    watcher.until(lambda: node.reply(first, b"x") is Reply.GONE)
    client.open(address)
    watcher.until(lambda: client.send(address, b"second"))
    watcher.until(lambda: len(watcher.received) == 2)
    assert watcher.received[1][0] != first


def test_a_lost_link_is_down_and_comes_up_again(make_pair: MakePair) -> None:
    """When the peer's process goes, its link is DOWN; when a new one listens, it is UP again."""
    near, far, successor = make_pair(), make_pair(), make_pair()
    address = listening(far)
    near.open(address)
    watcher = Watcher(near)
    watcher.until(watcher.saw(address, LinkKind.UP))
    far.shutdown()
    watcher.until(watcher.saw(address, LinkKind.DOWN))
    watcher.until(lambda: not near.send(address, b"x"))
    successor.bind("127.0.0.1", int(address.rsplit(":", 1)[1]))
    watcher.until(lambda: watcher.events.count(LinkEvent(address, LinkKind.UP)) == 2)
    assert near.send(address, b"x")


def test_an_oversize_frame_drops_the_connection_only(make_pair: MakePair) -> None:
    """A frame over the limit is never delivered; its connection ends and the node lives on."""
    node = make_pair()
    address = listening(node)
    context = zmq.Context()
    with context.socket(zmq.DEALER) as hostile:
        hostile.setsockopt(zmq.LINGER, 0)
        hostile.connect(address)
        hostile.send(bytes(LIMITS.max_message_bytes + 1))
        watcher = Watcher(node)
        watcher.until(watcher.saw("", LinkKind.DOWN))
    context.term()
    assert watcher.received == []
    client = make_pair()
    client.open(address)
    watcher = Watcher(node, client)
    watcher.until(lambda: client.send(address, b"honest"))
    watcher.until(lambda: [frame for _, frame in watcher.received] == [b"honest"])


def test_multipart_messages_are_dropped_and_counted(make_pair: MakePair) -> None:
    """A message of several frames, in either direction, is no message of ours."""
    node, client = make_pair(), make_pair()
    address = listening(node)
    client.open(address)
    watcher = Watcher(node, client)
    watcher.until(lambda: client.send(address, b"one"))
    watcher.until(lambda: len(watcher.received) == 1)
    context = zmq.Context()
    with context.socket(zmq.DEALER) as hostile:
        hostile.setsockopt(zmq.LINGER, 0)
        hostile.connect(address)
        hostile.send_multipart([b"two", b"parts"])
        watcher.until(lambda: node.malformed == 1)
    context.term()
    node.router.send_multipart([watcher.received[0][0], b"two", b"parts"])
    watcher.until(lambda: client.malformed == 1)
    assert len(watcher.received) == 1
    assert watcher.answers == []


@pytest.mark.parametrize("noise", [b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 512, bytes(512)])
def test_random_bytes_on_the_port_do_no_harm(make_pair: MakePair, noise: bytes) -> None:
    """Bytes that are no ZMTP yield no frame, and others are served meanwhile."""
    node, client = make_pair(), make_pair()
    address = listening(node)
    watcher = Watcher(node, client)
    with socket.create_connection(("127.0.0.1", int(address.rsplit(":", 1)[1])), 5) as stranger:
        stranger.sendall(noise)
        client.open(address)
        watcher.until(lambda: client.send(address, b"honest"))
        watcher.until(lambda: [frame for _, frame in watcher.received] == [b"honest"])
    watcher.until(lambda: any(event.address == "" for event in watcher.events))


def test_a_peer_that_is_no_zeromq_fails_the_handshake(make_pair: MakePair) -> None:
    """A link to another program's port says HANDSHAKE_FAILED, never UP."""
    pair = make_pair()
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        pair.open(address)
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"\xff" * 64)
            watcher = Watcher(pair)
            watcher.until(watcher.saw(address, LinkKind.HANDSHAKE_FAILED))
    assert LinkEvent(address, LinkKind.UP) not in watcher.events


def test_a_taken_port_is_a_usage_error(make_pair: MakePair) -> None:
    """The error names the port and says what to do."""
    first, second = make_pair(), make_pair()
    port = int(listening(first).rsplit(":", 1)[1])
    with pytest.raises(UsageError, match=rf"port {port} is taken on 127\.0\.0\.1.*--listen"):
        second.bind("127.0.0.1", port)


def test_a_foreign_address_cannot_be_listened_on(make_pair: MakePair) -> None:
    """An address of no interface here is a usage error, for IPv4 and IPv6."""
    pair = make_pair()
    with pytest.raises(UsageError, match=r"cannot listen on 192\.0\.2\.1:7720"):
        pair.bind("192.0.2.1", 7720)
    with pytest.raises(UsageError, match=r"cannot listen on \[2001:db8::1\]:7720"):
        pair.bind("2001:db8::1", 7720)


def test_a_broken_address_is_a_usage_error(make_pair: MakePair) -> None:
    """An address that libzmq cannot read names itself, and leaves no link behind."""
    pair = make_pair()
    with pytest.raises(UsageError, match="cannot connect to tcp://nowhere"):
        pair.open("tcp://nowhere")
    assert pair.addresses == ()


def test_ipv6_is_spoken_where_the_machine_has_it(make_pair: MakePair) -> None:
    """A literal IPv6 address can be listened on and connected to."""
    node, client = make_pair(), make_pair()
    port = free_port()
    try:
        with socket.create_server(("::1", port), family=socket.AF_INET6):
            pass
    except OSError:
        pytest.skip("no IPv6 loopback here")
    node.bind("::1", port)
    client.open(f"tcp://[::1]:{port}")
    watcher = Watcher(node, client)
    watcher.until(watcher.saw(f"tcp://[::1]:{port}", LinkKind.UP))

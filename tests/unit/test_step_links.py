"""Step links of two nodes in one process: which way frames go, and what a broken one means."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterator
from itertools import count

import msgspec
import pytest
import zmq

from p2pinfer.cluster import free_base_port
from p2pinfer.core.topology import topology
from p2pinfer.limits import MAX_STEP_BYTES
from p2pinfer.local_links import local_address
from p2pinfer.step_links import STEP_PORT_OFFSET, LinkBroken, StepLinks
from p2pinfer.transport import PairLimits, SocketPair
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import LinkOpen, Slot, Step, StepAck
from tests.step_plans import plan_of

DEADLINE_S = 20.0
LIMITS = PairLimits(MAX_STEP_BYTES, 64, 64)
BOOTS = count(1)


class Pair:
    """Two nodes of a plan, the first of which leads; in one thread."""

    def __init__(self, *, local: tuple[bool, bool] = (True, True)) -> None:
        plan, base = plan_of(2), free_base_port(2)
        members = [
            msgspec.structs.replace(
                member,
                address=f"tcp://127.0.0.1:{base + 10 * i}",
                boot_id=f"{os.getpid():08x}{next(BOOTS):08x}",
            )
            for i, member in enumerate(plan.members)
        ]
        self.plan = msgspec.structs.replace(plan, members=tuple(members))
        self.context = zmq.Context()
        self.silence, self.order = os.pipe()
        self.interrupted = 0
        self.nodes = [self._node(index, on=on) for index, on in enumerate(local)]

    def _node(self, index: int, *, on: bool) -> StepLinks:
        member = self.plan.members[index]
        pair = SocketPair(self.context, limits=LIMITS)
        port = int(member.address.rsplit(":", 1)[1])
        links = StepLinks(
            pair,
            (member.node_id, member.boot_id),
            pipe_fd=self.silence,
            interrupt=self._interrupt,
            on_pause=lambda: None,
        )
        links.bind("127.0.0.1", port + STEP_PORT_OFFSET, local=on)
        return links

    def _interrupt(self) -> None:
        self.interrupted += 1

    def adopt(self, epoch: int) -> Plan:
        """Put the plan in force on both, under this epoch."""
        plan = msgspec.structs.replace(self.plan, fence=Fence(1, epoch))
        for links, mine in ((links, topology(plan, i)) for i, links in enumerate(self.nodes)):
            links.reach(mine)
            links.open(mine)
        for index, links in enumerate(self.nodes):
            links.activate(topology(plan, index))
            links.begin(1, DEADLINE_S)
        return plan

    def step(self, plan: Plan) -> None:
        """The leader announces a step, the other one acknowledges it: both come."""
        leader, follower = self.nodes
        acked: list[tuple[int, int]] = []
        leader.on_ack = lambda *ack: acked.append(ack)
        slot = Slot(request_id=1, start=0, tokens=(1,))
        number = leader.next_sequence(1)
        leader.send(1, Step(fence=plan.fence, step=1, link_seq=number, slots=(slot,)))
        self.until(lambda: bool(follower.inbox.steps), follower)
        follower.inbox.steps.clear()
        number = follower.next_sequence(0)
        follower.send(0, StepAck(fence=plan.fence, step=1, link_seq=number))
        self.until(lambda: acked == [(1, 1)], leader)

    def until(self, wanted: Callable[[], bool], *nodes: StepLinks) -> None:
        """Let these nodes wait for frames until it is so."""
        deadline = time.monotonic() + DEADLINE_S
        while not wanted():
            assert time.monotonic() < deadline
            for each in nodes:
                each.idle(0.01)

    @property
    def local_messages(self) -> list[int]:
        """How many frames each has sent over its local link."""
        return [each.traffic.local_messages for each in self.nodes]

    def close(self) -> None:
        """Close all sockets."""
        for each in self.nodes:
            each.shutdown()
        self.context.term()
        os.close(self.silence)
        os.close(self.order)


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two nodes with local links."""
    made = Pair()
    yield made
    made.close()


def test_peers_of_one_machine_exchange_over_local_links(pair: Pair) -> None:
    """All frames of a fence, in both directions, and those of the next fence too."""
    for epoch in (1, 2):
        pair.step(pair.adopt(epoch))
        assert pair.local_messages == [epoch, epoch]
    assert [each.traffic.messages for each in pair.nodes] == [2, 2]
    assert [each.traffic.dropped for each in pair.nodes] == [0, 0]
    assert all(each.heard_within(DEADLINE_S) for each in pair.nodes)


@pytest.mark.parametrize("on", [(True, False), (False, True), (False, False)])
def test_where_one_of_them_has_none_all_goes_over_tcp(on: tuple[bool, bool]) -> None:
    """It is no error."""
    pair = Pair(local=on)
    try:
        pair.step(pair.adopt(1))
        assert pair.local_messages == [0, 0]
    finally:
        pair.close()


def test_a_link_that_breaks_breaks_the_step_and_the_next_plan_goes_over_tcp(pair: Pair) -> None:
    """On both sides, and for good with that boot of the peer."""
    pair.step(pair.adopt(1))
    leader, follower = pair.nodes
    leader.local.shutdown()
    with pytest.raises(LinkBroken) as broken:
        pair.until(lambda: False, follower)
    assert broken.value.node_id == pair.plan.members[0].node_id
    assert follower.lost == [pair.plan.members[0].node_id]
    slot = Slot(request_id=1, start=0, tokens=(1,))
    step = Step(fence=Fence(1, 1), step=2, link_seq=leader.next_sequence(1), slots=(slot,))
    with pytest.raises(LinkBroken, match="takes no frame"):
        leader.send(1, step)
    for epoch in (2, 3):
        pair.step(pair.adopt(epoch))
    assert pair.local_messages == [1, 1]


def test_orders_are_looked_for_while_frames_come(pair: Pair) -> None:
    """However many there are, and none of them is waited for."""
    plan = pair.adopt(1)
    leader, follower = pair.nodes
    leader.pump()
    os.write(pair.order, b"!")
    ack = StepAck(fence=plan.fence, step=1, link_seq=0)
    deadline = time.monotonic() + DEADLINE_S
    while not pair.interrupted:
        assert time.monotonic() < deadline
        number = follower.next_sequence(0)
        follower.send(0, msgspec.structs.replace(ack, link_seq=number))
        leader.idle(DEADLINE_S)


def speak(pair: Pair, to: int, *frames: bytes) -> socket.socket:
    """A connection of our own to a node, and what is said on it."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    link.connect(local_address(pair.plan.members[to].boot_id))
    for frame in frames:
        link.sendall(frame)
    return link


def opening(pair: Pair, fence: Fence, boot_id: str = "") -> bytes:
    """The leader's LINK_OPEN, or that of another boot of it."""
    leader = pair.plan.members[0]
    return encode(LinkOpen(node_id=leader.node_id, boot_id=boot_id or leader.boot_id, fence=fence))


def announced(fence: Fence, number: int = 0) -> bytes:
    """A STEP."""
    slot = Slot(request_id=1, start=0, tokens=(1,))
    return encode(Step(fence=fence, step=1, link_seq=number, slots=(slot,)))


@pytest.mark.parametrize(
    ("boot_id", "fence"), [("e" * 16, Fence(1, 2)), ("", Fence(1, 1))], ids=["boot", "fence"]
)
def test_frames_of_another_boot_or_an_older_fence_are_dropped(boot_id: str, fence: Fence) -> None:
    """As on any link; the step goes on."""
    pair = Pair(local=(False, True))
    try:
        pair.adopt(1)
        plan = pair.adopt(2)
        follower = pair.nodes[1]
        with speak(pair, 1, opening(pair, fence, boot_id), announced(fence)):
            pair.until(lambda: follower.traffic.dropped == 1, follower)
            assert not follower.inbox.steps
            pair.step(plan)
    finally:
        pair.close()


def test_bytes_that_are_no_frame_are_counted_and_end_the_link() -> None:
    """Whoever sent them before anything else did no harm; from a member they break the step."""
    pair = Pair(local=(False, True))
    try:
        plan = pair.adopt(1)
        follower = pair.nodes[1]
        with speak(pair, 1, b"GET / HTTP/1.1\r\n\r\n") as stranger:
            pair.until(lambda: follower.traffic.dropped == 1, follower)
            assert stranger.recv(1) == b""
        pair.step(plan)
        with speak(pair, 1, opening(pair, plan.fence), b"GET / HTTP/1.1\r\n\r\n"):
            with pytest.raises(LinkBroken, match="broke"):
                pair.until(lambda: False, follower)
            assert follower.traffic.dropped == 2
    finally:
        pair.close()


def test_what_is_lost_between_two_ways_breaks_the_step() -> None:
    """Frames are numbered over both: none can overtake another unseen."""
    pair = Pair(local=(False, True))
    try:
        plan = pair.adopt(1)
        follower = pair.nodes[1]
        frames = (opening(pair, plan.fence), announced(plan.fence, number=1))
        with (
            speak(pair, 1, *frames),
            pytest.raises(LinkBroken, match="frame 1 came where 0 was due"),
        ):
            pair.until(lambda: False, follower)
    finally:
        pair.close()

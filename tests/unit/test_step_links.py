"""Step links of two nodes in one process: which way frames go, and what a broken one means."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator

import msgspec
import pytest

from p2pinfer.errors import LinkBroken
from p2pinfer.local_links import local_address
from p2pinfer.types import Fence
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import LinkOpen, Slot, Step, StepAck
from tests.step_pair import DEADLINE_S, Pair


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

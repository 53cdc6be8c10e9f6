"""Bulk links: whose frames count, and what becomes of early, late and foreign ones."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
import pytest
import zmq

from p2pinfer.bulk_links import MAX_EARLY, Arrival
from p2pinfer.core.step_gate import MAX_STRANGERS
from p2pinfer.types import Fence, Plan
from p2pinfer.wire.codec import encode
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest, LinkOpen
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.bulk_bench import Bench, Node, plan_of, until

STANDBYS = ((1,), (1,), (0,), (0,))
"""Of two members each keeps replicas for the other."""


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Closes all sockets at the end."""
    made = Bench()
    yield made
    made.close()


def delta(plan: Plan, sender: int, fence: Fence | None = None) -> KvDelta:
    """KV of one position."""
    model = plan.model
    shape = (model.num_layers, 2, 1, model.head_dim)
    return KvDelta(
        fence=fence or plan.fence,
        step=0,
        link_seq=0,
        sender=sender,
        request_id=1,
        stage=0,
        unit=0,
        start=0,
        log_digest="0" * 64,
        tensor=Tensor(WireDType.FLOAT32, shape, bytes(8 * model.num_layers * model.head_dim)),
    )


def next_of(node: Node, *others: Node) -> Arrival:
    """The next frame that a member takes off its socket."""
    found: list[Arrival] = []

    def came() -> bool:
        arrival = node.links.receive()
        found.extend([arrival] if arrival else [])
        return bool(found)

    until(came, node, *others, turn=False)
    return found[0]


def next_message(node: Node, *others: Node) -> Arrival:
    """The next frame that counts, other than a LINK_OPEN."""
    while (arrival := next_of(node, *others)).message is None or isinstance(
        arrival.message, LinkOpen
    ):
        pass
    return arrival


def connected(one: Node, other: Node) -> None:
    """Wait until a member's link is up."""
    until(lambda: one.links.ready(other.me), one, other, turn=False)


def test_a_frame_comes_with_its_sender(bench: Bench) -> None:
    """Both ways, once the plan is in force; only KV counts as traffic."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    for node in (one, other):
        node.links.activate()
    connected(one, other)
    connected(other, one)
    credit = Credit(fence=plan.fence, bytes=5)
    frame = delta(plan, sender=0)
    assert one.links.send(1, frame)
    assert other.links.send(0, credit)
    arrival = next_message(other, one)
    assert (arrival.sender, arrival.message) == (0, frame)
    assert one.links.traffic.sent_bytes == len(encode(frame)) == arrival.nbytes
    assert other.links.traffic.received_bytes == arrival.nbytes
    arrival = next_message(one, other)
    assert (arrival.sender, arrival.message) == (1, credit)
    assert other.links.traffic.sent_bytes == one.links.traffic.dropped == 0


def test_frames_are_numbered_by_receiver(bench: Bench) -> None:
    """From 0 in every plan."""
    plan = plan_of(3, ((1,), (2,), (0,), (0,)))
    node = bench.node(plan, 0)
    assert [node.links.next_number(m) for m in (1, 1, 2, 1)] == [0, 1, 0, 2]
    node.load(plan)
    assert node.links.next_number(1) == 0


def test_without_a_link_nothing_is_sent(bench: Bench) -> None:
    """What a link does not take is lost at once: nothing is queued for a node that is away."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    other.pair.shutdown()
    one.links.activate()
    assert not one.links.send(1, delta(plan, sender=0))
    assert one.links.traffic.sent_bytes == 0


def test_a_full_link_takes_no_more() -> None:
    """Nobody reads: the sender learns that its frame is lost, and goes on."""
    bench = Bench(hwm=2)
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    connected(one, other)
    tensor = Tensor(WireDType.FLOAT32, (1, 2, 1 << 13, 16), bytes(1 << 20))
    frame = msgspec.structs.replace(delta(plan, sender=0), tensor=tensor)
    until(lambda: not one.links.send(1, frame), one, turn=False)
    bench.close()


def test_only_members_that_exchange_kv_are_connected(bench: Bench) -> None:
    """A third one, of which nobody keeps anything, is left alone; the next plan may need it."""
    plan = plan_of(4, ((1,), (0,), (), ()))
    one = bench.nodes(plan)[0]
    assert [address.rpartition(":")[2] for address in one.pair.addresses] == [
        str(int(plan.members[1].address.rpartition(":")[2]) + 2)
    ]
    stage = msgspec.structs.replace(plan.stages[0], head_standbys=((3,), (0,), (), ()))
    one.load(msgspec.structs.replace(plan, stages=(stage,), fence=Fence(1, 2)))
    ports = {int(address.rpartition(":")[2]) for address in one.pair.addresses}
    assert ports == {int(plan.members[i].address.rpartition(":")[2]) + 2 for i in (1, 3)}


# --- what does not count --------------------------------------------------------------------------


@pytest.mark.parametrize("why", ["fence", "sender", "stranger", "bystander", "unopened", "bytes"])
def test_what_does_not_count_is_dropped(bench: Bench, why: str) -> None:
    """Frames of another fence, with another's name, from a node outside the plan or one with which
    it exchanges nothing, on a link that nobody opened, and bytes that are no frame."""
    plan = plan_of(3, ((1,), (1,), (0,), ()))
    node = bench.nodes(plan)[1]
    node.links.activate()
    life = {"fence": 0, "sender": 0, "bystander": 2}.get(why)
    opening = LinkOpen(
        node_id="f" * 16 if life is None else plan.members[life].node_id,
        boot_id="f" * 16 if life is None else plan.members[life].boot_id,
        fence=plan.fence,
    )
    bad = delta(plan, sender=2 if why in ("sender", "bystander") else 0)
    if why == "fence":
        bad = delta(plan, sender=0, fence=Fence(1, 7))
    pair = bench.pair()
    address = f"tcp://127.0.0.1:{int(plan.members[1].address.rpartition(':')[2]) + 2}"
    pair.open(address)
    if why != "unopened":
        until(lambda: pair.send(address, encode(opening)), node, turn=False)
    frame = b"P2PI" + bytes(60) if why == "bytes" else encode(bad)
    until(lambda: pair.send(address, frame), node, turn=False)
    arrivals = [next_of(node) for _ in range(1 if why == "unopened" else 2)]
    assert arrivals[-1] == Arrival(len(frame))
    assert node.links.traffic.dropped == 1


def test_without_a_plan_all_is_dropped(bench: Bench) -> None:
    """But it stays known whose each link is: the next plan may be of the same members."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    connected(one, other)
    other.links.close()
    assert one.links.send(1, delta(plan, sender=0))
    while other.links.traffic.dropped == 0:
        next_of(other, one)
    again = msgspec.structs.replace(plan, fence=Fence(1, 2))
    for node in (one, other):
        node.load(again)
        node.links.activate()
    assert one.links.send(1, delta(again, sender=0))
    assert next_message(other, one).sender == 0


def test_strangers_are_remembered_up_to_a_bound(bench: Bench) -> None:
    """However many open links, those of members stay known."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    for node in (one, other):
        node.links.activate()
    connected(one, other)
    pair = bench.pair()
    address = f"tcp://127.0.0.1:{int(plan.members[1].address.rpartition(':')[2]) + 2}"
    for number in range(MAX_STRANGERS + 3):
        pair.close(address)
        pair.open(address)
        life = f"{number + 100:016x}"
        opening = encode(LinkOpen(node_id=life, boot_id=life, fence=plan.fence))
        until(lambda opening=opening: pair.send(address, opening), other, turn=False)  # type: ignore[misc]
        next_of(other, one)
    next_of(other, one)
    assert other.links.known_routes == MAX_STRANGERS + 1
    assert one.links.send(1, delta(plan, sender=0))
    assert next_message(other, one).sender == 0


# --- early, late, again ---------------------------------------------------------------------------


def test_what_is_granted_before_a_plan_is_in_force_is_kept(bench: Bench) -> None:
    """A standby may be in force a moment before the owner; KV cannot come so early."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    connected(one, other)
    credit = Credit(fence=plan.fence, bytes=7)
    question = KvRequest(
        fence=plan.fence, request_id=1, stage=0, unit=2, start=0, end=5, credit=500
    )
    sent = [credit, question, delta(plan, sender=0), *[credit] * MAX_EARLY]
    for message in sent:
        assert one.links.send(1, message)
    arrivals = [next_of(other, one) for _ in range(len(sent) + 1)]
    assert not any(arrival.message for arrival in arrivals)
    assert other.links.traffic.dropped == 3
    other.links.activate()
    kept = [next_of(other).message for _ in range(MAX_EARLY)]
    assert kept == [credit, question, *[credit] * (MAX_EARLY - 2)]
    assert other.links.receive() is None


def test_a_link_that_comes_back_is_opened_again(bench: Bench) -> None:
    """The sender learns that it began anew, and so does the receiver."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    connected(one, other)
    one.links.activate()
    assert one.links.begun() == frozenset()
    other.pair.shutdown()
    until(lambda: not one.links.send(1, delta(plan, sender=0)), one, turn=False)
    again = bench.node(plan, 1)
    again.links.activate()
    # That frames are taken says nothing: the link may be back before it is noticed that it broke.
    begun: set[int] = set()
    until(lambda: begun.update(one.links.begun()) or begun, one, again, turn=False)
    assert begun == {1}
    assert one.links.begun() == frozenset()
    until(lambda: one.links.send(1, delta(plan, sender=0)), one, again, turn=False)
    # Frames that went before the break was noticed are lost: nobody had said whose they are.
    while not isinstance(next_of(again, one).message, LinkOpen):
        pass
    assert isinstance(next_of(again, one).message, KvDelta)


def test_a_new_link_takes_the_place_of_the_old_one(bench: Bench) -> None:
    """What still comes on the one before is dropped: its sender has begun anew."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    other.links.activate()
    connected(one, other)
    next_of(other, one)
    pair = bench.pair()
    address = f"tcp://127.0.0.1:{int(plan.members[1].address.rpartition(':')[2]) + 2}"
    pair.open(address)
    member = plan.members[0]
    opening = LinkOpen(node_id=member.node_id, boot_id=member.boot_id, fence=plan.fence)
    until(lambda: pair.send(address, encode(opening)), other, turn=False)
    assert next_of(other, one) == Arrival(len(encode(opening)), 0, opening)
    assert one.links.send(1, delta(plan, sender=0))
    assert next_of(other, one).message is None
    assert other.links.traffic.dropped == 1
    assert pair.send(address, encode(delta(plan, sender=0)))
    assert next_of(other, one).sender == 0


def test_what_a_member_sent_before_it_ended_is_still_read(bench: Bench) -> None:
    """Its last words are what its standby goes on from."""
    plan = plan_of(2, STANDBYS)
    one, other = bench.nodes(plan)
    other.links.activate()
    connected(one, other)
    for _ in range(20):
        assert one.links.send(1, delta(plan, sender=0))
    # In a true death the frames have left libzmq; here they have to be waited for.
    assert isinstance(next_of(other, one).message, LinkOpen)
    until(lambda: other.pair.router.getsockopt(zmq.EVENTS) & zmq.POLLIN, turn=False)
    one.pair.shutdown(linger_ms=2000)
    for _ in range(20):
        assert next_of(other).sender == 0

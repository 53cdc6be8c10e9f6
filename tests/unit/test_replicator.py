"""Delta KV over true links: replicas follow their owners, step by step and whatever was missed."""

from __future__ import annotations

import time
from collections.abc import Iterator

import msgspec
import numpy as np
import pytest

from p2pinfer import replicator
from p2pinfer.core.coverage import KvUnit
from p2pinfer.core.units import kv_bytes_per_position
from p2pinfer.replicator import DRAIN_S, IDLE_AFTER_S, SEND_ROWS, STEP_FRAMES, partners
from p2pinfer.types import Fence
from p2pinfer.wire.messages import Credit, KvDelta, KvRequest
from p2pinfer.wire.tensors import Tensor, WireDType
from tests.bulk_bench import MODEL, SPAN, Bench, Node, plan_of, run, slot, until

STANDBYS = ((1,), (1,), (0,), (0,))
"""Of two members each owns two units, and keeps replicas of the other's."""

HEADS = 16 + 48 + 48
"""The header of a frame, the data header, and that of KV."""

ROW = kv_bytes_per_position(MODEL, MODEL.num_layers)


@pytest.fixture
def bench() -> Iterator[Bench]:
    """Closes all sockets at the end."""
    made = Bench()
    yield made
    made.close()


def in_force(bench: Bench, *, granted: bool = True) -> list[Node]:
    """Two members that exchange KV; with `granted` they have each other's credit already."""
    plan = plan_of(2, STANDBYS)
    nodes = bench.nodes(plan)
    for node in nodes:
        until(lambda node=node: node.links.ready(1 - node.me), *nodes, turn=False)  # type: ignore[misc]
    for node in nodes:
        node.activate()
        if granted:
            node.replicator.turn()
    if granted:
        # A link's LINK_OPEN, and the grant.
        for node in nodes:
            until(lambda node=node: node.taken >= 2, *nodes)  # type: ignore[misc]
    return nodes


def same(nodes: list[Node], unit: int, positions: int, request_id: int = 1) -> bool:
    """Whether the replica's rows are those of the owner."""
    owner, standby = (nodes[0], nodes[1]) if unit < 2 else (nodes[1], nodes[0])
    key = KvUnit(SPAN, unit)
    mine, its = owner.rows.of(key, request_id), standby.rows.of(key, request_id)
    return np.array_equal(mine[:, :, :positions], its[:, :, :positions]) and bool(mine.any())


def test_partners_are_owners_and_standbys() -> None:
    """Those that keep replicas for a member, and those for which it keeps some."""
    plan = plan_of(4, ((1, 2), (0,), (), ()))
    assert [partners(plan, member) for member in range(4)] == [{1, 2}, {0}, {0}, set()]


def test_a_replica_follows_step_by_step(bench: Bench) -> None:
    """What a step has written is at the standby before the step after the next."""
    nodes = in_force(bench)
    run(nodes, slot(0, 5))
    for position in range(5, 9):
        run(nodes, slot(position, 1))
    until(lambda: all(node.covers(unit) == 9 for node in nodes for unit in range(4)), *nodes)
    assert all(same(nodes, unit, 9) for unit in range(4))
    for node in nodes:
        assert node.replicator.lacking == 0
        assert node.links.traffic.dropped == 0
        # Of each unit all rows, in at most as many frames as steps.
        heads = node.links.traffic.sent_bytes - 2 * 9 * ROW
        assert heads % (2 * HEADS) == 0
        assert 1 <= heads // (2 * HEADS) <= 5
        assert node.links.traffic.received_bytes == node.links.traffic.sent_bytes


def test_what_a_standby_missed_it_asks_for(bench: Bench) -> None:
    """It has the tokens, and no KV at all of what was computed before it was there."""
    nodes = in_force(bench)
    one, other = nodes
    step = one.begin(slot(0, 60))
    one.rows.closed.add(1)
    one.finish(step)
    other.finish(other.begin(slot(0, 60)))
    until(lambda: not one.replicator.turn() and not other.replicator.turn(), *nodes)
    assert (one.covers(2), one.covers(0)) == (0, 60)
    one.rows.closed.clear()
    run(nodes, slot(60, 1))
    assert one.replicator.lacking == 2 * 60
    until(lambda: min(one.covers(2), one.covers(3)) == 61, *nodes)
    assert same(nodes, 2, 61)
    assert same(nodes, 3, 61)


def test_without_credit_nothing_is_sent(bench: Bench) -> None:
    """An owner that nobody has granted anything keeps what it has, and is asked for it."""
    nodes = in_force(bench, granted=False)
    one, other = nodes
    one.finish(one.begin(slot(0, 5)))
    one.replicator.turn()
    assert one.links.traffic.sent_bytes == 0
    other.finish(other.begin(slot(0, 5)))
    run(nodes, slot(5, 1))
    until(lambda: other.covers(0) == other.covers(1) == 6, *nodes)


def test_requests_take_turns_and_their_positions_wait_together(bench: Bench) -> None:
    """With more requests and units than one step has room for, each goes every so many steps."""
    nodes = in_force(bench)
    requests = range(1, STEP_FRAMES + 1)
    run(nodes, *(slot(0, 3, request_id=r) for r in requests))
    first = nodes[0].links.traffic.sent_bytes
    assert first == STEP_FRAMES * (HEADS + 3 * ROW)
    run(nodes, *(slot(3, 1, request_id=r) for r in requests))
    # The other half, of four positions each.
    assert nodes[0].links.traffic.sent_bytes - first == STEP_FRAMES * (HEADS + 4 * ROW)
    until(lambda: all(nodes[1].covers(u, r) == 4 for u in (0, 1) for r in requests), *nodes)
    assert all(same(nodes, 1, 4, request_id=r) for r in requests)


def test_a_standby_of_fast_steps_never_lacks_many(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Positions wait for one another, but no more of them than a standby may lack that is ready."""
    monkeypatch.setattr(replicator, "SEND_EVERY_S", 60.0)
    nodes = in_force(bench)
    run(nodes, slot(0, 5))
    first = nodes[0].links.traffic.sent_bytes
    for position in range(5, 5 + SEND_ROWS):
        assert nodes[0].links.traffic.sent_bytes == first
        run(nodes, slot(position, 1))
    assert nodes[0].links.traffic.sent_bytes == first + 2 * (HEADS + SEND_ROWS * ROW)


def test_an_ended_request_is_forgotten(bench: Bench) -> None:
    """What waits to be sent of it is dropped, and an id that is used again begins anew."""
    nodes = in_force(bench)
    steps = [node.begin(slot(0, 5)) for node in nodes]
    for node, step in zip(nodes, steps, strict=True):
        node.finish(step)
    run(nodes, ended=(1,))
    assert nodes[0].links.traffic.sent_bytes == 0
    run(nodes, slot(0, 3))
    until(lambda: all(node.covers(unit) == 3 for node in nodes for unit in range(4)), *nodes)


def test_a_link_that_begins_anew_brings_credit_and_questions(bench: Bench) -> None:
    """A member that lost its sockets and not its KV goes on where it was."""
    nodes = in_force(bench)
    one, other = nodes
    run(nodes, slot(0, 5))
    until(lambda: other.covers(0) == other.covers(1) == 5, *nodes)
    other.reconnect(bench.pair())
    run(nodes, slot(5, 1))
    run(nodes, slot(6, 1))
    until(lambda: other.covers(0) == other.covers(1) == 7, *nodes)
    until(lambda: one.covers(2) == one.covers(3) == 7, *nodes)
    assert all(same(nodes, unit, 7) for unit in range(4))


# --- room -----------------------------------------------------------------------------------------


def test_there_is_only_so_much_between_two_steps(bench: Bench) -> None:
    """Frames beyond a step's portion wait for the next; without steps there is more room."""
    nodes = in_force(bench)
    one, other = nodes
    run(nodes, slot(0, 1))
    until(lambda: one.covers(2) == one.covers(3) == 1, *nodes)
    credit = Credit(fence=other.plan.fence, bytes=1)
    for _ in range(200):
        assert other.links.send(0, credit)
    one.finish(one.begin(slot(1, 1)))
    until(lambda: not one.replicator.has_room, one)
    taken = one.taken
    ended = time.monotonic() + IDLE_AFTER_S / 2
    one.replicator.turn()  # which may send what the step has written
    assert one.taken == taken or time.monotonic() > ended, "more than there is room for"
    until(lambda: one.taken >= taken + 100, one)


def test_a_slow_step_leaves_room_for_more(bench: Bench) -> None:
    """In proportion to what it took."""
    nodes = in_force(bench)
    step = nodes[0].begin(*(slot(0, 1, request_id=r) for r in range(1, 2 * STEP_FRAMES)))
    began = time.monotonic()
    until(lambda: time.monotonic() > began + 0.2, turn=False)
    nodes[0].finish(step)
    nodes[0].replicator.turn()
    assert nodes[0].links.traffic.sent_bytes > 2 * STEP_FRAMES * ROW


# --- the end of a plan ----------------------------------------------------------------------------


def test_what_has_come_is_taken_when_a_plan_is_left(bench: Bench) -> None:
    """Also when steps were broken off before: the owner may be gone, and its KV with it."""
    nodes = in_force(bench)
    one, other = nodes
    run(nodes, slot(0, 5))
    until(lambda: other.covers(0) == other.covers(1) == 5, *nodes)
    step = one.begin(slot(5, 1))
    other.begin(slot(5, 1))
    sent = one.links.traffic.sent_bytes
    one.finish(step)
    until(lambda: one.links.traffic.sent_bytes > sent, one)
    other.replicator.halt()
    one.replicator.halt()
    sent = one.links.traffic.sent_bytes

    def drained() -> bool:
        other.replicator.drain()
        return other.covers(0) == other.covers(1) == 6

    until(drained)
    one.finish(one.begin(slot(6, 1)))
    one.replicator.turn()
    assert one.links.traffic.sent_bytes == sent


def test_nobody_holds_up_the_next_plan(bench: Bench) -> None:
    """Reading what comes under a plan that is left has an end, however much comes."""
    _, other = in_force(bench)
    other.links.endless = True
    began = time.monotonic()
    other.replicator.drain()
    assert DRAIN_S <= time.monotonic() - began < 10 * DRAIN_S


# --- what is not to be believed -------------------------------------------------------------------


def delta(node: Node, **changes: object) -> KvDelta:
    """KV of one position of unit 0, which member 0 owns."""
    shape = (MODEL.num_layers, 2, 1, MODEL.head_dim)
    digest = node.logs.digest(1, 6) or ""
    frame = KvDelta(
        fence=Fence(1, 1),
        step=0,
        link_seq=0,
        sender=0,
        request_id=1,
        stage=0,
        unit=0,
        start=5,
        log_digest=digest,
        tensor=Tensor(WireDType.FLOAT32, shape, bytes(4 * 2 * MODEL.num_layers * MODEL.head_dim)),
    )
    return msgspec.structs.replace(frame, **changes)


HALF = Tensor(
    WireDType.BFLOAT16,
    (MODEL.num_layers, 2, 1, MODEL.head_dim),
    bytes(2 * 2 * MODEL.num_layers * MODEL.head_dim),
)


@pytest.mark.parametrize(
    "bad",
    [
        {"unit": 2},
        {"stage": 1},
        {"tensor": HALF},
        {"log_digest": "0" * 64},
    ],
    ids=["unit", "stage", "format", "tokens"],
)
def test_kv_that_may_not_be_written_is_not(bench: Bench, bad: dict[str, object]) -> None:
    """Another's unit, a stage that there is not, another number format, another log's."""
    nodes = in_force(bench)
    one, other = nodes
    run(nodes, slot(0, 5))
    until(lambda: other.covers(0) == other.covers(1) == 5, *nodes)
    for node in nodes:
        node.begin(slot(5, 1))
    taken = other.taken
    assert one.links.send(1, delta(other, **bad))
    until(lambda: other.taken > taken, other)
    assert other.covers(0) == 5
    assert one.links.send(1, delta(other))
    until(lambda: other.covers(0) == 6, other)
    assert other.links.traffic.dropped == ("log_digest" not in bad)


def test_questions_and_credit_of_others_are_dropped(bench: Bench) -> None:
    """A unit that the asking member keeps no replica of, and credit from a mere owner."""
    plan = plan_of(2, ((1,), (1,), (), ()))
    one, other = bench.nodes(plan)
    for node in (one, other):
        until(lambda node=node: node.links.ready(1 - node.me), one, other, turn=False)  # type: ignore[misc]
        node.activate()
    question = KvRequest(fence=plan.fence, request_id=1, stage=0, unit=2, start=0, end=1, credit=9)
    assert other.links.send(0, question)
    assert one.links.send(1, Credit(fence=plan.fence, bytes=1))
    until(lambda: one.links.traffic.dropped == 1, one)
    until(lambda: other.links.traffic.dropped == 1, other)


def test_what_is_held_moves_nothing_and_is_asked_for_later(bench: Bench) -> None:
    """Held on all nodes, steps go on as without replicas; let go, standbys catch up."""
    nodes = in_force(bench)
    run(nodes, slot(0, 5))
    until(lambda: all(node.covers(unit) == 5 for node in nodes for unit in range(4)), *nodes)
    sent = [node.links.traffic.sent_bytes for node in nodes]
    for node in nodes:
        node.replicator.hold(True)
    for position in range(5, 30):
        run(nodes, slot(position, 1))
    assert not any(node.replicator.turn() or node.replicator.has_room for node in nodes)
    assert [node.links.traffic.sent_bytes for node in nodes] == sent
    assert [node.replicator.lacking for node in nodes] == [2 * 24, 2 * 24]
    for node in nodes:
        node.replicator.hold(False)
    run(nodes, slot(30, 1))
    assert nodes[0].replicator.lacking == 2 * 25
    until(lambda: all(node.covers(unit) == 31 for node in nodes for unit in range(4)), *nodes)
    assert all(same(nodes, unit, 31) for unit in range(4))

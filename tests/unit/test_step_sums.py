"""Sums over two nodes in one process: partials that were due, and whatever else comes."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations, product

import msgspec
import pytest
import torch

from p2pinfer.core.step_checks import SUM_DTYPES
from p2pinfer.core.topology import Topology, topology
from p2pinfer.errors import LinkBroken, StepBroken
from p2pinfer.inbox import Inbox
from p2pinfer.model.llama import TORCH_DTYPES
from p2pinfer.model.reduction import subtree_sums, whole_sum
from p2pinfer.model.runner import NeedSum
from p2pinfer.step_links import StepLinks
from p2pinfer.step_sums import KEPT_ROWS, StepSums
from p2pinfer.step_tensors import to_wire
from p2pinfer.types import DType, Plan
from p2pinfer.wire.codec import decode
from p2pinfer.wire.messages import Partial, Slot, Step, StepAck
from p2pinfer.wire.partial_frame import PartialFrame
from p2pinfer.wire.tensors import WireDType
from tests.model_specs import SIX_LAYERS
from tests.step_pair import DEADLINE_S, Pair
from tests.step_plans import plan_of

HIDDEN = SIX_LAYERS.hidden_size


@pytest.fixture
def pair() -> Iterator[Pair]:
    """Two nodes with local links, of which each has heard of the other."""
    made = Pair()
    plan = made.adopt(1)
    made.step(plan)
    yield made
    made.close()


def due(plan: Plan, sender: int, half: int = 0, rows: int = 1) -> PartialFrame:
    """The frame of a member's partial."""
    parts = topology(plan, 1 - sender).roles[0].parts[half][sender]
    return PartialFrame(plan.fence, (sender, 0, half), parts, WireDType.FLOAT32, (rows, HIDDEN))


def fill(frame: PartialFrame, byte: int) -> PartialFrame:
    """Something to know its tensor by."""
    frame.tensor.data[:] = bytes([byte]) * frame.tensor.nbytes  # type: ignore[index]
    return frame


def arrives(links: StepLinks, frame: PartialFrame, step: int, layer: int) -> bool:
    """Whether the leader's partial comes as it is due."""
    return links.receive_due(0, frame, step, layer, 0.0)


def test_a_partial_that_is_due_comes_into_the_memory_for_it(pair: Pair) -> None:
    """Without passing the inbox; after it others come in order, by either way."""
    plan, (leader, follower) = pair.plan, pair.nodes
    into = due(plan, 0)
    for layer in range(3):
        leader.send_partial(1, fill(due(plan, 0), 10 + layer), 1, layer)
        follower.heard_within(-1.0)
        assert not follower.heard_within(DEADLINE_S)
        assert arrives(follower, into, 1, layer)
        assert follower.heard_within(DEADLINE_S) == (plan.members[0].node_id,)
        assert bytes(into.tensor.data) == bytes([10 + layer]) * into.tensor.nbytes
    assert not follower.inbox.partials
    leader.send_partial(1, due(plan, 0), 1, 3)
    arrived = follower.collect(follower.inbox.partials, (1, 3, 0), {0: 0})
    assert arrived[0].link_seq == 4
    assert follower.traffic.dropped == 0


def test_nothing_is_lost_where_something_else_comes(pair: Pair) -> None:
    """A step, a partial of more rows, one of the other half: all is filed, and found."""
    plan, (leader, follower) = pair.plan, pair.nodes
    slot = Slot(request_id=1, start=1, tokens=(1,))
    number = leader.next_sequence(1)
    leader.send(1, Step(fence=plan.fence, step=2, link_seq=number, slots=(slot,)))
    leader.send_partial(1, due(plan, 0), 1, 0)
    assert not arrives(follower, due(plan, 0), 1, 0)
    assert [step.step for step in follower.inbox.steps] == [2]
    follower.pump()
    assert (1, 0, 0) in follower.inbox.partials
    assert not arrives(follower, due(plan, 0), 1, 0), "it is in the inbox already"
    for frame, layer in ((due(plan, 0, rows=2), 1), (due(plan, 0, half=1), 1)):
        leader.send_partial(1, frame, 1, layer)
        assert not arrives(follower, due(plan, 0), 1, 1)
        follower.pump()
    assert follower.inbox.partials.keys() >= {(1, 1, 0), (1, 1, 1)}
    leader.send_partial(1, due(plan, 0), 1, 2)
    assert arrives(follower, due(plan, 0), 1, 2)
    assert follower.traffic.dropped == 0


def test_nothing_comes_of_a_frame_with_another_number(pair: Pair) -> None:
    """One was lost: that breaks the step, however the frame is received."""
    plan, (leader, follower) = pair.plan, pair.nodes
    leader.next_sequence(1)
    leader.send_partial(1, due(plan, 0), 1, 0)
    with pytest.raises(LinkBroken, match="frame 2 came where 1 was due"):
        arrives(follower, due(plan, 0), 1, 0)


def test_what_is_due_may_not_have_come_yet(pair: Pair) -> None:
    """Nor may its link be there: both are for those who wait longer to find out."""
    plan, (leader, follower) = pair.plan, pair.nodes
    assert not arrives(follower, due(plan, 0), 1, 0)
    leader.send_partial(1, due(plan, 0), 1, 0)
    assert arrives(follower, due(plan, 0), 1, 0)
    leader.local.shutdown()
    assert not arrives(follower, due(plan, 0), 1, 1)
    with pytest.raises(LinkBroken):
        pair.until(lambda: False, follower)
    assert not arrives(follower, due(plan, 0), 1, 1)


def test_nothing_is_due_under_another_plan(pair: Pair) -> None:
    """Until a frame of the new plan has come by the usual way, nobody knows whose it would be."""
    _, (leader, follower) = pair.plan, pair.nodes
    plan = pair.adopt(2)
    leader.send_partial(1, due(plan, 0), 1, 0)
    assert not arrives(follower, due(plan, 0), 1, 0)
    follower.collect(follower.inbox.partials, (1, 0, 0), {0: 0})
    leader.send_partial(1, due(plan, 0), 1, 1)
    assert arrives(follower, due(plan, 0), 1, 1)


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("local", [True, False])
def test_two_nodes_have_the_sums_of_all_units(wire_dtype: str, local: bool) -> None:
    """Of few rows and of many, by local links and over TCP."""
    model = msgspec.structs.replace(SIX_LAYERS, wire_dtype=wire_dtype)
    pair = Pair(local=(local, local), plan=msgspec.structs.replace(plan_of(2), model=model))
    try:
        plan = pair.adopt(1)
        steps = [(1, 1), (2, KEPT_ROWS), (3, KEPT_ROWS + 1), (4, 1), (5, 300)]
        with ThreadPoolExecutor(2) as both:
            began = threading.Barrier(2)
            sums = list(both.map(lambda me: totals(pair, plan, me, steps, began), range(2)))
        assert all(map(torch.equal, *sums))
        sizes = topology(plan, 0).units
        for number, (step, rows) in enumerate(steps):
            for half in (0, 1):
                everything = partials(plan, range(sizes[half]), step, half, rows)
                at = number * 2 * SIX_LAYERS.num_layers + half
                assert torch.equal(sums[0][at], whole_sum(everything, sizes[half]))
    finally:
        pair.close()


def partials(
    plan: Plan, units: range | tuple[int, ...], step: int, half: int, rows: int
) -> dict[int, torch.Tensor]:
    """Random ones, the same for everybody."""
    dtype = TORCH_DTYPES[DType(plan.model.wire_dtype)]
    made = {}
    for unit in units:
        random = torch.Generator().manual_seed(1000 * step + 100 * half + unit)
        made[unit] = torch.randn(rows, HIDDEN, generator=random).to(dtype)
    return made


def totals(
    pair: Pair, plan: Plan, me: int, steps: list[tuple[int, int]], began: threading.Barrier
) -> list[torch.Tensor]:
    """One node's sums of all half layers of these steps (number, rows)."""
    mine, links = topology(plan, me), pair.nodes[me]
    sums, found = StepSums(mine, links), []
    for step, rows in steps:
        began.wait(DEADLINE_S)
        links.begin(step, DEADLINE_S)
        for layer in range(SIX_LAYERS.num_layers):
            for half in (0, 1):
                units = (mine.roles[0].holding.head_units, mine.roles[0].holding.mlp_units)[half]
                own = partials(plan, units, step, half, rows)
                found.append(sums.total(step, NeedSum(0, layer, half, own), rows).clone())
    return found


@pytest.mark.parametrize("as_due", [True, False])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_neither_sent_nor_added(
    pair: Pair, value: float, as_due: bool
) -> None:
    """Whose it was is said: that member computes what is no number."""
    plan, (leader, follower) = pair.plan, pair.nodes
    mine = topology(plan, 1)
    units = mine.roles[0].holding.head_units
    own = partials(plan, units, 1, 0, 1)
    broken = due(plan, 0)
    fill(broken, 0).tensor.data[:4] = torch.tensor([value]).numpy().tobytes()  # type: ignore[index]
    leader.send_partial(1, broken, 1, 0)
    if not as_due:
        follower.pump()
    assert bool(follower.inbox.partials) != as_due
    with pytest.raises(StepBroken, match=r"not finite .*member 0+\)") as found:
        StepSums(mine, follower).total(1, NeedSum(0, 0, 0, own), 1)
    assert found.value.broken
    own[units[0]][0, 0] = value
    with pytest.raises(StepBroken, match="not finite") as found:
        StepSums(mine, follower).total(1, NeedSum(0, 0, 0, own), 1)
    assert found.value.node_id == plan.members[1].node_id


def test_a_partial_of_other_rows_breaks_the_step(pair: Pair) -> None:
    """It is not due, and the step's rows are the same for all."""
    plan, (leader, follower) = pair.plan, pair.nodes
    mine = topology(plan, 1)
    own = partials(plan, mine.roles[0].holding.head_units, 1, 0, 1)
    leader.send_partial(1, due(plan, 0, rows=2), 1, 0)
    with pytest.raises(StepBroken, match="a partial of the wrong size") as found:
        StepSums(mine, follower).total(1, NeedSum(0, 0, 0, own), 1)
    assert found.value.node_id == plan.members[0].node_id


class Scripted(StepLinks):
    """Links on which the partials of some members come as they are due, and of the `late` after."""

    def __init__(self, mine: Topology) -> None:
        self.inbox = Inbox()
        self._mine = mine

    def script(self, step: int, rows: int, late: Sequence[int]) -> None:
        """What is to come next."""
        self.sent: list[tuple[int, tuple[int, int, int, tuple[int, ...]]]] = []
        """Members, and what was sent to them: step, layer, half, parts."""
        self._step, self._rows, self._late = step, rows, set(late)

    def _frame(self, member: int, half: int) -> PartialFrame:
        plan = self._mine.plan
        nodes = self._mine.roles[0].parts[half][member]
        theirs = topology(plan, member).roles[0].holding
        units = (theirs.head_units, theirs.mlp_units)[half]
        sums = subtree_sums(
            partials(plan, units, self._step, half, self._rows), self._mine.units[half]
        )
        dtype = SUM_DTYPES[plan.model.wire_dtype]
        frame = PartialFrame(plan.fence, (member, 0, half), nodes, dtype, (self._rows, HIDDEN))
        frame.tensor.data[:] = to_wire(torch.stack([sums[n] for n in nodes])).data  # type: ignore[index]
        return frame

    def awake_until(self) -> float:
        """Nothing is waited for."""
        return 0.0

    def receive_due(
        self, member: int, due: PartialFrame, step: int, layer: int, until: float
    ) -> bool:
        """What is late has overwritten the memory with something else."""
        if member in self._late:
            due.memory[:] = bytes([0xFF]) * len(due.memory)
            return False
        due.tensor.data[:] = self._frame(member, due.half).tensor.data  # type: ignore[index]
        return True

    def collect(self, box, key, wanted, *, awake=True):  # type: ignore[no-untyped-def]
        """Only what is late is waited for, and not awake once more."""
        assert wanted.keys() == self._late
        assert not awake
        _, layer, half = key
        made = {}
        for member in wanted:
            frame = self._frame(member, half)
            frame.stamp(self._step, 0, layer)
            made[member] = decode(bytes(frame.sealed()))
        return made

    def send_partial(self, member: int, partial: PartialFrame, step: int, layer: int) -> None:
        """To be looked at."""
        partial.stamp(step, 0, layer)
        sent = decode(bytes(partial.sealed()))
        assert isinstance(sent, Partial)
        self.sent.append((member, (sent.step, sent.layer, sent.half, sent.parts)))


def owned_by(plan: Plan, heads: Sequence[int], mlp: Sequence[int]) -> Plan:
    """The plan, with other owners of head units and MLP units, in turns."""
    stage = plan.stages[0]
    owners = [
        tuple(of[place * len(of) // len(before)] for place in range(len(before)))
        for of, before in ((heads, stage.head_owners), (mlp, stage.mlp_owners))
    ]
    stage = msgspec.structs.replace(stage, head_owners=owners[0], mlp_owners=owners[1])
    return msgspec.structs.replace(plan, stages=(stage,))


@pytest.mark.parametrize("wire_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("heads", "mlp"),
    [((0, 1, 2), (0, 1, 2)), ((0, 0, 0), (2, 1, 0)), ((0, 1, 1), (2, 2, 2))],
    ids=["all", "one has all heads", "one has all of the MLP"],
)
def test_any_of_several_may_be_late(
    heads: tuple[int, ...], mlp: tuple[int, ...], wire_dtype: str
) -> None:
    """The sum is that of all units, with whatever comes as it is due, in batches of any size."""
    model = msgspec.structs.replace(SIX_LAYERS, wire_dtype=wire_dtype)
    plan = msgspec.structs.replace(owned_by(plan_of(3), heads, mlp), model=model)
    for me, half in product(range(3), (0, 1)):
        mine = topology(plan, me)
        senders, count = mine.roles[0].senders(half), mine.units[half]
        held = mine.roles[0].holding
        units = (held.head_units, held.mlp_units)[half]
        links = Scripted(mine)
        sums = StepSums(mine, links)
        for step, (rows, some) in enumerate(product((1, 2, 1), range(len(senders) + 1))):
            for late in combinations(senders, some):
                links.script(step, rows, late)
                everything = partials(plan, range(count), step, half, rows)
                own = {unit: everything[unit] for unit in units}
                total = sums.total(step, NeedSum(0, 3, half, own), rows)
                assert torch.equal(total, whole_sum(everything, count))
                nodes = tuple(subtree_sums(own, count)) if own else ()
                told = (step, 3, half, nodes)
                assert links.sent == [(m, told) for m in range(3) if own and m != me]


def test_acknowledgements_come_between_partials(pair: Pair) -> None:
    """As the leader sees it: what its members say of the next step may come before their part."""
    plan, (leader, follower) = pair.plan, pair.nodes
    acked: list[tuple[int, int]] = []
    leader.on_ack = lambda *ack: acked.append(ack)
    number = follower.next_sequence(0)
    follower.send(0, StepAck(fence=plan.fence, step=2, link_seq=number))
    follower.send_partial(0, due(plan, 1), 1, 0)
    into = due(plan, 1)
    assert not leader.receive_due(1, into, 1, 0, 0.0)
    leader.collect(leader.inbox.partials, (1, 0, 0), {1: 1})
    assert acked == [(1, 2)]

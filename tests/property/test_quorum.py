"""Elections and changes of voters under any order of messages, crashes and lost disks.

A small world of true `Durable`, `Election` and `quorum`, with everything else made as bad as it may
be: messages arrive in any order or never, members believe the wrong ones dead, a disk writes late,
and a node comes back with what its disk had, or with nothing.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from p2pinfer.core import quorum
from p2pinfer.core.durable import Durable
from p2pinfer.core.election import Election, ElectionView
from p2pinfer.core.events import Persist, Send, StoredState
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.timing import LAN
from p2pinfer.core.voters import listed_as, next_voters
from p2pinfer.types import Fence, Member, Plan, Stage
from p2pinfer.wire.messages import (
    Ack,
    Activate,
    ControlMessage,
    Heartbeat,
    PreVoteReply,
    PreVoteRequest,
    Propose,
    VoteReply,
    VoteRequest,
)
from tests.model_specs import NO_MODEL

CLUSTER = "c" * 16
STAGE = Stage(start=0, end=1, head_owners=(), mlp_owners=())


@dataclass
class Office:
    """What a leader knows of its plans."""

    base: Plan | None
    active: bool
    first: bool = True
    target: Plan | None = None
    acked: dict[str, str] = field(default_factory=dict)
    """Boot ids of those that acknowledged the target, by node id."""
    heard: frozenset[str] = frozenset()
    """Those whose word counts under the target, as they described themselves when it was made."""


class Process:
    """One life of a node."""

    def __init__(self, world: World, member: Member, stored: StoredState | None) -> None:
        self.world = world
        self.box = Outbox(member.node_id, lambda node_id: node_id)
        self.durable = Durable(stored, member.boot_id, self.box)
        memory = self.durable.state.memory
        self.member = replace(member, blank=self.durable.blank, memory=memory)
        self.election = Election(self.member, self.durable, LAN, self.box, world.random.random)
        self.known: dict[str, Member] = {}
        self.office: Office | None = None
        self.led = 0
        self.unwritten: Persist | None = None

    def handle(self, message: ControlMessage, sender: str) -> None:
        """Take a message as `core/node.py` does."""
        now = self.world.now
        match message:
            case PreVoteRequest() | PreVoteReply() | VoteRequest() | VoteReply():
                self.election.handle(message, sender, now)
            case Heartbeat():
                self.election.heard(message, now)
            case Propose():
                self.proposed(message.plan, sender)
            case Activate():
                self.durable.activated(message.fence)
            case Ack() if self.office and self.office.target:
                plan = self.office.target
                if message.fence == plan.fence:
                    boot = self.known[sender].boot_id if sender in self.known else ""
                    self.office.acked[sender] = boot if sender != self.id else self.member.boot_id

    @property
    def id(self) -> str:
        """This node's id."""
        return self.member.node_id

    def proposed(self, plan: Plan, sender: str) -> None:
        """Accept a newer plan of the leader."""
        if not self.election.follow(sender, plan.fence.term, self.world.now):
            return
        ack = Ack(fence=plan.fence, node_id=self.id)
        if plan.fence > self.durable.fence:
            self.durable.accept(plan, CLUSTER, lambda _: self.box.send(sender, ack))

    def view(self) -> ElectionView:
        """The members as this node believes, itself among them."""
        me = replace(self.member, blank=self.durable.blank)
        return ElectionView(members=(me, *self.known.values()), able=True)

    def look(self) -> None:
        """Follow up on what happened; check what must hold of a leader."""
        self.election.look(self.view(), self.world.now)
        if not self.election.leads:
            self.office = None
        elif self.led != self.election.term:
            self.led = self.election.term
            self.world.elected(self)
            self.office = Office(self.durable.plan, self.durable.state.active)
        if self.office:
            self.adopt(self.office)

    def propose(self, office: Office) -> None:
        """The leader makes a plan with any change of voters that the rules allow."""
        rand = self.world.random
        living = [m for m in self.view().members if m.node_id == self.id or rand.random() < 0.8]
        ids = frozenset(member.node_id for member in living)
        voters, before = next_voters(
            office.base,
            base_active=office.active,
            first=office.first,
            leader_id=self.id,
            living=living,
            lost=frozenset(self.world.ids) - ids,
            ready=frozenset(i for i in ids if rand.random() < 0.7),
            leaving=frozenset(i for i in ids if rand.random() < 0.1),
        )
        members = self.listed(office, living, voters)
        index = {member.node_id: number for number, member in enumerate(members)}
        newest = office.target.fence if office.target else Fence()
        fence = Fence(self.election.term, max(newest.epoch, self.durable.fence.epoch) + 1)
        office.acked = {}
        office.target = Plan(
            fence=fence,
            cluster_id=CLUSTER,
            leader=index[self.id],
            members=members,
            voters=tuple(index[node_id] for node_id in voters),
            old_voters=before,
            model=NO_MODEL,
            stages=(STAGE,),
        )
        office.heard = quorum.credible(office.target, living)
        for member in members:
            self.box.send(member.node_id, Propose(plan=office.target))

    def listed(
        self, office: Office, living: list[Member], voters: tuple[str, ...]
    ) -> tuple[Member, ...]:
        """The next plan's members: blank only while no plan in force has named their memory."""
        here = {member.node_id: member for member in living}
        before = {member.node_id: member for member in (office.base.members if office.base else ())}
        keep = frozenset() if office.active else frozenset(voters)
        members = [
            listed_as(here.get(i), before.get(i), keep=i in keep)
            for i in sorted(here.keys() | frozenset(voters))
        ]
        if office.base is None:
            return tuple(members)
        voted = quorum.voter_ids(office.base) if office.active else frozenset()
        blanks = {m.memory: m.blank and m.node_id not in voted for m in office.base.members}
        return tuple(replace(m, blank=blanks.get(m.memory, m.blank)) for m in members)

    def adopt(self, office: Office) -> None:
        """Put the target in force when enough have acknowledged it."""
        plan = office.target
        if plan is None or self.durable.fence != plan.fence:
            return
        listed = {member.node_id: member for member in plan.members}
        acked = frozenset(i for i, boot in office.acked.items() if listed[i].boot_id == boot)
        heard = acked & office.heard
        if self.id in acked and quorum.adopts(plan, heard, first=office.first):
            self.world.adopted(plan)
            office.base, office.active, office.first, office.target = plan, True, False, None
            for member in plan.members:
                self.box.send(member.node_id, Activate(fence=plan.fence))


@dataclass
class Flight:
    """A message on its way."""

    sender: Member
    to: str
    message: ControlMessage


class World:
    """All nodes, their disks, and the messages between them."""

    def __init__(self, size: int, seed: int, chaos: float) -> None:
        self.random = random.Random(seed)
        self.chaos = chaos
        self.now = 0.0
        self.ids = [f"{number:016x}" for number in range(size)]
        self.disks: dict[str, StoredState | None] = dict.fromkeys(self.ids)
        self.flights: list[Flight] = []
        self.boots = 0
        self.leaders: dict[int, tuple[str, str, Fence]] = {}
        self.plans: list[Fence] = []
        self.up: dict[str, Process] = {}
        for node_id in self.ids:
            self.start(node_id)
        founder = self.up[self.ids[0]]
        founder.election.found(CLUSTER)
        self.collect(founder)
        self.write(founder)

    def start(self, node_id: str) -> None:
        """A process starts, with what the disk has."""
        self.boots += 1
        member = Member(
            node_id=node_id,
            boot_id=f"{self.boots:016x}",
            name=node_id[-2:],
            address="tcp://127.0.0.1:1",
        )
        process = Process(self, member, self.disks[node_id])
        if self.disks[node_id] is not None:
            process.election.resume(self.now)
        self.up[node_id] = process

    def step(self) -> None:
        """One thing happens somewhere."""
        process = self.up[self.random.choice(self.ids)]
        self.now += self.random.expovariate(400.0)
        roll = self.random.random()
        if roll < 0.6 and self.flights:
            process = self.deliver() or process
        elif roll < 0.78:
            self.write(process)
        elif roll < 0.86:
            self.meet(process)
        elif roll < 0.90:
            self.say(process)
        elif roll < 0.94 and process.office:
            process.propose(process.office)
        elif roll > 1.0 - self.chaos / 4 and self.plans:
            process = self.fault(process)
        process.look()
        self.collect(process)

    def deliver(self) -> Process | None:
        """Any message that is on its way arrives, or is lost."""
        flight = self.flights.pop(self.random.randrange(len(self.flights)))
        process = self.up[flight.to]
        known = process.known.get(flight.sender.node_id)
        if known is None or known.boot_id != flight.sender.boot_id:
            return None
        process.handle(flight.message, flight.sender.node_id)
        if self.random.random() < self.chaos:
            self.flights.append(flight)
        return process

    def write(self, process: Process) -> None:
        """The disk has the newest state."""
        if process.unwritten:
            self.disks[process.id] = process.unwritten.state
            number, process.unwritten = process.unwritten.number, None
            process.durable.persisted(number, self.now)

    def meet(self, process: Process) -> None:
        """A node comes to know another as it is now, or takes it for lost."""
        other = self.up[self.random.choice(self.ids)]
        if other is process:
            return
        if self.random.random() < self.chaos:
            process.known.pop(other.id, None)
            process.election.lost(other.id, "taken for dead", self.now)
        else:
            fresh = self.random.random() < 0.7
            blank = other.durable.blank if fresh else other.member.blank
            process.known[other.id] = replace(other.member, blank=blank)

    def say(self, process: Process) -> None:
        """A node tells all of its term, its leader and the plan in force."""
        state = process.durable.state
        beat = Heartbeat(
            node_id=process.id,
            boot_id=process.member.boot_id,
            incarnation=0,
            term=state.term,
            fence=process.durable.fence if state.active else Fence(),
            leader_id=process.election.leader_id,
        )
        for other in self.ids:
            if other != process.id:
                self.flights.append(Flight(process.member, other, beat))

    def fault(self, process: Process) -> Process:
        """A process dies and starts again; seldom without its disk."""
        if process.unwritten and self.random.random() < 0.5:
            self.disks[process.id] = process.unwritten.state
        others = [each for each in self.up.values() if each is not process]
        if self.random.random() < 0.4 and sum(each.durable.blank for each in others) < 2:
            self.disks[process.id] = None
        self.start(process.id)
        return self.up[process.id]

    def collect(self, process: Process) -> None:
        """Put on their way what a process wants sent, and to its disk what it wants written."""
        while process.box.to_self:
            process.handle(process.box.to_self.popleft(), process.id)
            process.look()
        for output in process.box.take():
            if isinstance(output, Send):
                self.flights.append(Flight(process.member, output.address, output.message))
            elif isinstance(output, Persist):
                process.unwritten = output
        while len(self.flights) > 40:
            self.flights.pop(self.random.randrange(len(self.flights)))

    # --- what must hold ---------------------------------------------------------------------------

    def elected(self, process: Process) -> None:
        """At most one leader per term, and none that lacks a plan adopted by one before."""
        term, fence = process.election.term, process.durable.fence
        assert term not in self.leaders, f"two leaders in term {term}"
        self.leaders[term] = (process.id, process.member.boot_id, fence)
        assert all(fence >= plan for plan in self.plans if plan.term < term), "a plan is forgotten"

    def adopted(self, plan: Plan) -> None:
        """No leader of a higher term lacks this plan."""
        self.plans.append(plan.fence)
        for term, (_, _, fence) in self.leaders.items():
            assert term <= plan.fence.term or fence >= plan.fence, "a plan is forgotten"


@given(
    size=st.integers(1, 5),
    seed=st.integers(0, 2**32),
    chaos=st.sampled_from((0.0, 0.02, 0.06, 0.12)),
)
def test_one_leader_per_term_and_no_adopted_plan_is_forgotten(
    size: int, seed: int, chaos: float
) -> None:
    """Whatever happens, a term has one leader at most, and each has every plan adopted before."""
    world = World(size, seed, chaos)
    for _ in range(1500):
        world.step()

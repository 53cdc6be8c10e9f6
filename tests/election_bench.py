"""One voter of three and its election: time, disk and the others in the test's hands."""

from __future__ import annotations

from p2pinfer.core.durable import Durable
from p2pinfer.core.election import Election, ElectionView
from p2pinfer.core.events import Fact, Persist, Send, StoredState
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.timing import LAN
from p2pinfer.types import Fence, Member, Plan, Stage
from p2pinfer.wire.messages import (
    ControlMessage,
    Heartbeat,
    PreVoteReply,
    PreVoteRequest,
    VoteReply,
    VoteRequest,
)
from tests.model_specs import NO_MODEL

A, B, C, D = ("a" * 16, "b" * 16, "c" * 16, "d" * 16)
CLUSTER = "e" * 16
NEWEST = Fence(3, 7)


def member(node_id: str, boot: str = "1", *, memory: str = "1", blank: bool = False) -> Member:
    """A node in its life number `boot`, with its memory of that number."""
    return Member(
        node_id=node_id,
        boot_id=boot * 16,
        name=node_id[0].upper(),
        address="tcp://h:1",
        blank=blank,
        memory=memory * 16,
    )


def plan_of(
    *voters: str,
    fence: Fence = NEWEST,
    old: tuple[str, ...] | None = None,
    listed: tuple[Member, ...] = (),
    rule: str = "majority",
) -> Plan:
    """A plan led by its first member; `old` are the voters before it (None: the same)."""
    members = listed or tuple(member(node_id) for node_id in voters)
    ids = [each.node_id for each in members]
    return Plan(
        fence=fence,
        cluster_id=CLUSTER,
        leader=0,
        members=members,
        voters=tuple(ids.index(node_id) for node_id in voters),
        old_voters=voters if old is None else old,
        quorum=rule,
        model=NO_MODEL,
        stages=(Stage(start=0, end=1, head_owners=(0,), mlp_owners=(0,)),),
    )


def stored(plan: Plan | None, *, term: int = 3, active: bool = True) -> StoredState:
    """What a member of the cluster had on its disk."""
    return StoredState(cluster_id=CLUSTER, term=term, voted_for=A, plan=plan, active=active)


IN_THREE = stored(plan_of(A, B, C))


class Voter:
    """Node B, with time, disk and membership in the test's hands."""

    def __init__(self, state: StoredState | None = IN_THREE, me: Member | None = None) -> None:
        self.me = me or member(B)
        self.now = 0.0
        self.drawn = 0.5
        self.box = Outbox(self.me.node_id, lambda node_id: node_id)
        self.durable = Durable(state, self.me.boot_id, self.box)
        self.election = Election(self.me, self.durable, LAN, self.box, lambda: self.drawn)
        self.here = [self.me, *(member(each) for each in (A, B, C) if each != self.me.node_id)]
        self.lost: frozenset[str] = frozenset()
        self.gone: tuple[Member, ...] = ()
        self.able = True
        self.facts: list[Fact] = []
        self.sent: list[tuple[str, ControlMessage]] = []
        self.unwritten = 0

    def look(self, after: float = 0.0) -> None:
        """Time goes on, and the node looks at everything."""
        self.now += after
        view = ElectionView(
            members=tuple(self.here), lost=self.lost, gone=self.gone, able=self.able
        )
        self.election.look(view, self.now)
        self._collect()

    def _collect(self) -> None:
        for output in self.box.take():
            if isinstance(output, Fact):
                self.facts.append(output)
            elif isinstance(output, Send):
                self.sent.append((output.address, output.message))
            elif isinstance(output, Persist):
                self.unwritten = output.number

    def write(self) -> None:
        """The disk has everything."""
        self._collect()
        self.durable.persisted(self.unwritten, self.now)
        self.look()

    def says(self, message: PreVoteRequest | PreVoteReply | VoteRequest | VoteReply) -> None:
        """A message of the election comes from whom it names."""
        asks = isinstance(message, PreVoteRequest | VoteRequest)
        sender = message.candidate_id if asks else message.voter_id
        self.election.handle(message, sender, self.now)
        self.look()

    def beats(self, sender: str, term: int, leader: str = "", fence: Fence = NEWEST) -> None:
        """A heartbeat comes."""
        self.election.heard(
            Heartbeat(
                node_id=sender,
                boot_id="1" * 16,
                incarnation=0,
                term=term,
                fence=fence,
                leader_id=leader,
            ),
            self.now,
        )
        self.look()

    def taken(self) -> list[tuple[str, ControlMessage]]:
        """What was sent since the last call."""
        sent, self.sent = self.sent, []
        return sent

    def said(self, kind: type[Fact]) -> list[Fact]:
        """The facts of one kind, so far."""
        return [fact for fact in self.facts if isinstance(fact, kind)]

    def ask(self) -> None:
        """Bring the node to its next attempt."""
        self.look()
        self.look(self.election.deadline - self.now)

    def stand(self) -> int:
        """Bring the node to stand for election; the term."""
        self.ask()
        term = self.election.term + 1
        self.says(PreVoteReply(term=term, voter_id=C, granted=True))
        assert self.election.term == term
        return term

    def lead(self) -> int:
        """Bring the node to lead; the term."""
        term = self.stand()
        self.write()
        self.says(VoteReply(term=term, voter_id=C, granted=True))
        assert self.election.leads
        self.taken()
        return term

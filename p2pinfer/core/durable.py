"""What a node must not forget, and who waits until the disk has it.

Term, vote and newest plan are written before anybody is told of them (Raft, section 5.2). Writing
is an output and its completion an input, so nothing else of the node waits for the disk.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from p2pinfer.core.events import Persist, StoredState
from p2pinfer.core.outbox import Outbox
from p2pinfer.types import Fence, Plan

Then = Callable[[float], None]
"""What to do, at a time in seconds, once something is on the disk."""


class Durable:
    """The stored state as this node now has it, which the disk may lag behind.

    `blank` is true for a node that began without state and did not found its cluster: it has no
    vote until a plan names this boot a voter.
    """

    def __init__(self, stored: StoredState | None, boot_id: str, box: Outbox) -> None:
        self.state = stored or StoredState(cluster_id="")
        self.blank = stored is None
        self._boot_id = boot_id
        self._box = box
        self._number = 0
        self._waiting: deque[tuple[int, Then]] = deque()

    @property
    def plan(self) -> Plan | None:
        """The newest plan that this node has acknowledged, or is about to."""
        return self.state.plan

    @property
    def fence(self) -> Fence:
        """That plan's fence; (0, 0) where there is none."""
        return self.state.plan.fence if self.state.plan else Fence()

    def found(self, cluster_id: str, term: int, node_id: str) -> None:
        """This node founds a cluster: it is its only voter, and has voted for itself."""
        self.blank = False
        self._write(StoredState(cluster_id=cluster_id, term=term, voted_for=node_id), None)

    def vote(self, term: int, candidate_id: str, then: Then) -> None:
        """Vote in `term`; `then` may say so."""
        self._write(self._changed(term=term, voted_for=candidate_id), then)

    def enter_term(self, term: int) -> None:
        """A higher term was seen: votes of the one before are over. Nobody waits for this."""
        if term > self.state.term:
            self._write(self._changed(term=term, voted_for=""), None)

    def accept(self, plan: Plan, cluster_id: str, then: Then) -> None:
        """Take a plan as the newest; `then` may acknowledge it."""
        state = self.state
        term = max(state.term, plan.fence.term)
        voted_for = state.voted_for if term == state.term else ""
        changed = StoredState(
            cluster_id=cluster_id, term=term, voted_for=voted_for, plan=plan, active=False
        )
        voters = (plan.members[index] for index in plan.voters)
        if any(voter.boot_id == self._boot_id for voter in voters):
            self.blank = False
        self._write(changed, then)

    def activated(self, fence: Fence) -> None:
        """The newest plan is known to be in force."""
        if fence == self.fence and not self.state.active:
            self._write(self._changed(active=True), None)

    def forget(self) -> None:
        """This node has left its cluster for good."""
        self.state, self._waiting = StoredState(cluster_id=""), deque()
        self._number += 1
        self._box.add(Persist(number=self._number, state=None))

    def persisted(self, number: int, now: float) -> None:
        """All up to `number` is on the disk: do what waited for it."""
        while self._waiting and self._waiting[0][0] <= number:
            self._waiting.popleft()[1](now)

    def _changed(
        self, *, term: int | None = None, voted_for: str | None = None, active: bool | None = None
    ) -> StoredState:
        old = self.state
        return StoredState(
            cluster_id=old.cluster_id,
            term=old.term if term is None else term,
            voted_for=old.voted_for if voted_for is None else voted_for,
            plan=old.plan,
            active=old.active if active is None else active,
        )

    def _write(self, state: StoredState, then: Then | None) -> None:
        self.state = state
        self._number += 1
        if then is not None:
            self._waiting.append((self._number, then))
        self._box.add(Persist(number=self._number, state=state))

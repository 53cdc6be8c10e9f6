"""What a node must not forget, and who waits until the disk has it.

Term, vote and newest plan are written before anybody is told of them (Raft, section 5.2). Writing
is an output and its completion an input, so nothing else of the node waits for the disk.

A node that begins without its state is blank: it may have promised, in a life that it has
forgotten, what it now would contradict. It begins a new memory, promises anew and keeps that, but
its word is counted with care (`core/quorum.py`) until a plan is in force that names this memory a
voter: that plan got its quorum without the forgotten word, so whoever needed that word can win
nothing any more.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from msgspec.structs import replace

from p2pinfer.core.events import Persist, StoredState
from p2pinfer.core.outbox import Outbox
from p2pinfer.limits import MAX_NODES
from p2pinfer.types import Fence, Plan

Then = Callable[[float], None]
"""What to do, at a time in seconds, once something is on the disk."""

MAX_ADDRESSES = 4 * MAX_NODES
"""Of members of plans before, kept as hints."""


class Durable:
    """The stored state as this node now has it, which the disk may lag behind."""

    def __init__(self, stored: StoredState | None, boot_id: str, box: Outbox) -> None:
        self.state = stored or StoredState(cluster_id="", blank=True, memory=boot_id)
        self._box = box
        self._number = 0
        self._waiting: deque[tuple[int, Then]] = deque()

    @property
    def blank(self) -> bool:
        """Whether what this node promised before is lost and not healed. Also after a restart."""
        return self.state.blank

    @property
    def plan(self) -> Plan | None:
        """The newest plan that this node has acknowledged, or is about to."""
        return self.state.plan

    @property
    def fence(self) -> Fence:
        """That plan's fence; (0, 0) where there is none."""
        return self.state.plan.fence if self.state.plan else Fence()

    def found(self, cluster_id: str, term: int, node_id: str, then: Then | None = None) -> None:
        """This node founds a cluster: it is its only voter, and has voted for itself."""
        state = replace(self.state, cluster_id=cluster_id, term=term, voted_for=node_id)
        self._write(replace(state, blank=False), then)

    def vote(self, term: int, candidate_id: str, then: Then) -> None:
        """Vote in `term`; `then` may say so."""
        free = self.state.voted_for in ("", candidate_id)
        assert term > self.state.term or (term == self.state.term and free), "one vote per term"
        self._write(replace(self.state, term=term, voted_for=candidate_id), then)

    def enter_term(self, term: int) -> None:
        """A higher term was seen: votes of the one before are over. Nobody waits for this."""
        if term <= self.state.term:
            return
        state = replace(self.state, term=term, voted_for="")
        if state.blank and state.plan is None:
            self.state = state  # a node that may never become a member leaves nothing behind
        else:
            self._write(state, None)

    def accept(self, plan: Plan, cluster_id: str, then: Then) -> None:
        """Take a plan, newer than all before, as the newest; `then` may acknowledge it."""
        state, term = self.state, plan.fence.term
        assert plan.fence > self.fence and term >= state.term, "fences and terms only grow"
        voted_for = state.voted_for if term == state.term else ""
        changed = self._with(plan)
        self._write(replace(changed, cluster_id=cluster_id, term=term, voted_for=voted_for), then)

    def catch_up(self, plan: Plan) -> None:
        """Take over a newer plan that another voter has acknowledged. This node acknowledges it to
        nobody: it only stands no longer for an older one."""
        assert plan.fence > self.fence, "fences only grow"
        changed = self._with(plan)
        if plan.fence.term > self.state.term:
            changed = replace(changed, term=plan.fence.term, voted_for="")
        self._write(changed, None)

    def activated(self, fence: Fence) -> None:
        """The plan of `fence` is known to be in force; of an older one there is nothing to note."""
        plan, state = self.state.plan, self.state
        if plan is None or fence != plan.fence:
            return
        voters = (plan.members[index].memory for index in plan.voters)
        blank = state.blank and state.memory not in voters
        if not state.active or blank != state.blank:
            self._write(replace(state, active=True, blank=blank), None)

    def forget(self) -> None:
        """This node has left its cluster for good."""
        self.state = StoredState(cluster_id="", blank=True, memory=self.state.memory)
        self._waiting = deque()
        self._number += 1
        self._box.add(Persist(number=self._number, state=None))

    def persisted(self, number: int, now: float) -> None:
        """All up to `number` is on the disk: do what waited for it."""
        while self._waiting and self._waiting[0][0] <= number:
            self._waiting.popleft()[1](now)

    def _with(self, plan: Plan) -> StoredState:
        """The state with a newer plan, and the addresses of those that may be needed besides."""
        state = self.state
        before = state.plan.members if state.plan else ()
        # Of a plan that was not in force the voters before it may be needed still.
        known = (*(member.address for member in before), *(() if state.active else state.addresses))
        addresses = tuple(dict.fromkeys(known))[:MAX_ADDRESSES]
        return replace(state, plan=plan, active=False, addresses=addresses)

    def _write(self, state: StoredState, then: Then | None) -> None:
        self.state = state
        self._number += 1
        if then is not None:
            self._waiting.append((self._number, then))
        self._box.add(Persist(number=self._number, state=state))

"""Leaving in good order: a node that is to go says so, and goes when others hold what it held.

A draining node says `draining` in its heartbeats; the leader's next plan gives it nothing, and when
that plan is in force here the node says LEAVE and ends. Told by a signal it leaves after
`drain_timeout` whatever came of it; told by an operator it then stays.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from p2pinfer.core.events import NodeConfig, Output, ReplyTo
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.planner import holding
from p2pinfer.types import Fence, Member, Plan
from p2pinfer.wire.messages import Done, Drain, Failed, MemberState

GRACE_S = 2.0
"""How much longer than `drain_timeout` the asked node waits for another one to leave."""


MAX_WISHES = 64
"""Clients that wait for a member to leave; the oldest is forgotten first."""


@dataclass(slots=True)
class _Wish:
    """A client of this node waits for a member to leave."""

    route: bytes
    request_id: int
    name: str
    until: float
    node_id: str


class Departure:
    """Whether this node is on its way out, and what clients asked of others. Times in seconds."""

    def __init__(self, config: NodeConfig, near: Neighbours, box: Outbox) -> None:
        self.draining = False
        self.for_good = False
        """It will not come back: it forgets its cluster."""
        self._timeout = config.drain_timeout
        self._me = config.member
        self._near = near
        self._box = box
        self._anyway = False
        self._until = inf
        self._wishes: list[_Wish] = []

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        return min((self._until, *(wish.until for wish in self._wishes)))

    # --- asked ------------------------------------------------------------------------------------

    def leave(self, now: float) -> None:
        """The process was told to end."""
        self._anyway = True
        self._drain(now)

    def asked(self, message: Drain, route: bytes, now: float) -> None:
        """A client of this node wants a member to leave; no name: this one, for good."""
        name = message.name
        peer = next((p for p in self._near.table.living() if p.member.name == name), None)
        own = name in ("", self._me.name)
        about = self._me.node_id if own else peer.member.node_id if peer else ""
        until = now + self._timeout + GRACE_S
        wish = _Wish(route, message.request_id, name, until, about)
        if not about:
            names = ", ".join(sorted(m.name for m in self._near.table.members()))
            self._fail(wish, "invalid_request", f"no member is called {name}; there are: {names}")
            return
        self._wishes = [*self._wishes[-MAX_WISHES + 1 :], wish]
        if own:
            self.for_good |= not name
            self._drain(now)
        else:
            self._box.send(about, message)

    def told(self, message: Drain, now: float) -> None:
        """Another member passes an operator's wish on."""
        if message.name == self._me.name:
            self._drain(now)

    def _drain(self, now: float) -> None:
        if not self.draining:
            self.draining, self._until = True, now + self._timeout
            self._near.speak_soon(now)

    # --- what comes of it -------------------------------------------------------------------------

    def lost(self, member: Member, state: MemberState) -> None:
        """A member is gone: perhaps the one that a client waits for."""
        for wish in self._about(member.node_id):
            if state is MemberState.LEFT:
                self._box.add(_answer(wish, Done(request_id=wish.request_id)))
            else:
                reason = f"{member.name} died before it had handed over its part"
                self._fail(wish, "node_lost", reason)

    def look(self, plan: Plan | None, obeyed: Fence, *, led: bool, now: float) -> bool:
        """Whether this node is to leave now. `led`: somebody leads, who could make a plan."""
        for wish in [wish for wish in self._wishes if now >= wish.until]:
            self._wishes.remove(wish)
            self._fail(wish, "not_ready", self._too_late(wish.name or self._me.name))
        if not self.draining:
            return False
        in_vain = not led or not self._others()
        if self._holds_nothing(plan, obeyed) or (self._anyway and in_vain):
            for wish in self._about(self._me.node_id):
                self._box.add(_answer(wish, Done(request_id=wish.request_id)))
            return True
        if now < self._until:
            return False
        self._until = inf
        if self._anyway:
            return True
        self.draining = self.for_good = False
        for wish in self._about(self._me.node_id):
            self._fail(wish, "not_ready", self._too_late(self._me.name))
        return False

    def _about(self, node_id: str) -> list[_Wish]:
        """The wishes about a member, which are taken off the list."""
        found = [wish for wish in self._wishes if wish.node_id == node_id]
        self._wishes = [wish for wish in self._wishes if wish.node_id != node_id]
        return found

    def _holds_nothing(self, plan: Plan | None, obeyed: Fence) -> bool:
        """Whether the plan in force gives this node no unit. Without a plan there is nothing to
        hand over, and who was told to end may go."""
        if plan is None:
            return self._anyway
        ids = [member.node_id for member in plan.members]
        if obeyed != plan.fence or self._me.node_id not in ids:
            return False
        return holding(plan, ids.index(self._me.node_id)).stage is None

    def _others(self) -> list[Peer]:
        """Members that could take over: not going themselves."""
        return [
            peer
            for peer in self._near.table.living()
            if not peer.member.witness and not (peer.heartbeat and peer.heartbeat.draining)
        ]

    def _too_late(self, name: str) -> str:
        return (
            f"{name} could not hand over its part within {self._timeout:g} s: the others may lack "
            f"memory, or the cluster a leader; see p2pinfer plan --without {name}"
        )

    def _fail(self, wish: _Wish, code: str, message: str) -> None:
        failed = Failed(
            request_id=wish.request_id,
            code=code,
            message=message,
            retryable=code != "invalid_request",
        )
        self._box.add(_answer(wish, failed))


def _answer(wish: _Wish, message: Done | Failed) -> Output:
    return ReplyTo(route=wish.route, message=message)

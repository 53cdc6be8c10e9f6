"""Pausing a member: it owns nothing until it is resumed, or started again.

It goes on voting, keeping replicas and, if it leads, leading.

A client asks any node, which tells the member. The member says `paused` in its heartbeats, and the
leader's next plans give its units to others. What cannot be handed over within `drain_timeout` it
keeps, and is paused no more.
"""

from __future__ import annotations

from math import inf

from p2pinfer.core.events import NodeConfig
from p2pinfer.core.holdings import owns_nothing
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.planner import may_own
from p2pinfer.core.wishes import Wish, Wishes
from p2pinfer.types import Member, Plan
from p2pinfer.wire.messages import Pause


class Pausing:
    """Whether this node is paused, and what clients asked of others. Times in seconds."""

    def __init__(self, config: NodeConfig, near: Neighbours, box: Outbox) -> None:
        self.paused = False
        self._timeout = config.drain_timeout
        self._me = config.member
        self._near = near
        self._box = box
        self._until = inf
        """Until when this node waits for others to take over what it owns."""
        self._wishes: Wishes[Pause] = Wishes(config.drain_timeout, box)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        return min(self._until, self._wishes.deadline)

    def paused_ids(self) -> frozenset[str]:
        """Node ids of the members that are paused, by what they say."""
        words = ((p.member.node_id, p.heartbeat) for p in self._near.table.living())
        found = {node_id for node_id, word in words if word and word.paused}
        return frozenset(found | ({self._me.node_id} if self.paused else set()))

    # --- asked ------------------------------------------------------------------------------------

    def asked(self, message: Pause, route: bytes, now: float) -> None:
        """A client of this node wants a member to be paused, or resumed; no name: this one."""
        name = message.name or self._me.name
        members = {m.name: m for m in reversed(self._near.table.members())}
        member = members.get(name)
        if member is None:
            reason = f"no member is called {name}; there are: {', '.join(sorted(members))}"
            self._wishes.refuse(message, route, "invalid_request", reason)
            return
        if not message.resume and not self._others(member):
            reason = f"nobody else may own units: without {name} no reply would go on; start a node"
            self._wishes.refuse(message, route, "invalid_request", reason)
            return
        self._wishes.add(message, route, member.node_id, now)
        if member.node_id == self._me.node_id:
            self._pause(not message.resume, now)
        else:
            self._box.send(member.node_id, message)

    def told(self, message: Pause, now: float) -> None:
        """Another member passes an operator's wish on."""
        if message.name == self._me.name:
            self._pause(not message.resume, now)

    def _pause(self, paused: bool, now: float) -> None:
        self._until = now + self._timeout if paused else inf
        if paused != self.paused:
            self.paused = paused
            self._near.speak_soon(now)

    def _others(self, but: Member) -> bool:
        """Whether another living member may own units now."""
        words = {p.member.node_id: p.heartbeat for p in self._near.table.living()}
        out = {but.node_id, *self.paused_ids()}
        out.update(i for i, word in words.items() if word and word.draining)
        members = self._near.table.members()
        return any(may_own(member) and member.node_id not in out for member in members)

    # --- what comes of it -------------------------------------------------------------------------

    def lost(self, member: Member) -> None:
        """A member is gone: perhaps the one that a client waits for."""
        for wish in self._wishes.about(member.node_id):
            self._wishes.fail(wish, "node_lost", f"{member.name} is gone")

    def look(self, plan: Plan | None, *, ready: bool, now: float) -> None:
        """Answer those whose wish is fulfilled, or cannot be. `plan` is the one in force here, and
        `ready` says that all its owners obey it."""
        handed_over = ready and plan is not None and owns_nothing(plan, self._me.node_id)
        if self.paused and handed_over:
            self._until = inf
        obeyed = plan if ready else None
        for wish in self._wishes.take(lambda wish: self._fulfilled(wish, obeyed)):
            self._wishes.done(wish)
        for wish in self._wishes.too_old(now):
            self._wishes.fail(wish, "not_ready", self._too_late(wish))
        if now >= self._until:
            self._until = inf
            self.paused = False
            self._near.speak_soon(now)
            for wish in self._wishes.about(self._me.node_id):
                self._wishes.fail(wish, "not_ready", self._too_late(wish))

    def end(self) -> None:
        """This node ends now: nobody waits for an answer any more."""
        self._wishes.turn_away(f"{self._me.name} is leaving; ask another node")

    def _fulfilled(self, wish: Wish[Pause], plan: Plan | None) -> bool:
        paused = wish.node_id in self.paused_ids()
        if wish.message.resume:
            return not paused
        return paused and plan is not None and owns_nothing(plan, wish.node_id)

    def _too_late(self, wish: Wish[Pause]) -> str:
        name = wish.message.name or self._me.name
        if wish.message.resume:
            return f"{name} has not answered within {self._timeout:g} s; see p2pinfer status"
        return (
            f"{name} could not hand over its units within {self._timeout:g} s: the others may lack "
            f"memory, or the cluster a leader; see p2pinfer plan --without {name}"
        )

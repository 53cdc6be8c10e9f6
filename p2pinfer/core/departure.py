"""Leaving in good order: a node that is to go says so, and goes when others hold what it held.

A draining node says `draining` in its heartbeats; the leader's next plans give it nothing, neither
to own nor, once others have replicas of what it had, to keep. When such a plan is in force here the
node says LEAVE and ends. After `drain_timeout` it no longer waits for replicas. Told by a signal it
leaves then whatever came of it, and at once where nobody is left who could take anything over; told
by an operator it stays if it owns anything still.
"""

from __future__ import annotations

from math import inf

from p2pinfer.core.events import Draining, NodeConfig
from p2pinfer.core.holdings import keeps_nothing, owns_nothing, places
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.pausing import Pausing
from p2pinfer.core.wishes import Wishes
from p2pinfer.types import Member, Plan
from p2pinfer.wire.messages import Drain, MemberState, Pause

ELECTIONS = 4
"""A node that was told to end waits for so many elections where nobody leads: most are won sooner,
and what it holds is worth a new leader's plan."""


class Departure:
    """Whether this node is on its way out, and what clients asked of others. Times in seconds."""

    def __init__(self, config: NodeConfig, near: Neighbours, box: Outbox) -> None:
        self.draining = False
        self.for_good = False
        """It will not come back: it forgets its cluster."""
        self._timeout = config.drain_timeout
        self._election_s = ELECTIONS * config.timing.election_max
        self._me = config.member
        self._near = near
        self._box = box
        self._anyway = False
        self._until = inf
        self._leaderless_until = inf
        """Until when a leader to make a plan is waited for; inf: one leads."""
        self._wishes: Wishes[Drain] = Wishes(config.drain_timeout, box)
        self._empty: set[str] = set()
        """Node ids of those that drain and have handed all over, while a client waits for any."""
        self.pausing = Pausing(config, near, box)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        leaderless = self._leaderless_until if self._anyway else inf
        return min(self._until, leaderless, self.pausing.deadline, self._wishes.deadline)

    # --- asked ------------------------------------------------------------------------------------

    def leave(self, now: float) -> None:
        """The process was told to end."""
        self._anyway = True
        self._drain(now)

    def asked(self, message: Drain | Pause, route: bytes, now: float) -> None:
        """A client of this node wants a member to leave, or to pause; no name: this one, which
        leaves for good."""
        if isinstance(message, Pause):
            self.pausing.asked(message, route, now)
            return
        name = message.name
        peer = next((p for p in self._near.table.living() if p.member.name == name), None)
        own = name in ("", self._me.name)
        about = self._me.node_id if own else peer.member.node_id if peer else ""
        if not about:
            names = ", ".join(sorted(m.name for m in self._near.table.members()))
            reason = f"no member is called {name}; there are: {names}"
            self._wishes.refuse(message, route, "invalid_request", reason)
            return
        self._wishes.add(message, route, about, now)
        if own:
            self.for_good |= not name
            self._drain(now)
        else:
            self._box.send(about, message)

    def told(self, message: Drain | Pause, now: float) -> None:
        """Another member passes an operator's wish on."""
        if isinstance(message, Pause):
            self.pausing.told(message, now)
        elif message.name == self._me.name:
            self._drain(now)

    def _drain(self, now: float) -> None:
        if not self.draining:
            self.draining, self._until = True, now + self._timeout
            self._box.add(Draining(for_good=self.for_good, timeout_s=self._timeout))
            self._leaderless_until = inf
            self._near.speak_soon(now)

    # --- what comes of it -------------------------------------------------------------------------

    def lost(self, member: Member, state: MemberState, *, ended: bool) -> None:
        """A member is gone: perhaps the one that a client waits for. `ended`: its process is.

        The end of its links may be seen before its LEAVE is heard: then what it had left tells
        whether it went in good order.
        """
        self.pausing.lost(member)
        left = state is MemberState.LEFT or (ended and member.node_id in self._empty)
        for wish in self._wishes.about(member.node_id):
            if left:
                self._wishes.done(wish)
            else:
                reason = f"{member.name} died before it had handed over its part"
                self._wishes.fail(wish, "node_lost", reason)

    def look(self, plan: Plan | None, *, ready: bool, began: bool, led: bool, now: float) -> bool:
        """Whether this node is to leave now.

        `plan` is the one in force here, and `ready` says that all its owners obey it; `began` that
        this node takes part in plans, be one in force or not; `led`: somebody leads, who could make
        another.
        """
        self.pausing.look(plan, ready=ready, now=now)
        self._empty = set() if not self._wishes else self._emptied(plan if ready else None)
        for wish in self._wishes.too_old(now):
            self._wishes.fail(wish, "not_ready", self._too_late(wish.message.name or self._me.name))
        if not self.draining:
            return False
        patience = min(self._leaderless_until, now + self._election_s)
        self._leaderless_until = inf if led else patience
        if self._done(plan, ready, began):
            return True
        if self._anyway and (now >= self._leaderless_until or not self._others()):
            return True
        if self.for_good and not self._near.table.living():
            return True
        if now < self._until:
            return False
        if self._anyway or (plan and ready and _needed_by_none(plan, self._me.node_id)):
            return True
        self._until = inf
        self.draining = self.for_good = False
        for wish in self._wishes.about(self._me.node_id):
            self._wishes.fail(wish, "not_ready", self._too_late(self._me.name))
        return False

    def end(self, error: str) -> None:
        """This node ends now, as it was told (`error` empty) or because it cannot go on: nobody
        waits for an answer any more."""
        self.pausing.end()
        for wish in self._wishes.about(self._me.node_id):
            if error:
                self._wishes.fail(wish, "node_lost", f"{self._me.name} cannot go on: {error}")
            else:
                self._wishes.done(wish)
        self._wishes.turn_away(f"{self._me.name} is leaving; ask another node")

    def _done(self, plan: Plan | None, ready: bool, began: bool) -> bool:
        """Whether this node has nothing left that others might need.

        Who has never taken part in a plan has nothing to hand over, and may go if it was told to
        end. The others must know that a plan is in force: until then they may need this node's
        vote, as they would by the plan before.
        """
        if plan is None:
            return self._anyway and not began
        return ready and _holds_nothing(plan, self._me.node_id)

    def _emptied(self, obeyed: Plan | None) -> set[str]:
        """Node ids of those that drain and have, or had, nothing by a plan that all obey."""
        return {
            peer.member.node_id
            for peer in self._near.table.living()
            if peer.heartbeat
            and peer.heartbeat.draining
            and (
                peer.member.node_id in self._empty
                or (obeyed and _holds_nothing(obeyed, peer.member.node_id))
            )
        }

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


def _needed_by_none(plan: Plan, node_id: str) -> bool:
    """Whether a plan gives a node no unit to own, and no vote: whoever goes with a vote that the
    others need leaves them unable to elect anybody."""
    return owns_nothing(plan, node_id) and not set(plan.voters) & set(places(plan, node_id))


def _holds_nothing(plan: Plan, node_id: str) -> bool:
    """The same, and no unit to keep: as long as it keeps replicas, those that are to take their
    place are not complete."""
    return _needed_by_none(plan, node_id) and keeps_nothing(plan, node_id)

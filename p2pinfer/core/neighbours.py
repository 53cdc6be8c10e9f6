"""The other members as this node sees them: its table, its links, heartbeats, doubts and losses.

Who is there is decided on direct evidence: a connection that breaks makes a member suspect and has
it probed, a refused probe or silence makes it dead, its heartbeat clears every doubt. Heartbeats
carry the whole table as rumours; those make this node look for itself. Nobody else's death, the
leader's included, changes the table.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from math import inf
from typing import Protocol

from msgspec.structs import replace

from p2pinfer.core.election import Election
from p2pinfer.core.events import (
    FrameDropped,
    NodeConfig,
    Output,
    PeerDead,
    PeerJoined,
    PeerLeft,
    PeerSuspected,
    Probe,
    ProbeAnswered,
    WorkerStats,
)
from p2pinfer.core.links import Links
from p2pinfer.core.membership import Membership, Peer
from p2pinfer.core.outbox import Outbox
from p2pinfer.limits import MAX_NODES, MAX_REASON_CHARS
from p2pinfer.types import Fence, Member
from p2pinfer.wire.messages import ControlMessage, Heartbeat, MemberState, Rumour

MAX_ROUTES = 4 * MAX_NODES
"""Connections that are known to belong to a member; the oldest is forgotten first."""

REFUSES = "it refuses connections"
"""Why a member is dead whose process is gone; any other may be cut off and come back."""

PROBE_AGAIN_PERIODS = 2
"""A suspect whose port was open is probed again after so many heartbeat periods of silence: a dying
process may close its connections before its port."""


@dataclass(slots=True)
class _Probing:
    """An address that is looked at, for whose sake, and when it was answered (inf: not yet)."""

    address: str
    member: Member
    answered_at: float = inf


class OnLost(Protocol):
    """Told of every member that is lost, once the table and the links say so."""

    def __call__(self, peer: Peer, state: MemberState, reason: str, now: float) -> None: ...


class Neighbours:
    """`cluster_id` is empty while this node is in no cluster. Times in seconds, as awake time."""

    def __init__(
        self, config: NodeConfig, links: Links, election: Election, box: Outbox, on_lost: OnLost
    ) -> None:
        self.cluster_id = ""
        self.table = Membership(config.member, config.timing)
        self.links = links
        self._config = config
        self._election = election
        self._box = box
        self._on_lost = on_lost
        self._routes: dict[bytes, str] = {}
        self._probes: dict[str, _Probing] = {}
        self._heartbeat_at = -inf
        self._stretch = 1.0

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        if not self.table.living():
            return inf
        return min(self._heartbeat_at, self.table.next_death(self._dead_after))

    def put(self, outputs: list[Output]) -> None:
        """Pass on what a part of this returned."""
        for output in outputs:
            self._box.add(output)

    def drop(self, message: ControlMessage, reason: str) -> None:
        """Say that a message was ignored."""
        self._box.add(FrameDropped(reason=f"{type(message).__name__}: {reason}"))

    # --- links ------------------------------------------------------------------------------------

    def open(self, address: str) -> None:
        """Ask for a link, except to this node itself."""
        if address != self._config.member.address:
            self.put(self.links.open(address))

    def close(self, member: Member) -> None:
        """Close every link to a member. Another node may live at its address by now."""
        self.put(self.links.close_all(member))
        if any(peer.member.address == member.address for peer in self.table.living()):
            self.open(member.address)

    def came_by(self, route: bytes, node_id: str) -> None:
        """A connection to this node is known to be that member's."""
        self._routes[route] = node_id
        while len(self._routes) > MAX_ROUTES:
            del self._routes[next(iter(self._routes))]

    def sender(self, route: bytes) -> str:
        """The living member at the other end of a connection to this node, or ""."""
        peer = self.table.get(self._routes.get(route, ""))
        return peer.member.node_id if peer and peer.living else ""

    def link_down(self, address: str) -> None:
        """One of our links broke: whoever was behind it is suspect."""
        if peer := self.table.get(self.links.went_down(address)):
            self.doubt(peer, "its connection broke", address)

    # --- coming and going -------------------------------------------------------------------------

    def add(self, member: Member, now: float, *, spoke: bool) -> None:
        """A member is there. `spoke`: it greeted us; else it answered us, or is on a list.

        The greeting of one that was lost does not bring it back: only its answer to ours shows
        that it hears us too. Otherwise a cut in one direction would bring it back again and again.
        """
        known = self.table.get(member.node_id)
        lost = known is not None and not known.living and known.member.boot_id == member.boot_id
        if spoke and lost:
            self.open(member.address)
            self.links.greet_again(member.address)
            return
        if self.table.join(member, now, spoke=spoke):
            self._box.add(PeerJoined(member=member))
        self.open(member.address)

    def doubt(self, peer: Peer, reason: str, address: str = "") -> None:
        """Suspect a living peer, and have somebody look whether its process is there."""
        member = peer.member
        if not peer.living:
            return
        if self.table.suspect(member.node_id):
            self._box.add(PeerSuspected(name=member.name, node_id=member.node_id, reason=reason))
        self._probe(member, address or member.address)

    def _probe(self, member: Member, address: str) -> None:
        self._probes[member.node_id] = _Probing(address, member)
        self._box.add(Probe(address=address))

    def probe_answered(self, event: ProbeAnswered, now: float) -> None:
        """A suspect whose port is closed is dead; an open port proves nothing."""
        for probing in [p for p in self._probes.values() if p.address == event.address]:
            peer = self.table[probing.member.node_id]
            suspect = peer.state is MemberState.SUSPECT
            if not suspect or peer.member.boot_id != probing.member.boot_id:
                del self._probes[probing.member.node_id]
            elif event.refused:
                self.lose(peer, MemberState.DEAD, REFUSES, now)
            else:
                probing.answered_at = now

    def _probe_again(self, now: float) -> None:
        """Look again at suspects that still say nothing."""
        after = PROBE_AGAIN_PERIODS * self._config.timing.heartbeat_every
        for node_id, probing in list(self._probes.items()):
            peer = self.table[node_id]
            if peer.state is not MemberState.SUSPECT:
                del self._probes[node_id]
            elif probing.answered_at + after <= now:
                self._probe(peer.member, probing.address)

    def lose(self, peer: Peer, state: MemberState, reason: str, now: float) -> None:
        """A member is `DEAD` or has `LEFT`."""
        member, node_id = peer.member, peer.member.node_id
        self.table.lose(node_id, state, now)
        self._routes = {r: owner for r, owner in self._routes.items() if owner != node_id}
        self._probes.pop(node_id, None)
        self.close(member)
        if state is MemberState.LEFT:
            self._box.add(PeerLeft(name=member.name, node_id=node_id))
        else:
            silence = now - peer.heard_at
            self._box.add(
                PeerDead(name=member.name, node_id=node_id, reason=reason, silence_s=silence)
            )
        self._on_lost(peer, state, reason, now)

    # --- heartbeats -------------------------------------------------------------------------------

    def heartbeat(
        self,
        fence: Fence,
        stats: WorkerStats,
        now: float,
        *,
        hung: bool,
        draining: bool,
        paused: bool = False,
    ) -> Heartbeat:
        """This node's heartbeat, but for the echo of each receiver's clock."""
        ids = {peer.member.node_id for peer in self.table.living()}
        return Heartbeat(
            node_id=self.table.me.node_id,
            boot_id=self.table.me.boot_id,
            incarnation=self.table.incarnation,
            term=self._election.term,
            fence=fence,
            leader_id=self._election.leader_id,
            steps=stats.steps,
            owes_step=stats.owes_step,
            rumours=self.table.rumours(),
            hears_control=tuple(sorted(self.table.heard_ids(now, self._stretch))),
            hears_steps=tuple(node_id for node_id in stats.hears_steps if node_id in ids),
            sent_at_ms=round(now * 1000),
            tokens_per_s=stats.tokens_per_s,
            kv_used_bytes=stats.kv_used_bytes + stats.kv_standby_bytes + stats.kv_inputs_bytes,
            kv_limit_bytes=stats.kv_limit_bytes,
            kv_inputs_bytes=stats.kv_inputs_bytes,
            hung=hung,
            draining=draining,
            compute_ms=stats.compute_ms,
            paused=paused,
            standby_fence=stats.fence if stats.fence != Fence() else None,
            standby_units=stats.standby_units_wanted,
            standby_units_ready=stats.standby_units_ready,
            standby_units_warm=stats.standby_units_warm,
            standby_behind=stats.standby_behind,
            standby_error=stats.standby_error[:MAX_REASON_CHARS],
            round_trips=self.table.me.round_trips,
        )

    def sure_ids(self, now: float) -> frozenset[str]:
        """Node ids of the peers that are there for sure: heard just now, and not suspected."""
        return frozenset(
            node_id
            for node_id in self.table.heard_ids(now)
            if self.table[node_id].state is MemberState.ALIVE
        )

    def speak_soon(self, now: float) -> None:
        """Something happened that the others should know at once: send heartbeats when next
        looked at."""
        self._heartbeat_at = min(self._heartbeat_at, now)

    def look(
        self, own: Heartbeat, now: float, *, stretch: float = 1.0, kept: Collection[str] = ()
    ) -> None:
        """Lose who fell silent, forget who is gone for long, and send heartbeats when it is time.

        `own` is this node's heartbeat as it stands; `stretch` is the local health's. `kept` are
        the node ids that the newest plan names, which are not forgotten.
        """
        self._stretch = stretch
        for peer in self.table.silent(now, self._dead_after):
            self.lose(peer, MemberState.DEAD, "it fell silent", now)
        self._probe_again(now)
        for member in self.table.forget_gone(now, kept):
            self.close(member)
        if now < self._heartbeat_at:
            return
        self._heartbeat_at = now + self._config.timing.heartbeat_every
        for peer in self.table.living():
            node_id = peer.member.node_id
            self._box.send(node_id, replace(own, echo_ms=self.table.echo_ms(node_id, now)))

    @property
    def _dead_after(self) -> float:
        return self._config.timing.dead_after * self._stretch

    def heard(self, heartbeat: Heartbeat, now: float) -> bool:
        """Take in a member's heartbeat; false when it is of another life of that node."""
        peer = self.table[heartbeat.node_id]
        if peer.member.boot_id != heartbeat.boot_id:
            self.drop(heartbeat, "it is of another life of its sender")
            return False
        self.table.heard(heartbeat, now)
        self.table.refute(heartbeat.rumours)
        for rumour in heartbeat.rumours:
            if rumour.node_id != self.table.me.node_id:
                self._weigh(rumour, peer, now)
        self.links.greet_refused(peer.member.address)
        return True

    def _weigh(self, rumour: Rumour, teller: Peer, now: float) -> None:
        """A rumour about another node: look for ourselves, by greeting it or by probing it."""
        peer = self.table.get(rumour.node_id)
        if peer is None:
            # The teller's answer to a greeting lists the members that it knows.
            if rumour.state is MemberState.ALIVE:
                self.links.greet_again_after_a_while(teller.member.address, now)
            return
        gone = rumour.state in (MemberState.DEAD, MemberState.LEFT)
        same = peer.member.boot_id == rumour.boot_id and rumour.incarnation >= peer.incarnation
        silent = now - peer.heard_at > 3 * self._config.timing.heartbeat_every
        if gone and same and silent and rumour.node_id not in self._probes:
            self.doubt(peer, f"{teller.member.name} has lost it")

"""HELLO, WELCOME and REFUSED: how a node finds a cluster, and how members come to know each other.

A node that is not in a cluster greets every address it knows until a member welcomes it. Members
greet each other on every connection they open, so that each knows who is at the other end.
"""

from __future__ import annotations

from math import inf
from typing import Protocol

from p2pinfer.core.admission import (
    Gate,
    check_hello,
    common_version,
    make_hello,
)
from p2pinfer.core.election import Election
from p2pinfer.core.events import JoinWaiting, NodeConfig, PeerRefused, ReplyTo, Send
from p2pinfer.core.membership import Peer
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.types import Member
from p2pinfer.wire.codec import VERSIONS
from p2pinfer.wire.messages import Hello, MemberState, Refused, Welcome

JOIN_WAITING_EVERY_S = 5.0


class Host(Protocol):
    """The node, as far as greeting concerns it."""

    def joined(self, leader: Member, now: float) -> None:
        """This node is in a cluster now, and follows `leader`."""

    def fail(self, error: str, exit_code: int, now: float) -> None:
        """This node cannot go on."""

    def has_acked(self, member: Member) -> bool:
        """Whether this node leads, and that member has acknowledged its newest plan."""


class Greeter:
    """Greets and is greeted. Times in seconds."""

    def __init__(
        self, config: NodeConfig, near: Neighbours, election: Election, box: Outbox, host: Host
    ) -> None:
        self._config = config
        self._near = near
        self._election = election
        self._box = box
        self._host = host
        self._since = 0.0
        self._give_up_at = inf
        self._say_at = inf
        self._last_answer = ""
        self._met_itself = False
        self._lost_leader: Member | None = None

    # --- looking for a cluster --------------------------------------------------------------------

    def join(self, now: float) -> None:
        """Look for a cluster at the `--join` addresses, for a limited time."""
        self._give_up_at = now + self._config.join_timeout
        self._seek(self._config.join, now)

    def rejoin(self, leader: Member, addresses: tuple[str, ...], now: float) -> None:
        """The cluster is over, for its leader is gone: look for a new one, for ever."""
        self._lost_leader = leader
        self._give_up_at = inf
        self._seek((*self._config.join, leader.address, *addresses), now)

    def _seek(self, addresses: tuple[str, ...], now: float) -> None:
        self._since, self._say_at = now, now + JOIN_WAITING_EVERY_S
        for address in addresses:
            self._near.open(address)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        due = self._near.links.next_due()
        return due if self._near.cluster_id else min(due, self._give_up_at, self._say_at)

    def look(self, now: float) -> None:
        """Greet where it is due; while looking for a cluster say so, and give up in the end."""
        for link in self._near.links.due(now):
            self.greet(link.address, now)
        if self._near.cluster_id:
            return
        waited = now - self._since
        if now >= self._give_up_at:
            asked = ", ".join(self._config.join)
            answer = f" (last answer: {self._last_answer})" if self._last_answer else ""
            self._host.fail(
                f"no node answered at {asked} within {waited:.0f} s{answer}: "
                f"start a node there, correct --join, or leave --join out to found a cluster",
                1,
                now,
            )
        elif now >= self._say_at:
            self._say_at = now + JOIN_WAITING_EVERY_S
            self._box.add(JoinWaiting(addresses=self._near.links.addresses(), waited_s=waited))

    # --- greeting ---------------------------------------------------------------------------------

    def link_up(self, address: str, now: float) -> None:
        """A link is connected: greet whoever is there."""
        if self._near.links.went_up(address):
            self.greet(address, now)

    def greet(self, address: str, now: float) -> None:
        """Say HELLO on one of our links."""
        self._near.links.greeted(address, now)
        me, cluster_id = self._near.table.me, self._near.cluster_id
        hello = make_hello(me, self._config.model, cluster_id, self._config.layout)
        self._box.add(Send(address=address, message=hello))

    def greeted(self, hello: Hello, route: bytes, now: float) -> None:
        """Somebody says HELLO: welcome it, or say why not."""
        me, theirs, near = self._near.table.me, hello.member, self._near
        peers = tuple(peer.member for peer in near.table.living())
        refused = check_hello(hello, Gate(me, self._config.model, near.cluster_id, peers))
        if refused:
            self._met_itself |= (theirs.node_id, theirs.boot_id) == (me.node_id, me.boot_id)
            self._box.add(ReplyTo(route=route, message=refused))
            if refused.code != "not_ready":
                self._tell(theirs.address, refused, by_us=True)
            return
        known = near.table.get(theirs.node_id)
        if known and known.living and self._is_reborn(known, hello):
            near.lose(known, MemberState.DEAD, "it started again", now)
            # If that was the leader, this node has no cluster to welcome anybody to.
            self.greeted(hello, route, now)
            return
        near.came_by(route, theirs.node_id)
        welcome = Welcome(
            version=common_version(hello.versions),
            member=me,
            cluster_id=near.cluster_id,
            leader_id=self._election.leader_id,
            members=tuple(peer for peer in peers if peer.node_id != theirs.node_id),
        )
        self._box.add(ReplyTo(route=route, message=welcome))
        near.add(theirs, now, spoke=True)

    def _is_reborn(self, known: Peer, hello: Hello) -> bool:
        """Another process, or one that has forgotten this cluster since it acknowledged a plan."""
        if known.member.boot_id != hello.member.boot_id:
            return True
        return not hello.cluster_id and self._host.has_acked(known.member)

    # --- answers ----------------------------------------------------------------------------------

    def welcomed(self, welcome: Welcome, address: str, now: float) -> None:
        """A member answers our greeting on the link to `address`."""
        near, theirs = self._near, welcome.member
        if address not in near.links or welcome.version not in VERSIONS:
            near.drop(welcome, "this node did not ask for it")
            return
        if not near.cluster_id and not self._adopt(welcome, now):
            return
        if welcome.cluster_id != near.cluster_id:
            near.drop(welcome, f"it is of cluster {welcome.cluster_id}")
            return
        known = near.table.get(theirs.node_id)
        if known and known.living and known.member.boot_id != theirs.boot_id:
            near.lose(known, MemberState.DEAD, "it started again", now)
            return
        near.put(near.links.answered(address, theirs.node_id, theirs.address))
        near.add(theirs, now, spoke=False)
        for member in welcome.members:
            if near.table.get(member.node_id) is None and member.node_id != near.table.me.node_id:
                near.add(member, now, spoke=False)
            else:
                # Whoever is there now, its answer to our greeting will tell.
                near.open(member.address)

    def _adopt(self, welcome: Welcome, now: float) -> bool:
        """Enter the cluster of a welcome, unless its leader is the one that was just lost."""
        listed = {m.node_id: m for m in (*welcome.members, welcome.member)}
        leader = listed.get(welcome.leader_id)
        if leader is None or leader.node_id == self._near.table.me.node_id:
            self._near.drop(welcome, "it names no leader among its members")
            return False
        gone = self._lost_leader
        same = gone and (gone.node_id, gone.boot_id) == (leader.node_id, leader.boot_id)
        if same and welcome.member.node_id != leader.node_id:
            self._near.drop(welcome, "its sender has not missed the lost leader yet")
            return False
        self._near.cluster_id = welcome.cluster_id
        self._near.add(leader, now, spoke=False)
        self._host.joined(leader, now)
        return True

    def refused(self, refused: Refused, address: str, now: float) -> None:
        """Our greeting on the link to `address` is refused: for now, or for good."""
        near = self._near
        if address not in near.links:
            return
        self._last_answer = refused.message
        leader = near.table.get(self._election.leader_id)
        if refused.code == "not_a_member":
            near.links.greet_again(address)
        elif refused.code == "identity_taken" and self._met_itself:
            self._close_own(address, now)
        elif refused.retryable:
            near.links.refused(address, for_good=False)
        else:
            near.links.refused(address, for_good=True)
            self._tell(address, refused, by_us=False)
            if not near.cluster_id:
                self._host.fail(refused.message, 1, now)
            elif leader and address == leader.member.address:
                if refused.code == "wrong_cluster":
                    near.lose(leader, MemberState.DEAD, "it is in another cluster", now)
                else:
                    self._host.fail(refused.message, 1, now)

    def _close_own(self, address: str, now: float) -> None:
        """One of the addresses to join is this node's own."""
        self._near.put(self._near.links.close(address))
        if not self._near.cluster_id and not self._near.links.addresses():
            self._host.fail(
                f"{address} is this node itself: give --join the address of another node, or "
                f"leave it out to found a cluster",
                2,
                now,
            )

    def _tell(self, address: str, refused: Refused, *, by_us: bool) -> None:
        self._box.add(
            PeerRefused(address=address, code=refused.code, message=refused.message, by_us=by_us)
        )

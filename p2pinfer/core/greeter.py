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
from p2pinfer.core.neighbours import Neighbours
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import may_work
from p2pinfer.wire.codec import VERSIONS
from p2pinfer.wire.messages import Hello, MemberState, Refused, Welcome

JOIN_WAITING_EVERY_S = 5.0


class Host(Protocol):
    """The node, as far as greeting concerns it."""

    @property
    def planned(self) -> bool:
        """Whether this node has accepted a plan of its cluster."""

    def known_addresses(self) -> tuple[str, ...]:
        """Where members that are not there may come back: hints, no more."""

    def fail(self, error: str, exit_code: int, now: float) -> None:
        """This node cannot go on."""


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
        self._knock_at = -inf
        self._last_answer = ""
        self._met_itself = False

    # --- looking for a cluster --------------------------------------------------------------------

    def join(self, now: float) -> None:
        """Look for a cluster at the `--join` addresses, for a limited time."""
        self._give_up_at = now + self._config.join_timeout
        self._seek(self._config.join, now)

    def come_back(self, addresses: tuple[str, ...], now: float) -> None:
        """This node has been in a cluster: greet its members, for ever; addresses are hints."""
        self._give_up_at = inf
        self._seek(addresses, now)

    def _seek(self, addresses: tuple[str, ...], now: float) -> None:
        self._since, self._say_at = now, now + JOIN_WAITING_EVERY_S
        for address in addresses:
            self._near.open(address)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        due = self._near.links.next_due()
        if self._near.cluster_id:
            return min(due, self._knock_at)
        return min(due, self._give_up_at, self._say_at)

    def look(self, now: float) -> None:
        """Greet where it is due; while looking for a cluster say so, and give up in the end."""
        for link in self._near.links.due(now):
            self.greet(link.address, now)
        if self._near.cluster_id:
            self._knock(now)
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

    def _knock(self, now: float) -> None:
        """Greet where members that are gone may be again: a cut cable looks like a death to both
        sides, and neither hears when it is mended."""
        if now < self._knock_at:
            return
        self._knock_at = now + self._config.timing.hello_retry
        links = self._near.links
        living = self._near.table.living()
        here = {peer.member.address for peer in living}
        for address in self._host.known_addresses():
            if address not in here:
                self._near.open(address)
                links.greet_again_after_a_while(address, now)
        for peer in living:
            # It will say more of itself one day, and that word may be lost.
            link = links.to(peer.member.node_id)
            if link and (peer.member.blank or not may_work(peer.member)):
                self.greet(link, now)

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
        gate = Gate(me, self._config.model, near.cluster_id, peers, heard=near.sure_ids(now))
        refused = check_hello(hello, gate)
        if refused:
            self._met_itself |= (theirs.node_id, theirs.boot_id) == (me.node_id, me.boot_id)
            self._box.add(ReplyTo(route=route, message=refused))
            if refused.code != "not_ready":
                self._tell(theirs.address, refused, by_us=True)
            return
        known = near.table.get(theirs.node_id)
        if known and known.living and known.member.boot_id != theirs.boot_id:
            near.lose(known, MemberState.DEAD, "it started again", now)
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

    # --- answers ----------------------------------------------------------------------------------

    def welcomed(self, welcome: Welcome, address: str, now: float) -> None:
        """A member answers our greeting on the link to `address`."""
        near, theirs = self._near, welcome.member
        if address not in near.links or welcome.version not in VERSIONS:
            near.drop(welcome, "this node did not ask for it")
            return
        if theirs.node_id == near.table.me.node_id:
            near.drop(welcome, "its sender has this node's identity")
            return
        if not near.cluster_id:
            near.cluster_id = welcome.cluster_id
        if welcome.cluster_id != near.cluster_id:
            near.drop(welcome, f"it is of cluster {welcome.cluster_id}")
            return
        known = near.table.get(theirs.node_id)
        if known and known.living and known.member.boot_id != theirs.boot_id:
            near.lose(known, MemberState.DEAD, "it started again", now)
            return
        near.put(near.links.answered(address, theirs.node_id, theirs.address))
        near.add(theirs, now, spoke=False)
        near.table.describe(theirs)
        for member in welcome.members:
            if near.table.get(member.node_id) is None and member.node_id != near.table.me.node_id:
                near.add(member, now, spoke=False)
            else:
                # Whoever is there now, its answer to our greeting will tell.
                near.open(member.address)

    def refused(self, refused: Refused, address: str, now: float) -> None:
        """Our greeting on the link to `address` is refused: for now, or for good."""
        near = self._near
        if address not in near.links:
            return
        self._last_answer = refused.message
        if refused.code == "not_a_member":
            near.links.greet_again(address)
        elif refused.code == "identity_taken" and self._met_itself:
            self._close_own(address, now)
        elif refused.retryable:
            near.links.refused(address, for_good=False)
        else:
            near.links.refused(address, for_good=True)
            self._tell(address, refused, by_us=False)
            if self._hopeless(refused.code):
                self._host.fail(refused.message, 1, now)

    def _hopeless(self, code: str) -> bool:
        """Whether a refusal for good leaves this node no way on.

        One that has been in a cluster knows addresses as hints only: another cluster may be behind
        one of them by now. So it goes on while a member, or a link that may still be answered, is
        left. A joiner whose cluster is gone before its first plan has nothing to come back to.
        """
        near, config = self._near, self._config
        if not near.cluster_id:
            return True
        if near.table.living() or near.links.hopeful:
            return False
        joined = bool(config.join) and config.stored is None
        return code != "wrong_cluster" or (joined and not self._host.planned)

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

    def unknown(self, route: bytes) -> None:
        """Tell somebody who takes us for a fellow member that it must greet us (again)."""
        name = self._config.member.name
        answer = Refused(
            code="not_a_member", message=f"{name} does not know you; greet it", retryable=True
        )
        self._box.add(ReplyTo(route=route, message=answer))

"""This node's own control links, one per address, and the greeting (HELLO) on each.

An address is a hint; who is behind it shows in the answer to HELLO. A link that was opened through
another address than the peer's own (a `--join` address) serves until the peer's own one answers.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from p2pinfer.core.events import CloseLink, OpenLink, Output
from p2pinfer.core.timing import LAN, Timing
from p2pinfer.types import Member


@dataclass(slots=True)
class Link:
    """One of our links. `node_id` is who answered on it, empty while nobody has."""

    address: str
    up: bool = False
    greeted_at: float = -inf
    node_id: str = ""
    refused: bool = False
    """The last answer to a greeting was a refusal."""

    given_up: bool = False
    """That refusal was for good: greet no more on this connection."""

    @property
    def unanswered(self) -> bool:
        """Whether this node still has to greet on this link."""
        return self.up and not self.node_id and not self.given_up


class Links:
    """The links that this node has asked for."""

    def __init__(self, timing: Timing = LAN) -> None:
        self._retry = timing.hello_retry
        self._links: dict[str, Link] = {}

    def __contains__(self, address: str) -> bool:
        return address in self._links

    def addresses(self) -> tuple[str, ...]:
        """All addresses that have a link."""
        return tuple(self._links)

    def open(self, address: str) -> list[Output]:
        """Ask for a link unless there is one."""
        if address in self._links:
            return []
        self._links[address] = Link(address=address)
        return [OpenLink(address=address)]

    def close(self, address: str) -> list[Output]:
        """Give up the link to `address`, if there is one."""
        return [CloseLink(address=address)] if self._links.pop(address, None) else []

    def went_up(self, address: str) -> Link | None:
        """The link is connected, to whom must be asked (again). None: it is no link of ours."""
        link = self._links.get(address)
        if link:
            link.up, link.node_id, link.refused, link.given_up = True, "", False, False
        return link

    def went_down(self, address: str) -> str:
        """The link broke; returns who was behind it, or ""."""
        link = self._links.get(address)
        if link is None:
            return ""
        link.up, node_id = False, link.node_id
        link.node_id = ""
        return node_id

    def answered(self, address: str, node_id: str, own_address: str) -> list[Output]:
        """`node_id` answered on a link. Of two links to it the one to its own address stays."""
        self._links[address].node_id = node_id
        if address != own_address:
            own = self._links.get(own_address)
            doubled = own is not None and own.node_id == node_id
            return self.close(address) if doubled else self.open(own_address)
        aliases = [a for a, k in self._links.items() if k.node_id == node_id and a != own_address]
        return [output for alias in aliases for output in self.close(alias)]

    def greeted(self, address: str, now: float) -> None:
        """HELLO was sent on a link."""
        self._links[address].greeted_at = now

    def refused(self, address: str, *, for_good: bool) -> None:
        """HELLO was refused on a link."""
        link = self._links[address]
        link.refused, link.given_up = True, for_good

    def greet_refused(self, address: str) -> None:
        """Who refused us for a time is a member now, for it sends heartbeats: greet it at once."""
        link = self._links.get(address)
        if link and link.unanswered and link.refused:
            link.refused, link.greeted_at = False, -inf

    def greet_again_after_a_while(self, address: str, now: float) -> None:
        """Greet on an answered link once more, but not more often than on an unanswered one."""
        link = self._links.get(address)
        if link and link.node_id and link.greeted_at + self._retry <= now:
            self.greet_again(address)

    def greet_again(self, *addresses: str) -> None:
        """Whoever is behind these links knows us no more: they count as unanswered."""
        for link in self._links.values():
            if link.address in addresses:
                link.node_id, link.greeted_at, link.given_up = "", -inf, False

    def close_all(self, member: Member) -> list[Output]:
        """Close the link to a member's own address and every other one it answered on; not one on
        which another node answers by now."""
        addresses = [k.address for k in self._links.values() if k.node_id == member.node_id]
        own = self._links.get(member.address)
        if own and not own.node_id:
            addresses.append(own.address)
        return [output for address in addresses for output in self.close(address)]

    def due(self, now: float) -> list[Link]:
        """Connected links whose greeting is to be sent now (again)."""
        return [
            link
            for link in self._links.values()
            if link.unanswered and link.greeted_at + self._retry <= now
        ]

    def connected(self) -> tuple[str, ...]:
        """Addresses of the links that are up, and on which greeting makes sense."""
        return tuple(k.address for k in self._links.values() if k.up and not k.given_up)

    @property
    def hopeful(self) -> bool:
        """Whether any of these links is not refused for good."""
        return not all(link.given_up for link in self._links.values())

    def next_due(self) -> float:
        """When the next greeting is due."""
        return min(
            (k.greeted_at + self._retry for k in self._links.values() if k.unanswered),
            default=inf,
        )

    def to(self, node_id: str) -> str:
        """The address of a connected link on which that node answered, or ""."""
        for address, link in self._links.items():
            if link.node_id == node_id:
                return address
        return ""

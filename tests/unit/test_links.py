"""This node's own links, and the greeting on each."""

from __future__ import annotations

from math import inf

from p2pinfer.core.events import CloseLink, OpenLink, Output
from p2pinfer.core.links import Links
from p2pinfer.core.timing import LAN, TEST
from p2pinfer.types import Member

HERE, ALIAS = "tcp://h2:7720", "tcp://alias:7720"
PEER = Member(node_id="2" * 16, boot_id="3" * 16, name="node2", address=HERE)


def opened(address: str) -> list[Output]:
    return [OpenLink(address=address)]


def closed(*addresses: str) -> list[Output]:
    return [CloseLink(address=address) for address in addresses]


def links_up(*addresses: str) -> Links:
    """Links that are connected, and greeted at time 0."""
    links = Links(LAN)
    for address in addresses:
        links.open(address)
        links.went_up(address)
        links.greeted(address, 0.0)
    return links


def test_one_link_per_address() -> None:
    """A link is opened once and closed once."""
    links = Links(LAN)
    assert links.open(HERE) == opened(HERE)
    assert links.open(HERE) == []
    assert HERE in links
    assert links.addresses() == (HERE,)
    assert links.close(HERE) == closed(HERE)
    assert links.close(HERE) == []


def test_a_connected_link_is_greeted_until_it_answers() -> None:
    """Greetings are due at once and then each hello_retry, until the other end has answered."""
    links = Links(TEST)
    links.open(HERE)
    assert (links.due(0.0), links.next_due()) == ([], inf)
    links.went_up(HERE)
    assert [link.address for link in links.due(0.0)] == [HERE]
    links.greeted(HERE, 0.0)
    assert links.due(0.1) == []
    assert links.next_due() == TEST.hello_retry
    assert len(links.due(TEST.hello_retry)) == 1
    assert links.answered(HERE, PEER.node_id, HERE) == []
    assert links.due(9.0) == []
    assert links.to(PEER.node_id) == HERE
    assert links.to("4" * 16) == ""


def test_a_broken_link_tells_who_was_behind_it() -> None:
    """Whoever answered on a link is behind it until it breaks; then it must be greeted again."""
    links = links_up(HERE)
    links.answered(HERE, PEER.node_id, HERE)
    assert links.went_down(HERE) == PEER.node_id
    assert links.went_down(HERE) == ""
    assert links.went_down(ALIAS) == ""
    assert links.went_up(ALIAS) is None
    assert links.connected() == ()


def test_an_alias_serves_until_the_own_address_answers() -> None:
    """Of two links to one member the one to its own address stays, whichever answered first."""
    links = links_up(ALIAS)
    assert links.answered(ALIAS, PEER.node_id, HERE) == opened(HERE)
    links.went_up(HERE)
    assert links.answered(HERE, PEER.node_id, HERE) == closed(ALIAS)
    links.open(ALIAS)
    assert links.answered(ALIAS, PEER.node_id, HERE) == closed(ALIAS)


def test_all_links_to_a_member_are_closed() -> None:
    """Losing a member closes the links that it answered on and the one to its address."""
    links = links_up(HERE, ALIAS)
    links.answered(ALIAS, PEER.node_id, HERE)
    assert links.close_all(PEER) == closed(ALIAS, HERE)


def test_a_link_on_which_another_node_answers_is_not_a_lost_members() -> None:
    """A node that forgot who it was may live at the address of the one that it had been."""
    links = links_up(HERE)
    links.answered(HERE, "4" * 16, HERE)
    assert links.close_all(PEER) == []
    assert links.to("4" * 16) == HERE


def test_hope_ends_with_the_last_refusal() -> None:
    """While one link is not refused for good somebody may still take this node in."""
    links = links_up(HERE, ALIAS)
    links.refused(HERE, for_good=True)
    assert links.hopeful
    links.refused(ALIAS, for_good=True)
    assert not links.hopeful
    links.went_up(ALIAS)
    assert links.hopeful


def test_a_refusal_for_good_ends_greeting() -> None:
    """After a refusal for good there is no greeting until the connection is a new one."""
    links = links_up(HERE)
    links.refused(HERE, for_good=True)
    assert links.due(9.0) == []
    assert links.connected() == ()
    links.went_up(HERE)
    assert len(links.due(9.0)) == 1


def test_who_refused_for_a_time_is_greeted_when_it_speaks() -> None:
    """A member that refused us for a time is greeted at once when its heartbeats show it is in."""
    links = links_up(HERE)
    links.greet_refused(HERE)
    assert links.due(0.1) == []
    links.refused(HERE, for_good=False)
    links.greet_refused(HERE)
    assert len(links.due(0.1)) == 1


def test_an_answered_link_is_greeted_again_for_news() -> None:
    """To hear of members a link is greeted again, but no more often than each hello_retry."""
    links = links_up(HERE)
    links.greet_again_after_a_while(HERE, 9.0)
    links.answered(HERE, PEER.node_id, HERE)
    links.greet_again_after_a_while(HERE, LAN.hello_retry / 2)
    assert links.to(PEER.node_id) == HERE
    links.greet_again_after_a_while(HERE, LAN.hello_retry)
    assert links.to(PEER.node_id) == ""
    assert len(links.due(LAN.hello_retry)) == 1

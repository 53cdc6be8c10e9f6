"""How a node finds a cluster, how members come to know each other, and who is turned away."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from p2pinfer.core import events as e
from p2pinfer.core.timing import LAN
from p2pinfer.types import Member
from p2pinfer.wire import messages as m
from tests.node_bench import CLUSTER, Bench, heartbeat, hello, member, plan_of

ONE, TWO, THREE = member(1), member(2), member(3)
OTHER_CLUSTER, OTHER_MODEL = "d" * 16, "cd" * 32


def refused(code: str, *, retryable: bool = False) -> m.Refused:
    """A refusal that says little more."""
    return m.Refused(code=code, message=f"{code}, sorry", retryable=retryable)


def alone(*numbers: int, join: tuple[int, ...] = ()) -> Bench:
    """A node with its state that knows those members of before, and whose links are up."""
    plan = plan_of(*map(member, numbers), member(5))
    state = e.StoredState(cluster_id=CLUSTER, term=1, plan=plan, active=True)
    bench = Bench(stored=state, join=join)
    for number in (*numbers, *join):
        bench.take(e.LinkUp(address=member(number).address))
    bench.outputs.clear()
    return bench


# --- looking for a cluster ------------------------------------------------------------------------


def test_a_joiner_greets_again_while_unanswered() -> None:
    """HELLO goes out when the link is up and every second until it is answered."""
    bench = Bench(join=(1,))
    assert bench.told(e.OpenLink) == [e.OpenLink(address=ONE.address)]
    assert bench.sent(m.Hello) == []
    bench.take(e.LinkUp(address=ONE.address))
    bench.run(2 * LAN.hello_retry + 0.1)
    assert len(bench.sent(m.Hello)) == 3
    bench.answer(ONE, bench.welcome(ONE))
    bench.run(LAN.hello_retry + 0.1, ONE)
    assert bench.sent(m.Hello) == []


def test_a_joiner_opens_links_to_all_it_is_told_of() -> None:
    """WELCOME lists the members: the joiner opens a link to each but itself."""
    bench = Bench(join=(1,))
    bench.told(e.OpenLink)
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, bench.welcome(ONE, TWO, THREE, bench.me))
    assert {o.address for o in bench.told(e.OpenLink)} == {TWO.address, THREE.address}
    assert [fact.member.name for fact in bench.told(e.PeerJoined)] == ["node1", "node2", "node3"]
    assert bench.node.status(bench.now)["cluster_id"] == CLUSTER


def test_joining_gives_up_with_the_last_answer() -> None:
    """After join_timeout the node ends, saying whom it asked and what it last heard."""
    bench = Bench(join=(1,), join_timeout=7.0)
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, refused("not_ready", retryable=True))
    assert bench.told(e.PeerRefused) == []
    bench.run(5.1)
    assert [fact.waited_s for fact in bench.told(e.JoinWaiting)] == [pytest.approx(5.0, abs=0.1)]
    bench.run(2.0)
    ended = bench.ended()
    assert ended is not None
    assert ended[1] == 1
    assert ONE.address in ended[0]
    assert "not_ready, sorry" in ended[0]


def test_without_any_answer_there_is_none_to_tell() -> None:
    """The error of a joiner that nobody answered names the addresses only."""
    bench = Bench(join=(1, 2), join_timeout=7.0)
    bench.run(7.1)
    ended = bench.ended()
    assert ended is not None
    assert f"{ONE.address}, {TWO.address} within 7 s:" in ended[0]


def test_a_joiner_refuses_for_a_time() -> None:
    """A node that is still joining cannot welcome others: not_ready, retryable, and no fact."""
    bench = Bench(join=(1,))
    bench.hear(THREE, hello(THREE))
    [answer] = bench.replied(m.Refused)
    assert (answer.code, answer.retryable) == ("not_ready", True)
    assert bench.told(e.PeerRefused) == []


def test_a_node_that_joins_itself_says_so() -> None:
    """When every --join address leads to the node itself it ends with a usage error."""
    bench = Bench(join=(9,))
    bench.take(e.LinkUp(address=member(9).address))
    bench.take(e.Received(message=hello(bench.me), route=b"self"))
    [answer] = bench.replied(m.Refused)
    assert answer.code == "identity_taken"
    bench.answer(member(9), answer)
    ended = bench.ended()
    assert ended is not None
    assert ended[1] == 2
    assert "itself" in ended[0]


def test_one_address_of_several_may_be_the_nodes_own() -> None:
    """A link to itself is closed, and the other addresses are still asked."""
    bench = Bench(join=(5, 8, 9))
    assert e.OpenLink(address=bench.me.address) not in bench.told(e.OpenLink)
    bench.take(e.LinkUp(address=member(9).address))
    bench.take(e.Received(message=hello(bench.me), route=b"self"))
    bench.answer(member(9), bench.replied(m.Refused)[0])
    assert bench.told(e.CloseLink) == [e.CloseLink(address=member(9).address)]
    assert bench.ended() is None


# --- answers --------------------------------------------------------------------------------------


def test_answers_that_nobody_asked_for_are_dropped() -> None:
    """Of an address without a link, of an unknown version, and of this node's own identity."""
    bench = Bench(join=(1,))
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(THREE, bench.welcome(THREE))
    bench.answer(ONE, replace(bench.welcome(ONE), version=9))
    bench.answer(ONE, bench.welcome(replace(bench.me, address=ONE.address)))
    assert len(bench.told(e.FrameDropped)) == 3
    bench.answer(THREE, refused("wrong_model"))
    assert bench.told(e.PeerRefused) == []
    bench.take(e.LinkUp(address=THREE.address))
    assert bench.node.waiting == "a cluster to join"
    assert bench.states() == {}


def test_a_welcome_of_another_cluster_is_dropped() -> None:
    """A member takes no WELCOME of a cluster that is not its own."""
    bench = Bench.joined(ONE)
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, bench.welcome(ONE, cluster=OTHER_CLUSTER))
    assert len(bench.told(e.FrameDropped)) == 1
    assert bench.node.status(bench.now)["cluster_id"] == CLUSTER


def test_a_link_through_another_address_gives_way_to_the_members_own() -> None:
    """A --join address serves until the member's own address answers, and is closed then."""
    bench = Bench(join=(9,))
    alias = member(9)
    bench.take(e.LinkUp(address=alias.address))
    bench.answer(alias, bench.welcome(ONE))
    assert e.OpenLink(address=ONE.address) in bench.told(e.OpenLink)
    bench.run(0.1, ONE)
    assert {address for address, _ in bench.sent(m.Heartbeat)} == {alias.address}
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, bench.welcome(ONE))
    assert bench.told(e.CloseLink) == [e.CloseLink(address=alias.address)]
    bench.run(0.2, ONE)
    assert {address for address, _ in bench.sent(m.Heartbeat)} == {ONE.address}


def test_a_refusal_for_good_ends_a_joiner() -> None:
    """A joiner that is refused for good says so and ends with that message."""
    bench = Bench(join=(1,))
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, refused("wrong_model"))
    [fact] = bench.told(e.PeerRefused)
    assert (fact.code, fact.by_us) == ("wrong_model", False)
    assert bench.ended() == ("wrong_model, sorry", 1)


def test_a_member_among_members_lives_with_a_refusal() -> None:
    """Who is in a cluster does not end because one node there refuses it; it greets it no more."""
    bench = Bench.joined(ONE, TWO)
    bench.take(e.LinkUp(address=TWO.address))
    bench.sent(m.Hello)
    bench.answer(TWO, refused("wrong_settings"))
    bench.run(1.5, ONE, TWO)
    assert bench.ended() is None
    assert TWO.address not in [address for address, _ in bench.sent(m.Hello)]


def test_addresses_of_before_are_hints() -> None:
    """Another cluster may live at one of them: while another is not refused there is hope."""
    bench = alone(1, 2)
    bench.answer(ONE, refused("wrong_model"))
    assert bench.ended() is None
    bench.answer(TWO, refused("name_taken"))
    assert bench.ended() == ("name_taken, sorry", 1)


@pytest.mark.parametrize("join", [(), (1,)])
def test_another_cluster_at_all_addresses_ends_no_node_with_a_plan(join: tuple[int, ...]) -> None:
    """Its own cluster may come back any time."""
    bench = alone(1, join=join)
    bench.answer(ONE, refused("wrong_cluster"))
    assert bench.ended() is None


def test_a_joiner_whose_cluster_went_before_its_first_plan_begins_anew() -> None:
    """It has nothing to come back to: when all it knows belong to another cluster it ends, to be
    started again."""
    bench = Bench.joined(ONE)
    bench.run(3.0)
    assert bench.states() == {"node1": "dead"}
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, refused("wrong_cluster"))
    assert bench.ended() == ("wrong_cluster, sorry", 1)


def test_a_founder_without_a_plan_goes_on_alone() -> None:
    """A member of it that came back in another cluster is no reason to end."""
    bench = Bench()
    bench.meet(ONE)
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.run(1.1)
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, refused("wrong_cluster"))
    assert bench.ended() is None


def test_a_member_that_does_not_know_us_is_greeted_again() -> None:
    """Its answer to a heartbeat is not_a_member."""
    bench = Bench.joined(ONE)
    bench.sent(m.Hello)
    bench.answer(ONE, refused("not_a_member", retryable=True))
    assert [address for address, _ in bench.sent(m.Hello)] == [ONE.address]


def test_a_joiner_that_refused_us_is_greeted_when_it_has_joined() -> None:
    """Its first heartbeat shows that it knows the cluster now."""
    bench = Bench()
    bench.hear(TWO, hello(TWO))
    bench.take(e.LinkUp(address=TWO.address))
    bench.answer(TWO, refused("not_ready", retryable=True))
    bench.sent(m.Hello)
    bench.run(0.1)
    assert bench.sent(m.Hello) == []
    bench.beat(TWO)
    assert len(bench.sent(m.Hello)) == 1


# --- being greeted --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("greeting", "code", "says"),
    [
        (hello(TWO, versions=(7, 9)), "wrong_version", ("1", "7, 9")),
        (hello(TWO, model_id=OTHER_MODEL), "wrong_model", ("abababababab", "cdcdcdcdcdcd")),
        (hello(TWO, cluster_id=OTHER_CLUSTER), "wrong_cluster", (CLUSTER, OTHER_CLUSTER)),
        (hello(member(2, name="node5")), "name_taken", ("node5", "--name")),
        (hello(member(5, boot=1, name="x")), "identity_taken", (member(5).node_id,)),
    ],
)
def test_who_does_not_fit_is_refused(greeting: m.Hello, code: str, says: tuple[str, ...]) -> None:
    """A refusal names what both sides have, and is a fact here too."""
    bench = Bench()
    bench.hear(TWO, greeting)
    [answer] = bench.replied(m.Refused)
    assert (answer.code, answer.retryable) == (code, False)
    assert all(text in answer.message for text in says)
    [fact] = bench.told(e.PeerRefused)
    assert (fact.code, fact.by_us) == (code, True)
    assert bench.told(e.PeerJoined) == []


def test_a_full_cluster_refuses_until_somebody_leaves() -> None:
    """The seventeenth node is refused, retryable; a member that greets again is not."""
    bench = Bench()
    bench.meet(*(member(n) for n in range(1, 17) if n != 5))
    bench.outputs.clear()
    bench.hear(member(17), hello(member(17)))
    [answer] = bench.replied(m.Refused)
    assert (answer.code, answer.retryable) == ("cluster_full", True)
    bench.hear(ONE, hello(ONE))
    assert bench.replied(m.Welcome)


def test_a_witness_needs_no_model() -> None:
    """A witness without a model is welcome, and a witness does not judge others' models."""
    bench = Bench()
    bench.hear(TWO, hello(member(2, witness=True), model_id="", dtype="", quant=""))
    assert bench.replied(m.Welcome)
    witness = Bench(join=(1,), model=None, member=member(5, witness=True))
    witness.take(e.LinkUp(address=ONE.address))
    [(_, greeting)] = witness.sent(m.Hello)
    assert greeting.model_id == ""
    witness.answer(ONE, witness.welcome(ONE))
    witness.hear(ONE, hello(ONE, model_id=OTHER_MODEL, cluster_id=CLUSTER))
    assert witness.replied(m.Welcome)


def test_greeting_twice_is_greeting_once() -> None:
    """The same life of a node greets again: it is welcomed again, and has not joined again."""
    bench = Bench()
    bench.meet(TWO)
    bench.hear(TWO, hello(replace(TWO, numeric_class="new")))
    assert len(bench.told(e.PeerJoined)) == 1
    assert len(bench.replied(m.Welcome)) == 2
    assert bench.node.status(bench.now)["members"][0]["numeric_class"] == "new"


def test_a_welcome_lists_the_living_members() -> None:
    """WELCOME names everybody but the greeter, and who leads."""
    bench = Bench()
    bench.meet(TWO, THREE)
    bench.replied(m.Welcome)
    bench.hear(TWO, hello(TWO))
    [welcome] = bench.replied(m.Welcome)
    assert welcome.members == (THREE,)
    assert (welcome.member, welcome.leader_id) == (bench.me, bench.me.node_id)


@pytest.mark.parametrize("by_answer", [False, True])
def test_a_new_life_of_a_member_ends_the_old_one(by_answer: bool) -> None:
    """A known node id with a new boot id: the old life is dead, and the new one joins when it has
    greeted."""
    bench = Bench.leader(TWO)
    reborn = member(2, boot=1)
    if by_answer:
        bench.answer(TWO, bench.welcome(reborn))
        assert bench.told(e.CloseLink) == [e.CloseLink(address=TWO.address)]
        assert not bench.told(e.PeerJoined)
    bench.hear(reborn, hello(reborn))
    assert [fact.reason for fact in bench.told(e.PeerDead)] == ["it started again"]
    assert [fact.member for fact in bench.told(e.PeerJoined)] == [reborn]


def test_a_twin_is_refused() -> None:
    """A copied state folder: while the member is heard, another process with its id is not it."""
    bench = Bench.leader(TWO)
    twin = replace(TWO, boot_id="9" * 16, address="tcp://h9:7720")
    bench.hear(member(9), hello(twin))
    assert [answer.code for answer in bench.replied(m.Refused)] == ["identity_taken"]
    assert bench.states() == {"node2": "alive"}


# --- coming back ----------------------------------------------------------------------------------


def test_who_is_gone_is_knocked_for() -> None:
    """A cut cable looks like a death to both: its address is asked again, every second."""
    bench = Bench.leader(TWO)
    bench.run(2.0)
    assert bench.states() == {"node2": "dead"}
    assert e.OpenLink(address=TWO.address) in bench.told(e.OpenLink)
    bench.take(e.LinkUp(address=TWO.address))
    bench.sent(m.Hello)
    bench.run(3.0)
    assert len(bench.sent(m.Hello)) >= 2
    bench.answer(TWO, bench.welcome(TWO))
    assert bench.states() == {"node2": "alive"}


def test_who_has_not_said_all_of_itself_is_greeted_again() -> None:
    """A member that is blank, or whose worker has not started, will say more one day."""
    bench = Bench()
    bench.meet(TWO, member(3, numeric_class=""))
    bench.sent(m.Hello)
    bench.run(2.0, TWO, member(3))
    assert {address for address, _ in bench.sent(m.Hello)} == {THREE.address}


def test_alone_a_member_asks_the_join_addresses_too() -> None:
    """Its members may have come back elsewhere; among members it need not."""
    bench = Bench.joined(ONE, TWO, join=(1, 9))
    bench.take(e.LinkUp(address=member(9).address))
    bench.answer(member(9), bench.welcome(ONE))
    bench.run(2.0, ONE)
    assert member(9).address not in bench.node.known_addresses()
    bench.run(1.0)
    assert bench.states() == {"node1": "dead", "node2": "dead"}
    assert set(bench.node.known_addresses()) == {member(n).address for n in (1, 2, 9)}


def test_without_plan_and_leader_the_join_addresses_are_asked() -> None:
    """The founder may be there again, and nobody told it who these nodes are."""
    bench = Bench.joined(ONE, TWO, join=(1,))
    bench.hear(ONE, m.Leave(node_id=ONE.node_id, boot_id=ONE.boot_id))
    bench.told(e.OpenLink)
    bench.run(1.5, TWO)
    assert bench.states() == {"node1": "left", "node2": "alive"}
    assert e.OpenLink(address=ONE.address) in bench.told(e.OpenLink)


def test_a_link_that_broke_makes_its_member_suspect() -> None:
    """It is probed; a heartbeat clears it, and whoever is unknown is nobody."""
    bench = Bench.leader(TWO)
    bench.take(e.LinkDown(address=TWO.address))
    bench.take(e.LinkDown(address=member(9).address))
    assert bench.told(e.Probe) == [e.Probe(address=TWO.address)]
    assert bench.states() == {"node2": "suspect"}
    bench.hear(TWO, heartbeat(TWO))
    assert bench.states() == {"node2": "alive"}


def test_a_members_names_are_its_own_word() -> None:
    """What others list of a known member changes nothing about it, but it is asked."""
    bench = Bench.joined(ONE, TWO)
    stranger: Member = replace(TWO, name="other", address="tcp://h8:7720")
    bench.take(e.LinkUp(address=ONE.address))
    bench.answer(ONE, bench.welcome(ONE, stranger))
    assert "node2" in bench.states()
    assert e.OpenLink(address="tcp://h8:7720") in bench.told(e.OpenLink)

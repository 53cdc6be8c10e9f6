"""The leader's plans when fewer nodes, or another layout, are predicted to be faster."""

from __future__ import annotations

from msgspec.structs import replace

from p2pinfer.core.choice import Choice
from p2pinfer.core.prediction import Prediction
from tests.plan_bench import Office, member, serving


def choice(*owners: int, spare: tuple[int, ...] = (), layout: str = "heads") -> Choice:
    """These members are to own units, and those are spared."""
    return Choice(
        layout,
        frozenset(member(n).node_id for n in owners),
        frozenset(member(n).node_id for n in spare),
        Prediction(0.05, 0.0, 0.0),
        0,
    )


def settled(bench: Office) -> set[int]:
    """The owners once nothing more is proposed."""
    bench.served()
    return bench.owners()


def test_who_makes_the_whole_slower_hands_over_and_comes_back() -> None:
    """It owns nothing while it is spared, keeps its vote, and gets its share again after."""
    bench = serving(use_nodes="auto")
    bench.look(chosen=choice(1, 3, spare=(2,)))
    assert bench.proposed()[0].startswith("node2 to own nothing")
    assert settled(bench) == {1, 3}
    assert bench.voters() == {1, 2, 3}
    assert bench.plan.use_nodes == "auto"
    bench.look(1.0)
    bench.proposed()
    bench.look(1.0, chosen=choice(1, 2, 3))
    assert bench.proposed()[0] == "node2 fit again"
    assert settled(bench) == {1, 2, 3}


def test_a_spared_node_owns_units_when_nobody_else_can() -> None:
    """Better a slow one than nobody, until it is chosen by itself."""
    bench = serving(2, use_nodes="auto")
    bench.look(chosen=choice(1, spare=(2,)))
    assert settled(bench) == {1}
    bench.look(1.0, paused={1}, chosen=None)
    assert settled(bench) == {2}


def test_a_newcomer_that_would_slow_all_down_gets_nothing() -> None:
    """It is a member with a vote, and that is all."""
    bench = serving(2, use_nodes="auto")
    bench.join(3)
    bench.look(1.0, chosen=choice(1, 2, spare=(3,)))
    assert bench.proposed() == ["node3 joined"]
    assert settled(bench) == {1, 2}
    assert bench.voters() == {1, 2, 3}


def test_spared_nodes_count_for_the_first_plan() -> None:
    """`--min-nodes` asks for nodes that are there, whether they are to own anything or not."""
    bench = Office(2, use_nodes="auto", min_nodes=2)
    bench.look(1.0, chosen=choice(1, spare=(2,)))
    assert bench.proposed() == ["a new leader"]
    assert bench.owners() == {1}


def test_the_first_plan_takes_the_layout_that_was_chosen() -> None:
    """Where nobody asked for one, and says so, so that a later leader may choose another."""
    bench = Office(2, layout="auto")
    bench.look(1.0, chosen=choice(1, 2, layout="layers"))
    assert (bench.plan.layout, bench.plan.layout_auto) == ("layers", True)


def test_another_layout_is_proposed_where_it_may_be() -> None:
    """The reason says what is predicted; a layout that was asked for stays."""
    bench = serving(2, layout="auto")
    bench.look(1.0, chosen=choice(1, 2, layout="layers"))
    assert bench.proposed() == ["layers instead of heads: 20 tok/s predicted"]
    assert bench.plan.layout == "layers"
    bench.served()
    assert bench.plan.layout == "layers"
    told = serving(2, layout="heads")
    told.look(1.0, chosen=choice(1, 2, layout="layers"))
    assert (told.proposed(), told.plan.layout) == ([], "heads")


def test_a_later_leader_goes_by_the_plan_and_not_by_its_own_settings() -> None:
    """What the founder was told counts for the cluster."""
    base = serving(2, use_nodes="auto", layout="auto").plan
    bench = Office(2, base=replace(base), term=2)
    bench.look(1.0)
    assert (bench.plan.use_nodes, bench.plan.layout_auto) == ("auto", True)

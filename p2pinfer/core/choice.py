"""Which of the able members are to own units, and in which layout: what is predicted to be fastest.

More nodes bring more memory, more replicas and more room for KV, so all are used unless fewer are
clearly faster; and a layout that was not asked for is left only for one that is much faster. No
choice is made where anything is unknown, or where the cluster is fast as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from statistics import median
from typing import Any, NamedTuple, TypedDict

from p2pinfer.core.events import NodeConfig
from p2pinfer.core.holdings import stage_members, standbys_of
from p2pinfer.core.planner import PlacementError, make_plan, may_own, normal_layout, ordered_members
from p2pinfer.core.prediction import Prediction, predict, round_trip_s
from p2pinfer.core.standbys import name_standbys
from p2pinfer.types import Fence, Member, ModelSpec, Plan

FEWER_GAIN = 1.15
"""Nodes are left out where the others are predicted to be so many times as fast; predictions are
within a fifth of what is measured, but err alike for like plans."""

STAY_OUT_GAIN = 1.05
"""Where they are left out already, so much is enough: speeds near the bound move nothing."""

LAYOUT_GAIN = 1.25
"""Another layout moves every unit, and replies are computed again: only for so much."""

FIRST_LAYOUT_GAIN = 1.1
"""The same where there is nothing to move yet."""

NEAR = 0.95
"""Of choices that differ by less the one with the most nodes is taken."""

FAST_ENOUGH = 50.0
"""Tokens per second of one reply: faster than anybody reads, so nobody is left out for more."""


class Choice(NamedTuple):
    """Who owns units (node ids) and who is spared, in which layout, and how fast that is predicted
    to be; `copies` is how many replicas of units have a place."""

    layout: str
    owners: frozenset[str]
    spare: frozenset[str]
    prediction: Prediction
    copies: int

    @property
    def tokens_per_s(self) -> float:
        """Of one reply."""
        return self.prediction.tokens_per_s


class Question(NamedTuple):
    """What is to be chosen: `members` that may own units, the leader among them or not, a model
    with so many `replicas`, and what the cluster wants."""

    members: tuple[Member, ...]
    leader: Member
    model: ModelSpec
    replicas: int
    layout: str
    layout_auto: bool
    use_nodes: str
    present: frozenset[str]
    """Node ids of those that own units now; empty while there is no plan."""


def owner_ids(plan: Plan | None) -> frozenset[str]:
    """Node ids of those that own units by a plan."""
    if plan is None:
        return frozenset()
    return frozenset(
        plan.members[i].node_id for n in range(len(plan.stages)) for i in stage_members(plan, n)
    )


class Charter(TypedDict):
    """What a cluster settles once, in its first plan."""

    layout: str
    layout_auto: bool
    quorum: str
    use_nodes: str


def charter(previous: Plan | None, config: NodeConfig, chosen: Choice | None) -> Charter:
    """What the next plan says of it: as the `previous` one, or before the first as the leader is
    configured; only the layout may be chosen anew, where nobody asked for one."""
    if previous is None:
        auto = config.layout == "auto"
        found = Charter(
            layout=normal_layout(config.layout),
            layout_auto=auto,
            quorum=config.quorum,
            use_nodes=config.use_nodes,
        )
    else:
        found = Charter(
            layout=previous.layout,
            layout_auto=previous.layout_auto,
            quorum=previous.quorum,
            use_nodes=previous.use_nodes,
        )
    if chosen is not None and found["layout_auto"]:
        found["layout"] = chosen.layout
    return found


def faster(plan: Plan, chosen: Choice | None) -> str:
    """Why another layout is to take the place of a plan's, or empty."""
    if chosen is None or not plan.layout_auto or chosen.layout == plan.layout:
        return ""
    return f"{chosen.layout} instead of {plan.layout}: {chosen.tokens_per_s:.3g} tok/s predicted"


class Chooser:
    """The leader's choice, made anew only when something that it goes by has changed."""

    def __init__(self, config: NodeConfig) -> None:
        assert config.model is not None, "a witness never leads"
        self._config = config
        self._model = config.model
        self._asked: Question | None = None
        self._choice: Choice | None = None

    def look(self, plan: Plan | None, able: Iterable[Member], leader: Member) -> Choice | None:
        """The choice among those that are `able` to own units, `plan` being the newest; None: all
        of them, in the layout that is."""
        settled = charter(plan, self._config, None)
        if not settled["layout_auto"] and settled["use_nodes"] == "all":
            return None
        question = Question(
            members=ordered_members(tuple(able)),
            leader=leader,
            model=self._model,
            replicas=self._config.replicas,
            layout=settled["layout"],
            layout_auto=settled["layout_auto"],
            use_nodes=settled["use_nodes"],
            present=owner_ids(plan),
        )
        if question != self._asked:
            self._asked, self._choice = question, choose(question) if question.members else None
        return self._choice


def choose(question: Question) -> Choice | None:
    """The choice; None: nothing is known that speaks for any, so all members in the layout that
    is."""
    layout = normal_layout(question.layout)
    ids = frozenset(member.node_id for member in question.members)
    base = _choice(question, layout, ids)
    if base is None or base.tokens_per_s >= FAST_ENOUGH:
        return base
    found = [_fewer(question, base)]
    if question.layout_auto:
        others = (_choice(question, other, ids) for other in _layouts(question, layout))
        rivals = [rival for rival in others if rival is not None and rival.copies >= base.copies]
        found += [_fewer(question, rival) for rival in rivals]
    moves = len(question.present) > 1
    best = max(found, key=lambda choice: choice.tokens_per_s)
    gain = LAYOUT_GAIN if moves else FIRST_LAYOUT_GAIN
    return best if best.tokens_per_s >= gain * found[0].tokens_per_s else found[0]


def _layouts(question: Question, layout: str) -> list[str]:
    """The other layouts that use all members."""
    count = len(question.members)
    mixed = [
        f"{stages}x{count // stages}"
        for stages in range(2, count)
        if count % stages == 0 and stages <= question.model.num_layers
    ]
    return [other for other in ("heads", "layers", *mixed) if other != layout]


def _fewer(question: Question, everyone: Choice) -> Choice:
    """The same layout with fewer owners, where that is clearly faster."""
    if question.use_nodes == "all":
        return everyone
    found = [
        choice
        for ids in subsets(question.members)
        if (choice := _choice(question, everyone.layout, ids)) is not None
        and choice.copies >= everyone.copies
    ]
    best = max((choice.tokens_per_s for choice in found), default=0.0)
    near = [choice for choice in found if choice.tokens_per_s >= NEAR * best]
    kept = [choice for choice in near if choice.owners == question.present]
    chosen = max([*kept, *near], key=lambda c: (c in kept, len(c.owners)), default=everyone)
    gain = STAY_OUT_GAIN if kept else FEWER_GAIN
    return chosen if chosen.tokens_per_s >= gain * everyone.tokens_per_s else everyone


def subsets(members: Sequence[Member]) -> list[frozenset[str]]:
    """Node ids of the fastest one, two, three and so on, and of those nearest to the others."""

    def distance(member: Member) -> float:
        trips = [round_trip_s(member, other) for other in members if other is not member]
        return median([trip for trip in trips if trip is not None] or [0.0])

    def speed(member: Member) -> tuple[float, str]:
        return -member.product_gb_s, member.node_id

    orders = (
        sorted(members, key=speed),
        sorted(members, key=lambda member: (distance(member), speed(member))),
    )
    found = (
        frozenset(member.node_id for member in order[:count])
        for order in orders
        for count in range(1, len(members))
    )
    return list(dict.fromkeys(found))


def _choice(question: Question, layout: str, able: AbstractSet[str]) -> Choice | None:
    """What would be if these alone owned units; None where that cannot be, or nobody knows."""
    members = {member.node_id: member for member in (question.leader, *question.members)}
    try:
        plan = make_plan(
            members=list(members.values()),
            model=question.model,
            layout=layout,
            fence=Fence(),
            cluster_id="0" * 16,
            leader_id=question.leader.node_id,
            able=able,
        )
    except PlacementError:
        return None
    prediction = predict(plan)
    if prediction is None:
        return None
    plan = name_standbys(plan, able=frozenset(members), replicas=question.replicas)
    copies = sum(len(each) for stage in plan.stages for kind in standbys_of(stage) for each in kind)
    spare = frozenset(member.node_id for member in question.members) - able
    return Choice(layout, owner_ids(plan), spare, prediction, copies)


# --- as plain values ------------------------------------------------------------------------------


def prediction_object(plan: Plan) -> dict[str, Any]:
    """What `plan --json` says of speed.

    The tokens per second of one reply that are predicted by the plan (null: a speed or round trip
    is unknown), by how many of the members that may own units (`nodes`, `of`), who of these owns
    nothing, whose speed is unknown, and what other numbers of nodes would reach at best.
    """
    may = tuple(m for m in plan.members if may_own(m) and m.numeric_class)
    owners = owner_ids(plan)
    mine = predict(plan)
    leader = plan.members[plan.leader]
    question = Question(may, leader, plan.model, 0, plan.layout, False, plan.use_nodes, owners)
    everyone = frozenset(member.node_id for member in may)
    choices = [_choice(question, plan.layout, ids) for ids in (everyone, *subsets(may))]
    return {
        "tokens_per_s": _figure(mine),
        "nodes": len(owners),
        "of": len(may),
        "left_out": _names(m for m in may if m.node_id not in owners),
        "unknown": _names(m for m in may if not m.product_gb_s),
        "alternatives": [
            {
                "nodes": len(choice.owners),
                "names": _names(m for m in may if m.node_id in choice.owners),
                "tokens_per_s": _figure(choice.prediction),
            }
            for choice in _fastest_by_number(choices)
            if choice.owners != owners
        ],
    }


def _fastest_by_number(choices: Iterable[Choice | None]) -> list[Choice]:
    """Of each number of owners the fastest choice, the most owners first."""
    found: dict[int, Choice] = {}
    for choice in choices:
        if choice is not None:
            known = found.get(len(choice.owners), choice)
            found[len(choice.owners)] = max(known, choice, key=lambda c: c.tokens_per_s)
    return [found[count] for count in sorted(found, reverse=True)]


def _names(members: Iterable[Member]) -> list[str]:
    return [member.name for member in members]


def _figure(prediction: Prediction | None) -> float | None:
    return None if prediction is None else round(prediction.tokens_per_s, 2)

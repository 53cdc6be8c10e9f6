"""When the leader proposes a plan: small pure rules in order, of which the first that speaks wins.

(The manner is that of exo's planner: an ordered list of conditions over one picture of the state.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from p2pinfer.core.choice import Choice
from p2pinfer.types import Fence, Member

Boot = tuple[str, str]
"""Node id and boot id: one life of one node."""

Names = tuple[str, ...]


def boot(member: Member) -> Boot:
    """Which life of which node a member is."""
    return member.node_id, member.boot_id


def boots(members: Iterable[Member]) -> frozenset[Boot]:
    """The lives of some members."""
    return frozenset(map(boot, members))


def may_work(member: Member) -> bool:
    """Whether a member can take part in a plan: its worker has said how it computes."""
    return member.witness or bool(member.numeric_class)


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """The members as the leader sees them now, itself included; sets are of node ids."""

    living: tuple[Member, ...]
    reached: frozenset[str]
    """Those that our messages reach."""
    suspects: Names
    """Names of members that are in doubt."""
    lost: frozenset[str]
    """Known to be dead or to have left."""
    hung: frozenset[str]
    outcasts: frozenset[str]
    """Those that lose their units because of a broken pair."""
    slow: frozenset[str]
    draining: frozenset[str]
    worker_ready: bool
    quiet_since: float
    """When a member last came or went, in seconds."""

    paused: frozenset[str] = frozenset()
    chosen: Choice | None = None
    """Who of those that can own units is to own any, and in which layout; None: all of them."""
    deaf: frozenset[str] = frozenset()
    """Those that steps do not reach, though they take part."""
    standbys_ready: Mapping[str, Fence] = field(default_factory=dict)
    """Those that have all that they keep for others, with the fence of the plan that this is by."""

    @property
    def unfit(self) -> frozenset[str]:
        """Members that cannot compute."""
        return self.hung | self.outcasts

    @property
    def resting(self) -> frozenset[str]:
        """Members that are to own nothing for now, and may keep replicas."""
        spare = self.chosen.spare if self.chosen else frozenset()
        return self.slow | self.paused | spare


@dataclass(frozen=True, slots=True, kw_only=True)
class Situation:
    """What the leader sees when it asks itself whether to propose; members by their names."""

    worker_ready: bool
    suspects: Names
    able: Names
    """Those that may own units."""

    unable: Names
    """Why others may not: what they said, or what they wait for."""

    min_nodes: int
    served: bool
    """The cluster had a plan before: from then on it goes on with whoever remains."""

    unplaceable: str
    """Why no plan could be made for these very members, or empty."""

    proposed: bool
    """This leader has proposed a plan; what follows is about the newest."""

    lost: Names = ()
    """Its owners that are gone, even if they are back."""

    absent: Names = ()
    """Its other members that are gone: replies go on without them, and as long as any do, those
    that keep nothing are none of these."""

    unfit: Names = ()
    """Its owners that cannot compute."""

    relieved: Names = ()
    """Its members that are to hand over what they have."""

    step_failed: str = ""
    astray: Names = ()
    """Members that took part, and do not obey it any more."""

    dead_votes: Names = ()
    """Its voters that are lost, and need not be voters any more."""

    newcomers: Names = ()
    """Members that it does not list."""

    fit_again: Names = ()
    """Members that it lists, and that were offered no units."""

    votes: str = ""
    """How the voters are to change, or empty."""

    stragglers: Names = ()
    """Members that acknowledged it too late to take part."""

    loading: Names = ()
    """Members that it waits for; none once it is in force."""

    faster: str = ""
    """The layout that is to take the place of its own, with what is predicted, or empty."""

    prepared: str = ""
    """What standbys that are ready allow to do next, or empty."""

    settled: bool = True
    """No member has come or gone for a while."""

    lull: bool = True
    """A plan interrupts no reply that could as well go on; so while the newest is being loaded."""


@dataclass(frozen=True, slots=True)
class Decision:
    """Propose, or wait; and why. `why` empty: there is nothing to wait for.

    `rebalance`: units may move to members that own nothing, not only from those that are lost.
    """

    propose: bool
    why: str = ""
    rebalance: bool = False


def decide(situation: Situation) -> Decision:
    """What the first rule says that has something to say."""
    for rule in (*_RULES, *(_PATIENT_RULES if situation.lull else ())):
        if decision := rule(situation):
            return decision
    return Decision(propose=False)


def _worker(s: Situation) -> Decision | None:
    return None if s.worker_ready else Decision(propose=False, why="this node's worker to start")


def _suspects(s: Situation) -> Decision | None:
    """A plan with a suspect is a gamble, and the doubt is short."""
    return Decision(propose=False, why=f"a word from {_names(s.suspects)}") if s.suspects else None


def _too_few(s: Situation) -> Decision | None:
    """Enough nodes are asked for only until there was a first plan."""
    if s.served or len(s.able) >= s.min_nodes:
        return None
    return Decision(
        propose=False, why="; ".join((f"{len(s.able)} of {s.min_nodes} nodes", *s.unable))
    )


def _nobody(s: Situation) -> Decision | None:
    if s.able:
        return None
    return Decision(propose=False, why="; ".join(("a node that can hold the model", *s.unable)))


def _unplaceable(s: Situation) -> Decision | None:
    return Decision(propose=False, why=s.unplaceable) if s.unplaceable else None


def _first(s: Situation) -> Decision | None:
    """A new leader's first act is an epoch change, even with the same owners."""
    if s.proposed:
        return None
    return Decision(propose=True, why="a new leader", rebalance=not s.served)


def _lost(s: Situation) -> Decision | None:
    return Decision(propose=True, why=f"{_names(s.lost)} gone") if s.lost else None


def _absent(s: Situation) -> Decision | None:
    return Decision(propose=True, why=f"{_names(s.absent)} gone") if s.absent else None


def _unfit(s: Situation) -> Decision | None:
    if not s.unfit:
        return None
    why = "; ".join((f"{_names(s.unfit)} to own nothing", *s.unable))
    return Decision(propose=True, why=why)


def _dead_votes(s: Situation) -> Decision | None:
    if not s.dead_votes:
        return None
    return Decision(propose=True, why=f"{_names(s.dead_votes)} to vote no more")


def _relieved(s: Situation) -> Decision | None:
    if not s.relieved:
        return None
    return Decision(propose=True, why=f"{_names(s.relieved)} to own nothing")


def _step_failed(s: Situation) -> Decision | None:
    return Decision(propose=True, why=s.step_failed) if s.step_failed else None


def _astray(s: Situation) -> Decision | None:
    if not s.astray:
        return None
    return Decision(propose=True, why=f"{_names(s.astray)} obeyed the plan no more")


def _faster(s: Situation) -> Decision | None:
    return Decision(propose=True, why=s.faster, rebalance=True) if s.faster else None


def _newcomers(s: Situation) -> Decision | None:
    if not s.newcomers:
        return None
    if not s.settled:
        return Decision(propose=False, why="the members to settle")
    return Decision(propose=True, why=f"{_names(s.newcomers)} joined", rebalance=True)


def _loading(s: Situation) -> Decision | None:
    if not s.loading:
        return None
    return Decision(propose=False, why=f"{_names(s.loading)} to load the weights")


def _fit_again(s: Situation) -> Decision | None:
    if not s.fit_again:
        return None
    if not s.settled:
        return Decision(propose=False)
    return Decision(propose=True, why=f"{_names(s.fit_again)} fit again", rebalance=True)


def _votes(s: Situation) -> Decision | None:
    return Decision(propose=True, why=s.votes) if s.votes else None


def _stragglers(s: Situation) -> Decision | None:
    if not s.stragglers:
        return None
    return Decision(propose=True, why=f"{_names(s.stragglers)} ready at last")


def _prepared(s: Situation) -> Decision | None:
    if not s.prepared:
        return None
    return Decision(propose=True, why=s.prepared, rebalance=True)


_RULES: tuple[Callable[[Situation], Decision | None], ...] = (
    _worker,
    _suspects,
    _too_few,
    _nobody,
    _unplaceable,
    _first,
    _lost,
    _unfit,
    _step_failed,
    _astray,
    _dead_votes,
)
"""What no reply, or no further loss, can wait for."""

_PATIENT_RULES: tuple[Callable[[Situation], Decision | None], ...] = (
    _absent,
    _relieved,
    _newcomers,
    _loading,
    _fit_again,
    _votes,
    _stragglers,
    _faster,
    _prepared,
)
"""What can wait for a lull. A plan that is being loaded, which is one, is overtaken by what comes
before `_loading`."""


def _names(names: Names) -> str:
    return ", ".join(names)

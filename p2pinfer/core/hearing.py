"""Who hears whom: pairs of members that cannot talk to each other, and who of them gives way.

The owners of units exchange sums with one another, so they must be a clique of the graph of who
hears whom. Two kinds of evidence break a pair. On the control plane a member's heartbeats tell whom
it hears; time is the teller's own (`sent_at_ms`), so that a leader that stood still does not take
late news for long silence. Step links are silent when nothing is computed, so on the step plane
only failures count: of the last two failed steps both must blame the same pair.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import permutations
from math import inf

from p2pinfer.core.timing import Timing
from p2pinfer.types import Member
from p2pinfer.wire.messages import Heartbeat

Pair = tuple[str, str]
"""Two node ids, the lower one first."""


def pair_of(one: str, other: str) -> Pair:
    """The pair of two members."""
    return (min(one, other), max(one, other))


@dataclass(slots=True)
class _Ear:
    """Whether one member hears another, by what it says; seconds of its own clock."""

    since: float
    hears: bool
    ever: bool = False
    broken: bool = False


@dataclass(slots=True)
class _Failure:
    """A failed step: who was said to have kept whom waiting."""

    about: dict[str, set[str]] = field(default_factory=dict)

    def blamed(self) -> frozenset[Pair]:
        """The pairs to blame. Who waits is not to blame for keeping others waiting: a complaint
        about a member that itself complains of a third one says nothing."""
        return frozenset(
            pair_of(reporter, other)
            for reporter, others in self.about.items()
            for other in others
            if not self.about.get(other, set()) - {reporter}
        )


@dataclass(slots=True)
class _Cut:
    """A pair that failed on the step plane: until when, and how often so far."""

    until: float
    times: int


class Hearing:
    """The leader's judgement of which pairs are broken. Times in seconds."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._news: dict[str, Heartbeat] = {}
        self._ears: dict[tuple[str, str], _Ear] = {}
        self._lives: dict[str, str] = {}
        self._failures: list[_Failure] = []
        self._cuts: dict[Pair, _Cut] = {}
        self._looked_at = -inf

    @property
    def deadline(self) -> float:
        """When a pair that failed on the step plane may next be tried again."""
        ends = (cut.until for cut in self._cuts.values() if cut.until > self._looked_at)
        return min(ends, default=inf)

    # --- the control plane ------------------------------------------------------------------------

    def heard(self, heartbeat: Heartbeat) -> None:
        """A member says whom it hears, and when by its own clock, which counts."""
        self._news[heartbeat.node_id] = heartbeat

    def broken(self, members: Collection[Member], own: Heartbeat, now: float) -> frozenset[Pair]:
        """The pairs of living `members` that cannot work together.

        `own` is this node's heartbeat. Of a member that this node does not hear either nothing is
        concluded: it stands still, or is dead. Members that may own nothing are in no pair.
        """
        owning = [m for m in members if not m.witness and m.weight > 0]
        self._forget_lives(owning)
        alive = {own.node_id, *own.hears_control}
        ids = [member.node_id for member in owning]
        for teller, other in permutations(ids, 2):
            heartbeat = self._news.get(teller)
            if heartbeat and heartbeat.boot_id == self._lives[teller]:
                self._listen(heartbeat, other, there=other in alive)
        self._news.clear()
        self._mend(now)
        deaf = {pair_of(*ends) for ends, ear in self._ears.items() if ear.broken}
        cut = {pair for pair, cut in self._cuts.items() if cut.until > now}
        return frozenset(deaf | {pair for pair in cut if set(pair) <= set(ids)})

    def _forget_lives(self, members: Iterable[Member]) -> None:
        """What was said by, and of, former lives of members is void."""
        lives = {member.node_id: member.boot_id for member in members}
        same = {node_id for node_id, life in lives.items() if self._lives.get(node_id) == life}
        self._ears = {ends: ear for ends, ear in self._ears.items() if same.issuperset(ends)}
        self._lives = lives

    def _listen(self, heartbeat: Heartbeat, other: str, *, there: bool) -> None:
        """Take in what a heartbeat says of another member."""
        at, ends = heartbeat.sent_at_ms / 1000, (heartbeat.node_id, other)
        hears = other in heartbeat.hears_control
        ear = self._ears.setdefault(ends, _Ear(since=at, hears=hears))
        if hears != ear.hears or not (hears or there):
            ear.since, ear.hears = at, hears
        ear.ever |= hears
        lasted = at - ear.since
        if hears:
            # A pair that comes and goes must not make a plan each time.
            ear.broken &= lasted < self._timing.unable_for
        elif lasted >= (self._timing.pair_after if ear.ever else self._timing.first_word):
            ear.broken = True

    # --- the step plane ---------------------------------------------------------------------------

    def step_failed(self, reporter: str, about: str, now: float) -> None:
        """A step failed, as `reporter` says for want of `about`; the first report of it."""
        self._failures = [*self._failures[-1:], _Failure()]
        self.also_failed(reporter, about, now)

    def also_failed(self, reporter: str, about: str, now: float) -> None:
        """Another report of the same failed step, or a late one; one that names nobody else says
        nothing."""
        if not self._failures or about in ("", reporter):
            return
        self._failures[-1].about.setdefault(reporter, set()).add(about)
        if len(self._failures) < 2:
            return
        for pair in sorted(self._failures[0].blamed() & self._failures[1].blamed()):
            times = self._cuts[pair].times + 1 if pair in self._cuts else 1
            rest = self._timing.unable_for * 2 ** (times - 1)
            until = now + min(rest, self._timing.unable_max)
            self._cuts[pair] = _Cut(until=until, times=times)
            self._failures.clear()

    def step_succeeded(self) -> None:
        """Tokens were committed: failures before do not count as in a row with later ones."""
        self._failures.clear()

    def member_lost(self) -> None:
        """A member died or left, which explains failures."""
        self._failures.clear()

    def _mend(self, now: float) -> None:
        """Forget pairs that have been trusted again for as long as they may rest at most."""
        self._looked_at = now
        kept = {p: c for p, c in self._cuts.items() if now < c.until + self._timing.unable_max}
        self._cuts = kept

    # --- who gives way ----------------------------------------------------------------------------

    @staticmethod
    def outcasts(pairs: Iterable[Pair], members: Collection[str], leader: str) -> frozenset[str]:
        """The members that should own nothing, so that no two owners are a broken pair.

        Of a broken pair the one with fewer working links goes, then the one of the higher node id;
        the leader never does. Links to members that are out do not count.
        """
        open_pairs = {pair for pair in pairs if set(pair) <= set(members)}
        out: set[str] = set()
        while open_pairs:
            cuts = {node: sum(node in pair for pair in open_pairs) for node in members}
            with_leader = {node for pair in open_pairs if leader in pair for node in pair}
            ends = with_leader or {node for pair in open_pairs for node in pair}
            # All have the same number of possible links, so fewest links is most cuts.
            goes = max(ends - {leader}, key=lambda node: (cuts[node], node))
            out.add(goes)
            open_pairs = {pair for pair in open_pairs if goes not in pair}
        return frozenset(out)

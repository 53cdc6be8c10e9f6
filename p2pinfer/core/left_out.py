"""Whom the leader leaves out of its plans for a while, or of what they own, and why."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from math import inf
from typing import NamedTuple

from p2pinfer.core.plan_rules import Boot, View, boot, boots, may_work
from p2pinfer.core.proposal import owners
from p2pinfer.core.timing import Timing
from p2pinfer.types import Member, Plan


class Refusal(NamedTuple):
    """Why a member, or all members together, cannot hold their part, and until when that counts."""

    why: str
    until: float


class LeftOut:
    """What the leader knows of members that could not do their part. Times in seconds."""

    def __init__(self, timing: Timing) -> None:
        self.unable: dict[Boot, Refusal] = {}
        """Those that could not hold or compute what they were to own."""
        self.useless: dict[Boot, Refusal] = {}
        """Those that could not even take part without units."""
        self._resting: dict[Boot, Refusal] = {}
        """Those that were too slow."""
        self._late: dict[Boot, float] = {}
        """Those that were late, or out of step, and from when on they may begin an epoch again."""
        self._times: dict[Boot, int] = {}
        self._timing = timing

    @property
    def deadlines(self) -> tuple[float, ...]:
        """When members are to be tried again; some may be over."""
        every = (self.unable, self.useless, self._resting)
        untils = [refusal.until for each in every for refusal in each.values()]
        return (*untils, *self._late.values())

    def reasons(self, view: View) -> tuple[str, ...]:
        """Why members can own nothing."""
        unstarted = (m.name for m in view.living if not may_work(m))
        return (
            *(refusal.why for refusal in self.unable.values()),
            *(f"{name}'s worker to start" for name in unstarted),
        )

    def forget_old(self, here: AbstractSet[Boot], now: float) -> None:
        """Forget what is over, and all about lives that are not here."""
        for refusals in (self.unable, self.useless, self._resting):
            for life in [i for i, r in refusals.items() if i not in here or now >= r.until]:
                del refusals[life]
        self._times = {life: times for life, times in self._times.items() if life in here}
        self._late = {life: at for life, at in self._late.items() if life in here}

    def until(self, member: Member, now: float) -> float:
        """When to try a member again that could not do its part: each time after twice as long."""
        times = self._times.get(boot(member), 0)
        self._times[boot(member)] = times + 1
        return now + min(self._timing.unable_max, self._timing.unable_for * (1 << min(times, 10)))

    def be_patient(self, late: Iterable[Member], now: float) -> None:
        """Who is late again and again shall not begin an epoch each time."""
        for member in late:
            first = boot(member) not in self._late
            self._late[boot(member)] = now if first else self.until(member, now)

    def is_left_alone(self, member: Member, now: float) -> bool:
        """Whether nothing is begun for a member for now, though it is late."""
        return now < self._late.get(boot(member), -inf)

    def let_rest(self, owners: Iterable[Member], view: View, now: float) -> None:
        """A slow owner owns nothing for a while: without units nobody sees how fast it is."""
        for member in owners:
            if member.node_id in view.slow and boot(member) not in self._resting:
                until = self.until(member, now)
                self._resting[boot(member)] = Refusal(f"{member.name} computes slowly", until)

    def cannot(self, member: Member, view: View) -> bool:
        """Whether a member cannot compute, or has said that it cannot hold its part."""
        return member.node_id in view.unfit or boot(member) in self.unable

    def rests(self, member: Member, view: View) -> bool:
        """Whether a member is to own nothing for now, though it can, and may keep replicas."""
        return member.node_id in view.resting or boot(member) in self._resting

    def relieved(self, view: View) -> frozenset[Boot]:
        """Who is to own nothing for now, though it can."""
        return boots(m for m in view.living if m.node_id in view.draining or self.rests(m, view))

    def may_own(self, member: Member, view: View) -> bool:
        """Whether a member can own units, be it to rest or not, and stays."""
        return member.node_id not in view.draining and not self.cannot(member, view)

    def able(self, there: tuple[Member, ...], view: View) -> tuple[Member, ...]:
        """Those `there` that may own units: where all are to rest, all of them."""
        return tuple(m for m in there if not self.rests(m, view)) or there

    def interrupted(
        self, base: Plan | None, after: Iterable[Member], view: View, missed: Mapping[Boot, float]
    ) -> tuple[tuple[str, ...], float]:
        """Names of those whose failure ended the plan `base`, and how long finding out took.

        `after` are the owners by the plan that follows, `missed` says who was lost since, and after
        what silence. Who was asked to leave off, or only slow, failed nobody.
        """
        if base is None:
            return (), 0.0
        here, own = boots(view.living), boots(after)
        failed = {boot(m) for m in view.living if self.cannot(m, view)}
        lost = [
            m
            for m in (*owners(base), base.members[base.leader])
            if boot(m) in missed or boot(m) not in here or boot(m) in failed - own
        ]
        detect_s = max((missed.get(boot(m), 0.0) for m in lost), default=0.0)
        return tuple(sorted({m.name for m in lost})), detect_s

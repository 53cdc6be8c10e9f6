"""One fault played to its end: strike, see the replies go on, bring the cluster back, judge."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median
from typing import Any

from msgspec.structs import replace

from p2pinfer.client import Client
from p2pinfer.cluster import LocalNode
from p2pinfer.errors import ClusterError
from p2pinfer.types import SamplingParams
from tests.faults.blows import restart, strike
from tests.faults.cases import ONE_LOST, Case, Role
from tests.faults.clusters import Nodes
from tests.faults.timeline import Timeline
from tests.faults.truth import Ask, Truth
from tests.faults.vitals import Census, kv_bytes, vitals
from tests.faults.watching import (
    ASK_S,
    Diary,
    Reading,
    all_own,
    all_protected,
    all_vote,
    kill,
    leader,
    member,
    none_kept,
    until,
)

PATIENCE_S = 180.0
"""For a cluster to be whole again, where much else runs."""

GONE_S = 30.0
"""Within this a killed node's worker is gone too; it is a matter of milliseconds where CPUs are
free, but to end a process takes a turn on one."""

STORY = "Once upon a time"
TOKENS_BEFORE = 60
"""The fault comes before a reply has more, if it is to come in the middle of it."""
CALM_TOKENS = 40
"""Where nobody is struck a reply has so many first: what comes and goes is compared with these."""

GREEDY = SamplingParams(max_tokens=1500, ignore_eos=True)
SEEDED = replace(GREEDY, temperature=0.9, top_k=40, top_p=0.95, seed=7)
LONG_PROMPT = "The little fox ran into the wood. " * 120
AFTER_LONG = 60

SHORT_ASKS: tuple[Ask, ...] = ((STORY, GREEDY), (STORY, SEEDED))
LONG_ASKS: tuple[Ask, ...] = tuple(
    (prompt, replace(params, max_tokens=AFTER_LONG))
    for prompt, params in ((LONG_PROMPT, GREEDY), (f"Listen. {LONG_PROMPT}", SEEDED))
)


def whole(cluster: Nodes, replicas: int = 1) -> bool:
    """Whether all nodes vote, own units, and have replicas of them, or none if there are to be
    none: who took over from another has one for a while."""
    if not all_vote(cluster, len(cluster.nodes)) or not all_own(cluster):
        return False
    return all_protected(cluster) if replicas else none_kept(cluster)


@dataclass
class Play:
    """A case played on a cluster that is whole; `draw` decides who, and when exactly."""

    case: Case
    cluster: Nodes
    truth: Truth
    draw: random.Random
    census: Census
    replicas: int = 1
    keep_inputs: bool = False
    asks: Sequence[Ask] = ()
    """What is asked for meanwhile; by default what the case's moment needs."""
    failures: list[str] = field(default_factory=list)
    readings: list[Reading] = field(default_factory=list)
    _undo: list[Callable[[], None]] = field(default_factory=list)

    def run(self) -> dict[str, Any]:
        """Play it; returns what was seen. Raises `AssertionError` where something did not come
        about in time: the cluster is then in no known state."""
        self.census.take(self.cluster)
        kv_before = max(0, kv_bytes(self.cluster))
        self._cast()
        try:
            if self.case.moment == "join":
                self._make_room()
            self.timeline = Timeline(self.cluster)
            self._begin_replies()
            self._await_moment()
            self._strike()
            mended = self._mended()
            rungs = self.timeline.rungs()
        finally:
            self._undo_all()
        times = self.timeline.times()
        back = self._come_back(kv_before)
        self._judge(rungs)
        pauses = [round(r.pause(self.timeline.at, mended), 4) for r in self.readings]
        sizes = [found for node in self.cluster.nodes if (found := vitals(node))]
        return times | {
            "victims": [node.name for node in self.timeline.victims],
            "pause_s": max(pauses),
            "step_s": self._step(),
            "added_s": self._added(),
            "excess_s": self._excess(mended),
            "rungs": sorted(rungs),
            "replies": len(self.readings),
            "tokens": sum(len(reading.tokens) for reading in self.readings),
            # Through another node; a machine that is much too busy may bring that about by itself.
            "moves": sum(len(reading.errors) for reading in self.readings),
            "back_s": back,
            "rss_bytes": max(size.rss_bytes for size in sizes),
            "fds": max(size.fds for size in sizes),
            "failures": self.failures,
        }

    # --- who --------------------------------------------------------------------------------------

    def _cast(self) -> None:
        """Choose whom the moment is about, who is struck, and through whom the replies come."""
        leads = leader(self.cluster)
        free = list(self.cluster.nodes)
        self.draw.shuffle(free)

        def take(role: Role) -> LocalNode:
            found = next(n for n in free if (n.name == leads) == (role == "leader"))
            free.remove(found)
            return found

        case = self.case
        self.before = take(case.before) if case.before else None
        # Who leads next is known when it does.
        self._heir = case.moment == "failover" and case.before == "leader"
        self.struck = [] if self._heir else [take(role) for role in case.struck]
        if not case.struck and case.fault != "nothing":
            self.struck = [self._first()]
        self.serving = self.struck[0] if case.serving == "struck" else free[0]

    def _first(self) -> LocalNode:
        assert self.before is not None
        return self.before

    def _again(self, node: LocalNode) -> LocalNode:
        """The process that a node is now."""
        return next(each for each in self.cluster.nodes if each.name == node.name)

    # --- when -------------------------------------------------------------------------------------

    def _make_room(self) -> None:
        """Kill the node that is to join, and start it if the fault is to meet it on its way; if it
        is its coming alone that counts, it comes when the replies are under way."""
        kill(self._first())
        if self.case.fault == "nothing":
            until(lambda: all_own(self.cluster), PATIENCE_S, "the cluster without the one to join")
            if self.replicas:
                until(lambda: all_protected(self.cluster), PATIENCE_S, "replicas without it")
            return
        self._start_first()
        self.struck = [self._again(node) for node in self.struck]

    def _start_first(self) -> None:
        restart(self.cluster, self._first())
        self.before = self._again(self._first())

    def _begin_replies(self) -> None:
        served = self.serving.address
        others = [n.address for n in self.cluster.nodes if n not in (self.serving, self.before)]
        addresses = [served, *others]
        asks = self.asks or (LONG_ASKS if self.case.moment == "prefill" else SHORT_ASKS)
        self._accepted = Diary(self.serving)
        self.began = time.time()
        self.readings = [
            Reading(addresses, prompt, params, deadline=PATIENCE_S).start()
            for prompt, params in asks
        ]

    def _await_moment(self) -> None:
        case = self.case
        if case.moment == "prefill":
            until(
                lambda: len(self._accepted.facts("request_accepted")) == len(self.readings),
                what="the requests",
            )
            self._pause(0.3)
            return
        for reading in self.readings:
            least = CALM_TOKENS if case.fault == "nothing" else 1
            self._await_tokens(reading, self.draw.randrange(least, TOKENS_BEFORE))
        if case.moment == "join" and case.fault != "nothing":
            diary = self.timeline.diaries[self._first().name]
            until(lambda: diary.facts("node_started"), PATIENCE_S, "its return")
            self._pause(3.0)

    def _await_tokens(self, reading: Reading, count: int) -> None:
        until(lambda: len(reading.tokens) >= count or reading.ended, PATIENCE_S, "the replies")

    def _pause(self, longest: float) -> None:
        """A moment by chance, so that the fault meets whatever is under way."""
        threading.Event().wait(self.draw.uniform(0.0, longest))

    # --- the fault --------------------------------------------------------------------------------

    def _strike(self) -> None:
        case, line = self.case, self.timeline
        line.at = time.time()
        if case.fault == "disk-full":
            self._hit()
            self._kill_first()
        elif case.moment == "failover":
            self._kill_first()
            self._await_failover()
            self._hit()
        elif case.moment == "drain":
            self._drain_first()
            self._hit()
        elif case.fault == "nothing":
            self._start_first()
        else:
            self._hit()
        # Who joins may own its part before another one is struck, and keeps it.
        goes = case.moment in ("failover", "drain") or case.fault == "nothing"
        if self.before and goes:
            line.victims += [self.before] * (self.before not in line.victims)
        if not case.quorum:
            self._undo_all()

    def _hit(self) -> None:
        for victim in self.struck:
            rest = [n for n in self.cluster.nodes if n not in (*self.struck, self.before)]
            if victim is self.before or not rest:
                rest = [n for n in self.cluster.nodes if n is not victim]
            other = self.draw.choice(rest)
            self.timeline.victims.append(victim)
            self._undo.append(strike(self.case.fault, self.cluster, victim, other))

    def _kill_first(self) -> None:
        first = self._first()
        kill(first)
        self._undo.append(lambda: restart(self.cluster, first))

    def _await_failover(self) -> None:
        """The others are about to agree on what follows; of a dead leader, its heir is known."""
        rest = [node.name for node in self.cluster.nodes if node is not self.before]
        line = self.timeline
        if not self._heir:
            until(lambda: line.said(rest, "plan_proposed"), what="the next plan")
            return
        until(lambda: line.said(rest, "leader_elected"), what="the next leader")
        name = line.said(rest, "leader_elected")[-1]["name"]
        self.struck = [next(node for node in self.cluster.nodes if node.name == name)]

    def _drain_first(self) -> None:
        first = self._first()

        def drain() -> None:
            with suppress(ClusterError):  # who is to answer may be the one that is killed
                Client([self.serving.address]).drain(first.name)

        self._draining = threading.Thread(target=drain, daemon=True)
        self._draining.start()
        diary = self.timeline.diaries[first.name]
        until(lambda: diary.facts("draining"), what="the drain")
        self._pause(0.2)

        def come_back() -> None:
            self._draining.join(PATIENCE_S)
            until(lambda: first.ending or _stays(first), PATIENCE_S, "the end of the drain")
            if first.ending and self._again(first) is first:
                restart(self.cluster, first)

        self._undo.append(come_back)

    def _undo_all(self) -> None:
        while self._undo:
            self._undo.pop(0)()

    # --- what follows -----------------------------------------------------------------------------

    def _mended(self) -> float:
        """Wait until the replies go on for good; returns since when (wall clock)."""
        case, line = self.case, self.timeline
        if case.lost and case.quorum:
            until(
                lambda: line.adopted() is not None or self._out_of_it(),
                PATIENCE_S,
                "a plan without the lost",
                ASK_S,
            )
            if case.fault == "disk-full":  # It has been told of that plan, too.
                ended = "the end of the node with the full disk"
                until(lambda: all(node.ending for node in self.struck), PATIENCE_S, ended)
        elif case.fault == "nothing":
            self._come_or_gone()
        elif case.held_s:
            until(lambda: time.time() - line.at > case.held_s, what="the time that it holds")
            self._undo_all()
        elif not case.quorum:
            count = len(self.cluster.nodes)
            until(lambda: all_vote(self.cluster, count), PATIENCE_S, "a quorum", ASK_S)
        mended = time.time()
        for reading in self.readings:
            if case.moment == "prefill":
                reading.join(PATIENCE_S)
            else:
                until(
                    lambda r=reading: (r.times and r.times[-1] > mended) or r.ended,  # type: ignore[misc]
                    PATIENCE_S,
                    "another token",
                )
        return mended

    def _out_of_it(self) -> bool:
        """Whether all others know that those struck are gone, and no plan had them own anything:
        who joins may die before it is in any."""
        rest = [node for node in self.cluster.nodes if not node.ending]
        seen = [member(node, victim.name) for node in rest for victim in self.timeline.victims]
        return bool(seen) and all(m.get("state") == "dead" and not m["owned"] for m in seen)

    def _come_or_gone(self) -> None:
        """Wait until the node that comes owns its part, or the one that goes is gone."""
        first = self._first()
        if self.case.moment == "join":
            part = "a part for the node that joined"
            until(lambda: all_own(self.cluster), PATIENCE_S, part, ASK_S)
        else:
            until(lambda: first.ending, PATIENCE_S, "the end of the drained node")

    def _step(self) -> float:
        """The median time between two tokens before the fault, in seconds; 0 where there were none
        or one."""
        gaps = [
            later - earlier
            for reading in self.readings
            for earlier, later in pairwise(reading.times)
            if later <= self.timeline.at
        ]
        return round(median(gaps), 4) if gaps else 0.0

    def _added(self) -> float | None:
        """What new plans added to a time between two tokens; None where somebody was struck."""
        if self.case.fault != "nothing":
            return None
        proposed = self.timeline.said(list(self.timeline.diaries), "plan_proposed")
        moments = [fact["at"] for fact in proposed]
        return round(max(reading.added(moments) for reading in self.readings), 4)

    def _excess(self, mended: float) -> float | None:
        """What all of it added to a time between two tokens; None where somebody was struck."""
        if self.case.fault != "nothing":
            return None
        at = self.timeline.at
        return round(max(reading.excess(at, mended) for reading in self.readings), 4)

    def _come_back(self, kv_before: int) -> float:
        """End the replies and wait until the cluster is whole; returns the seconds it took."""
        began = time.monotonic()
        for reading in self.readings:
            reading.stop()
        until(lambda: whole(self.cluster, self.replicas), PATIENCE_S, "the cluster as it was")
        until(lambda: 0 <= kv_bytes(self.cluster) <= kv_before, PATIENCE_S, "the KV of before")
        self.census.take(self.cluster)
        until(lambda: not self.census.left_over(self.cluster), GONE_S, "the end of all orphans")
        return round(time.monotonic() - began, 2)

    def _judge(self, rungs: set[str]) -> None:
        case = self.case
        for reading in self.readings:
            wrong = self.truth.difference(reading.prompt, reading.params, reading.tokens)
            if wrong:
                self.failures.append(f"wrong reply: {wrong}")
            if reading.broken:
                self.failures.append(f"error: {reading.broken}")
        possible = case.possible_rungs(self.replicas, keep_inputs=self.keep_inputs)
        if unexpected := rungs - possible:
            self.failures.append(f"rung: {', '.join(sorted(unexpected))}")
        if case.fault == "kill" and case.moment == "decode" and case.rungs == ONE_LOST:
            cheapest = "replica" if self.replicas else "recompute" if self.keep_inputs else "replay"
            if cheapest not in rungs:
                self.failures.append(f"rung: {cheapest} was not used")
        if case.fault == "disk-full":
            words = "could not be written"
            if words not in self.struck[0].log.read_text(errors="replace"):
                self.failures.append("the node with the full disk did not say so")


def _stays(node: LocalNode) -> bool:
    """Whether a node says that it does not leave any more."""
    seen = member(node, node.name)
    return bool(seen) and not seen["draining"]

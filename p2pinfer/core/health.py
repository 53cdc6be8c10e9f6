"""How well this node itself runs: its own lateness, and whether its worker still moves.

A node that gets to run too rarely finds its peers' words in its queues afterwards. Lifeguard
(Dadgar, Phillips and Currey, 2018) has it doubt itself before it doubts others: by a health score
that lengthens its patience. Here its own standstills do not count as time at all, besides: whoever
was stopped for ten seconds has missed nobody's heartbeat yet, since all of them wait to be read.
"""

from __future__ import annotations

from math import inf, nextafter

from p2pinfer.core.timing import Timing

RECOVERY_PERIODS = 5
"""Heartbeat periods without lateness in which the score falls by one: Lifeguard lowers its score by
one for each probe that went well, and its probes are as far apart as five of our heartbeats."""

PAUSE_FACTOR = 3.0
"""A worker hangs after 3 times its longest pause of late, which counts as hang_after at most. A
pause of 3 * hang_after or more was a hang, and teaches nothing: the next is to be found as soon."""

LOADING_FACTOR = 5.0
"""Reading and repacking one tensor may take seconds on a busy machine: no pause is known yet."""

PAUSE_HALVES_S = 30.0
"""The longest pause is forgotten by half in that time: prompts come at least so often where pauses
are long because prompts are."""


class LocalHealth:
    """The node's own lateness, and the time for which it was awake. Seconds.

    `look` is told when the node wanted to run next, and when it did. The difference, where it is
    more than `late_after`, is a standstill: it is left out of the awake time, in which the rest
    of the node counts, and raises the score. So each timer of a node that was stopped has as long
    to go when it wakes as when it fell asleep, and what waits in its queues is read before any of
    them fires. Who slept learns from its peers what it missed: they refuse its old term.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._seen = -inf
        self._asleep = 0.0
        self._score = 0.0

    @property
    def score(self) -> float:
        """From 0 (punctual) to `max_health`."""
        return self._score

    @property
    def stretch(self) -> float:
        """By how much to lengthen `dead_after`: 1 + score."""
        return 1.0 + self._score

    def look(self, wanted: float, now: float) -> float:
        """The node runs at `now`, and had asked for `wanted`; returns the awake time.

        Both as told from outside. Where `wanted` is past already, the time since the last look is
        what counts.
        """
        late = now - max(wanted, self._seen)
        if late > self._timing.late_after:
            self._asleep += late
            self.late(late)
        elif self._seen > -inf:
            self.on_time(now - self._seen)
        self._seen = now
        return self.awake(now)

    def late(self, by: float) -> None:
        """The node was late by so many seconds: one point for each heartbeat of a peer's that it
        left unread for that long."""
        raised = self._score + by / self._timing.heartbeat_every
        self._score = min(float(self._timing.max_health), raised)

    def on_time(self, seconds: float) -> None:
        """It has been punctual for so long."""
        fallen = self._score - seconds / (RECOVERY_PERIODS * self._timing.heartbeat_every)
        self._score = max(0.0, fallen)

    def awake(self, told: float) -> float:
        """The awake time at a time told from outside."""
        return told - self._asleep

    def told(self, awake: float) -> float:
        """The time outside at which it will be `awake` in here, if the node runs until then.

        Rounded up: a timer that is looked at then is due.
        """
        return nextafter(awake + self._asleep, inf) if self._asleep else awake


class WorkerWatch:
    """Whether this node's worker hangs: it reports several times a second, busy, idle or loading.

    Before its first report it cannot hang, for starting takes as long as it takes; that it died
    is found otherwise. Seconds of awake time.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self.loading = False
        """It loads weights: what it does between two reports takes longer then."""
        self._said_at = inf
        self._pause = 0.0
        self._seen_hung = False

    def said(self, now: float) -> None:
        """Any report came."""
        if self._said_at < inf:
            pause = now - self._said_at
            self._pause *= 0.5 ** (pause / PAUSE_HALVES_S)
            if not self.loading and pause < PAUSE_FACTOR * self._timing.hang_after:
                self._pause = min(max(pause, self._pause), self._timing.hang_after)
        self._said_at, self._seen_hung = now, False

    @property
    def deadline(self) -> float:
        """When the worker hangs if it says nothing more; once it does, when it is given up."""
        return self._ends_at if self._seen_hung else self._hangs_at

    def silence(self, now: float) -> float:
        """How long it has said nothing; 0 before its first report."""
        return max(0.0, now - self._said_at)

    def hung(self, now: float) -> bool:
        """Whether it hangs."""
        self._seen_hung = now >= self._hangs_at
        return self._seen_hung

    def given_up(self, now: float) -> bool:
        """Whether it has hung for so long that its node should end."""
        return now >= self._ends_at

    @property
    def _patience(self) -> float:
        least = self._timing.hang_after * (LOADING_FACTOR if self.loading else 1.0)
        return max(least, PAUSE_FACTOR * self._pause)

    @property
    def _hangs_at(self) -> float:
        return self._said_at + self._patience

    @property
    def _ends_at(self) -> float:
        return self._said_at + max(self._timing.give_up_hung, self._patience)

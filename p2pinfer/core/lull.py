"""When a plan that can wait may interrupt the replies that are under way.

Each plan costs them a pause. Two in a row would cost one long pause, so replies go on for a while
in between. A step that a plan stops is lost, and while one is computed the nodes have no time to
agree: so the leader's worker is asked to give way, and when it has told what the step in hand drew
and begins no other, that is the moment.
"""

from __future__ import annotations

from dataclasses import replace
from math import inf

from p2pinfer.core.orders import GiveWay
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.plan_rules import Situation, decide
from p2pinfer.core.timing import Timing
from p2pinfer.types import Fence


class Lull:
    """The moments at which one leader's plan in force may give way. Times in seconds.

    All that comes of one input of a node has the same time: a plan is proposed at the very moment
    at which the worker says that it gave way, or it waits for the next.
    """

    def __init__(self, timing: Timing, box: Outbox) -> None:
        self._timing = timing
        self._box = box
        self._latest = -inf
        self._since = inf
        """When replies went on under this plan; inf: not yet."""
        self._asked = False
        self._gave_way_at = -inf

    @property
    def deadline(self) -> float:
        """When waiting is over, if no more tokens come."""
        return self._latest

    def activated(self, now: float) -> None:
        """Another plan is in force."""
        self._latest, self._since = now + self._timing.undisturbed_max, inf
        self._asked = False

    def stepped(self, now: float) -> None:
        """Tokens were committed: replies go on."""
        self._since = min(self._since, now)
        self._latest = now + self._timing.undisturbed_max

    def look(self, situation: Situation, fence: Fence, now: float) -> None:
        """Ask the worker to give way if a plan is due that waits for that; `fence` is that of the
        plan in force."""
        if situation.lull or self._asked or now < self._since + self._timing.undisturbed:
            return
        if decide(replace(situation, lull=True)).propose:
            self._asked = True
            self._box.order(GiveWay(fence=fence))

    def gave_way(self, now: float) -> None:
        """No step is in hand. Should nothing be proposed, replies go on as after a plan."""
        self._gave_way_at, self._since, self._asked = now, inf, False

    def is_at(self, now: float) -> bool:
        """Whether now is such a moment, while replies are under way."""
        return now >= self._latest or now == self._gave_way_at

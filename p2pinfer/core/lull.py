"""When a plan that can wait may interrupt the replies that are under way.

Each plan costs them a pause. Two in a row would cost one long pause, so replies go on for a while
in between; and a step that a plan stops is lost, so the moment is when one has just ended.
"""

from __future__ import annotations

from math import inf

from p2pinfer.core.timing import Timing


class Lull:
    """The moments at which one leader's plan in force may give way. Times in seconds.

    All that comes of one input of a node has the same time: a plan is proposed at the very moment
    at which tokens were committed, or it waits for the next.
    """

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._latest = -inf
        self._since = inf
        """When replies went on under this plan; inf: not yet."""
        self._stepped_at = -inf

    @property
    def deadline(self) -> float:
        """When waiting is over, if no more tokens come."""
        return self._latest

    def activated(self, now: float) -> None:
        """Another plan is in force."""
        self._latest, self._since = now + self._timing.undisturbed_max, inf

    def stepped(self, now: float) -> None:
        """Tokens were committed: the step after theirs has only just begun."""
        self._since = min(self._since, now)
        self._stepped_at, self._latest = now, now + self._timing.undisturbed_max

    def is_at(self, now: float) -> bool:
        """Whether now is such a moment, while replies are under way."""
        if now >= self._latest:
            return True
        return self._stepped_at == now and now >= self._since + self._timing.undisturbed

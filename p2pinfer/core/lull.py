"""When a plan that can wait may interrupt the replies that are under way.

Each plan costs them a pause. Two in a row would cost one long pause, so replies go on for a while
in between; and a step that a plan stops is lost, so the moment is when one has just ended.
"""

from __future__ import annotations

from math import inf

from p2pinfer.core.timing import Timing


class Lull:
    """The moments at which one leader's plan in force may give way. Times in seconds."""

    def __init__(self, timing: Timing) -> None:
        self._timing = timing
        self._latest = -inf
        self._since = inf
        """When replies went on under this plan; inf: not yet."""
        self._stepped_at = -inf

    @property
    def deadline(self) -> float:
        """When waiting is over, however little the replies went on."""
        return self._latest

    def activated(self, now: float) -> None:
        """Another plan is in force."""
        self._latest, self._since = now + self._timing.undisturbed_max, inf

    def stepped(self, now: float) -> None:
        """Tokens were committed: the step after theirs has only just begun."""
        self._since = min(self._since, now)
        self._stepped_at = now

    def is_now(self, running: int, now: float) -> bool:
        """Whether this is such a moment; it always is with no replies `running`."""
        if not running or now >= self._latest:
            return True
        return self._stepped_at == now and now >= self._since + self._timing.undisturbed

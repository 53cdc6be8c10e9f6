"""How many positions of prompts a step may compute beside replies that decode.

Each step gives every running reply one token, so the time of a step is the time between two tokens
of it. While a prompt is read that time may at most double: a step takes no more prefill rows than
its predicted time allows. Prediction is by measurement alone. The first rows are hidden behind the
reading of the weights; beyond them each costs about as much. For such a time two straight lines
are never too low: from the plain step to the last one measured, for fewer rows than that had; and
in proportion to it for more. So a step that took too long is answered at once by one that fits, and
steps that have room grow towards the limit without passing it.

Times come in as arguments, in seconds. Only the leader asks: its STEP carries what comes of it.
"""

from __future__ import annotations

from collections import deque
from statistics import median, median_low

STRETCH = 2.0
"""A step with prefill takes at most so many times what a plain one takes."""

AIM = 1.9
"""What is aimed at: attention makes each step of a long prompt a little longer than the last."""

LEAST_ROWS = 8
"""A prompt gets so many where even these take longer: it must come to its end, and fewer would
cost a product almost as much."""

PLAIN_STEPS = 8
"""Of the last plain steps, those that count."""

MIXED_STEPS = 3
"""Of the last steps with both, those that count: so one that was held up changes nothing."""

PLAIN_EVERY = 32
"""After so many steps with prefill in a row one goes without: under a constant load the measure
would grow old."""


class PrefillBudget:
    """What steps took on the leader under one fence. No step has more than `most` prefill rows."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._plain: dict[int, deque[float]] = {}
        """Seconds of steps that only decoded, by a bucket of their number of replies."""
        self._mixed: deque[tuple[int, float]] = deque(maxlen=MIXED_STEPS)
        """(prefill rows, seconds) of steps that did both."""
        self._since_plain = 0

    def rows(self, decoding: int) -> int:
        """Prefill rows that the next step may have beside `decoding` replies.

        Without replies all there may be. 0 asks for one plain step, to measure it: so many replies
        have not decoded alone yet, or not for long.
        """
        if not decoding:
            return self._most
        plain = self._plain.get(_bucket(decoding))
        if plain is None or self._since_plain >= PLAIN_EVERY:
            return 0
        usual = median(plain)
        fitting = [_fitting(rows, seconds, usual) for rows, seconds in self._mixed]
        rows = median_low(fitting) if fitting else 0
        return min(max(rows, LEAST_ROWS), self._most)

    def finished(self, decoding: int, prefill: int, seconds: float) -> None:
        """A step with `decoding` replies and `prefill` rows took that long.

        Of those with both only they count that had all the rows they might: the end of a prompt
        says little of how many fit.
        """
        if not decoding:
            return
        if prefill:
            if prefill >= self.rows(decoding):
                self._mixed.append((prefill, seconds))
            self._since_plain += 1
        else:
            plain = self._plain.setdefault(_bucket(decoding), deque(maxlen=PLAIN_STEPS))
            plain.append(seconds)
            self._since_plain = 0


def _fitting(rows: int, seconds: float, plain: float) -> int:
    """How many rows fit, when `rows` took `seconds` and a plain step takes `plain`."""
    limit = AIM * plain
    if seconds > limit:
        return int(rows * (limit - plain) / (seconds - plain))
    # A clock that stood still says nothing: no more than doubling.
    return int(rows * min(limit / seconds, STRETCH)) if seconds else 2 * rows


def _bucket(replies: int) -> int:
    """0 for one reply, 1 for two, 2 for up to four, and so on: their steps take about as long."""
    return (replies - 1).bit_length()

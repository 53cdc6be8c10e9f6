"""What has come for the steps of the plan in force, until a step uses it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from p2pinfer.wire.messages import Candidates, Hidden, Logits, LogitsRequest, Partial, Step

MAX_FILED = 4096
"""Frames of one kind filed and not yet used: a peer is one exchange ahead at most, by layers."""


@dataclass
class Inbox:
    """Frames of the active plan by what they are for, then by who sent them (logits: by unit)."""

    steps: deque[Step] = field(default_factory=deque)
    requests: deque[LogitsRequest] = field(default_factory=deque)
    partials: dict[tuple[int, int, int], dict[int, Partial]] = field(default_factory=dict)
    wholes: dict[tuple[int, int, int], dict[int, Partial]] = field(default_factory=dict)
    """Shares of rows that their senders have added for all."""
    hidden: dict[tuple[int, int], dict[int, Hidden]] = field(default_factory=dict)
    candidates: dict[int, dict[int, Candidates]] = field(default_factory=dict)
    logits: dict[int, dict[int, Logits]] = field(default_factory=dict)

    def forget_before(self, step: int) -> None:
        """Drop what came for steps that are over (a duplicate, or a frame nobody waited for)."""
        for box in (self.partials, self.wholes):
            for key in [key for key in box if key[0] < step]:
                del box[key]
        for place in [place for place in self.hidden if place[0] < step]:
            del self.hidden[place]
        for number in [number for number in self.candidates if number < step]:
            del self.candidates[number]
        for number in [number for number in self.logits if number < step]:
            del self.logits[number]

    def full(self) -> bool:
        """Whether a peer has sent more than any plan has use for."""
        sizes = (
            len(self.steps),
            len(self.requests),
            len(self.partials),
            len(self.wholes),
            len(self.hidden),
            len(self.candidates),
            len(self.logits),
        )
        return max(sizes) >= MAX_FILED

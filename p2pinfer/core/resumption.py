"""How long the replies that a new plan interrupts stand still, and in what: as facts on the leader.

A reply stands still from the loss of a member on: until that is noticed (here it is known only for
how long the member had been silent), until PROPOSE, until ACTIVATE, and until the first token that
is new since then is committed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import inf

from p2pinfer.core.agreement import RUNGS, Agreed
from p2pinfer.core.events import Fact, RequestRestored, TokensCommitted
from p2pinfer.core.outbox import Outbox


class RequestResumed(Fact, frozen=True, kw_only=True):
    """On the leader: the first new token of an interrupted request is committed.

    It stood still from the loss of `lost` on: `detect_s` is how long they had been silent when that
    was noticed; from then on it took `propose_s` to PROPOSE and `agree_s` to ACTIVATE, and from
    there `restore_s` to this token, whose position is `position`.
    """

    request_id: int
    position: int
    restart: int
    rung: str
    lost: tuple[str, ...]
    detect_s: float
    propose_s: float
    agree_s: float
    restore_s: float


@dataclass(slots=True)
class _Standstill:
    """A request whose log was agreed on, and of which no new token is committed yet."""

    news: Agreed
    lost: tuple[str, ...]
    detect_s: float
    noticed_at: float
    proposed_at: float
    activated_at: float


class Resumption:
    """The standstills of one leader's requests. Times in seconds."""

    def __init__(self, box: Outbox) -> None:
        self._box = box
        self._lost_at = inf
        self._failed_at = inf
        self._proposed_at = inf
        self._open: dict[int, _Standstill] = {}
        self.restored = dict.fromkeys(RUNGS, 0)
        """How often requests went on under a new plan, by rung."""

    def lost(self, now: float) -> None:
        """A member is known to be gone; the first one since the last plan in force counts."""
        self._lost_at = min(self._lost_at, now)

    def failed(self, now: float) -> None:
        """A step broke; that counts where nobody is lost."""
        self._failed_at = min(self._failed_at, now)

    def proposed(self, now: float) -> None:
        """A plan is proposed; the first one since the last plan in force counts."""
        self._proposed_at = min(self._proposed_at, now)

    def activated(
        self, agreed: Iterable[Agreed], lost: tuple[str, ...], detect_s: float, now: float
    ) -> None:
        """A plan is in force with these logs; `lost` are the names of those who brought it about,
        found out after `detect_s`."""
        noticed = min(self._lost_at if self._lost_at < inf else self._failed_at, self._proposed_at)
        before, self._open = self._open, {}
        for news in agreed:
            still = _Standstill(news, lost, detect_s, noticed, self._proposed_at, now)
            if (earlier := before.get(news.request_id)) is not None:
                # Nothing has come since the plan before: to its client that is one standstill.
                still.lost = tuple(dict.fromkeys((*earlier.lost, *lost)))
                still.detect_s = max(earlier.detect_s, detect_s)
                still.noticed_at, still.proposed_at = earlier.noticed_at, earlier.proposed_at
            self._open[news.request_id] = still
            self.restored[news.rung] += 1
            self._box.add(
                RequestRestored(
                    request_id=news.request_id,
                    length=len(news.log.tokens),
                    restart=news.restart,
                    rung=news.rung,
                )
            )
        self._lost_at = self._failed_at = self._proposed_at = inf

    def committed(self, report: TokensCommitted, now: float) -> None:
        """Tokens are committed: those requests go on that get the first new one with them."""
        for token in report.tokens if self._open else ():
            still = self._open.get(token.request_id)
            if still is None:
                continue
            log = still.news.log
            if token.index < len(log.tokens) - log.prompt_tokens:
                continue
            del self._open[token.request_id]
            self._box.add(
                RequestResumed(
                    request_id=token.request_id,
                    position=len(log.tokens),
                    restart=still.news.restart,
                    rung=still.news.rung,
                    lost=still.lost,
                    detect_s=still.detect_s,
                    propose_s=still.proposed_at - still.noticed_at,
                    agree_s=still.activated_at - still.noticed_at,
                    restore_s=now - still.activated_at,
                )
            )

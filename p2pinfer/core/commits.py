"""When a token is committed: every owner and a plan quorum have it in their logs.

A STEP carries tokens, and each of its hearers acknowledges it once they are in its log. Whatever a
later leader collects then holds them: it needs every new owner and a quorum, and any two quorums
meet. Acknowledging a step acknowledges all before it, since a link keeps its order.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Generic, Protocol, TypeVar

from p2pinfer.core import quorum
from p2pinfer.core.planner import stage_members
from p2pinfer.errors import RemoteProtocolError
from p2pinfer.types import Plan


class News(Protocol):
    """What becomes true with a step: a token, or the end of a reply."""

    @property
    def request_id(self) -> int:
        """Whose it is."""


T = TypeVar("T", bound=News)


def owners(plan: Plan) -> frozenset[int]:
    """Members (indices) that own any unit of any stage."""
    return frozenset(
        member for stage in range(len(plan.stages)) for member in stage_members(plan, stage)
    )


class Commits(Generic[T]):
    """Who has acknowledged which step of one plan, and what waits for it.

    `listeners` and `me` are indices into the plan's members; I am the leader. Of members that do
    not listen, a `last-man` quorum is taken to be without.
    """

    def __init__(self, plan: Plan, listeners: Iterable[int], me: int) -> None:
        self._plan = plan
        self._me = me
        self._acked = dict.fromkeys({*listeners, me}, 0)
        self._owners = owners(plan)
        ids = [member.node_id for member in plan.members]
        self._ids = ids
        self._lost = frozenset(ids[i] for i in range(len(ids)) if i not in self._acked)
        self._waiting: deque[tuple[int, tuple[T, ...]]] = deque()
        self.announced_step = 0
        """The newest step that was sent."""
        self.step = 0
        """The newest step whose tokens are committed."""

    def announced(self, step: int, news: Iterable[T]) -> list[T]:
        """`step` is sent and in my own log; `news` become true when it is committed.

        Returns what is committed by that already: without others, all of it.
        """
        assert step > self.announced_step, "steps are numbered upwards"
        self.announced_step = step
        self._waiting.append((step, tuple(news)))
        return self.acked(self._me, step)

    def acked(self, member: int, step: int) -> list[T]:
        """A member has all up to `step` in its log. Returns what is committed by that, in order.

        Raises `RemoteProtocolError` for a member that does not listen, or a step never sent.
        """
        if member not in self._acked or step > self.announced_step:
            raise RemoteProtocolError("an acknowledgement of what this member was never sent")
        self._acked[member] = max(self._acked[member], step)
        self.step = self._committed()
        news: list[T] = []
        while self._waiting and self._waiting[0][0] <= self.step:
            news += self._waiting.popleft()[1]
        return news

    def forget(self, request_id: int) -> None:
        """A request was cancelled: what waits of it will never be said."""
        self._waiting = deque(
            (step, tuple(piece for piece in news if piece.request_id != request_id))
            for step, news in self._waiting
        )

    def missing(self) -> int:
        """The member (lowest index) without whom the next step is not committed.

        Owners come first, then those that listen; the leader itself where nobody is missing.
        """
        late = sorted(m for m, step in self._acked.items() if step <= self.step)
        return next((m for m in late if m in self._owners), next(iter(late), self._me))

    def _committed(self) -> int:
        """The highest step that all owners and a quorum have."""
        most = min((self._acked.get(owner, 0) for owner in self._owners), default=0)
        steps = {most, *(s for s in self._acked.values() if s <= most)}
        for step in sorted((s for s in steps if s > self.step), reverse=True):
            agreed = {self._ids[m] for m, s in self._acked.items() if s >= step}
            if quorum.commits(self._plan, agreed, self._lost):
                return step
        return self.step

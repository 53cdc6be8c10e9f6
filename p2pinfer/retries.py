"""Through which node a client goes on when its reply broke off, and for how long it tries.

What is tried costs little: submitting again is resuming (section 11.2 of `proto_spec.md`). So the
next node is asked at once, each once in a round; between rounds is a pause that doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import inf
from typing import Final

from p2pinfer.errors import ClusterError
from p2pinfer.wire.messages import Accepted

RETRY_FOR_S: Final = 30.0
"""How long is tried unless the caller says otherwise: as long as a node waits for its cluster."""

PAUSE_S: Final = 0.1
PAUSE_MAX_S: Final = 2.0
"""Between two rounds: a node that restarts is met soon, and one that refuses is not flooded."""

WAITING_S: Final = 3.0
"""A node that only waits for its cluster is left after that for one that was not asked yet: the
network may be cut in two, and the other side at work. Elections and plans take less."""

LEAST_S: Final = 1.0
"""A node that gave up after waiting has used the time; the others are asked once all the same."""

MAX_DEFECTS: Final = 3
"""So often in a row may a node call it `internal`: a request that breaks the steps breaks those of
all others too, each time."""

WAITED: Final = ("no_quorum", "not_ready")
"""The codes of a node that gave up after waiting for its cluster."""


class Retries:
    """Of one request: which nodes there are, which were asked, and since when it stands still.

    The request is *in order* while a node has it and waits for nothing. `now` is in seconds.
    """

    def __init__(self, addresses: Sequence[str], retry_for: float) -> None:
        self._given = tuple(addresses)
        self._others: tuple[str, ...] = ()
        self._names: dict[str, str] = {}
        self._retry_for = retry_for
        self._tried: dict[str, None] = {}
        """In this round."""
        self._asked: dict[str, None] = {}
        """Since the last token."""
        self._pause = PAUSE_S
        self._next_round_at: float | None = None
        self._error: ClusterError | None = None
        self._failed_at: float | None = None
        self._since: float | None = None
        """Since when it is not in order."""
        self._spent = 0.0
        """How long it was tried before, since the last token."""
        self._attached_at = inf
        self._waiting = ""
        self._defects = 0

    def name(self, address: str) -> str:
        """What the node at this address is called, as far as that is known."""
        return self._names.get(address, address)

    # --- what happens -----------------------------------------------------------------------------

    def attached(self, address: str, now: float) -> None:
        """A node at this address has answered the connect."""
        self._asked[address] = None
        self._attached_at, self._waiting = now, ""

    def accepted(self, address: str, message: Accepted, now: float) -> None:
        """The node has the request, knows others, and waits for its cluster or for nothing."""
        self._names[address] = message.served_by
        self._names.update({other.address: other.name for other in message.others})
        self._others = tuple(other.address for other in message.others)
        self._waiting = message.waiting
        if message.waiting:
            self._since = now if self._since is None else self._since
            return
        if self._failed_at is not None and self._since is not None:
            self._spent += now - self._since
        self._failed_at = self._since = self._next_round_at = None

    def progress(self) -> None:
        """Tokens came: whatever was before is over."""
        self._failed_at = self._since = self._next_round_at = None
        self._spent, self._pause, self._defects = 0.0, PAUSE_S, 0
        self._tried.clear()
        self._asked.clear()

    def failed(self, address: str, error: ClusterError, now: float) -> None:
        """The node at this address cannot go on with it; raises when there is no time to try more,
        or no use. What it waited before it gave up counts.
        """
        if self._failed_at is None:
            self._failed_at = now
            if self._since is None or error.code not in WAITED:
                self._since = now
        if self._error is None or error.retryable:
            self._error = error
        self._waiting = ""
        self._defects += error.code == "internal"
        if self._defects >= MAX_DEFECTS:
            raise error
        self.passed(address, now)

    def passed(self, address: str, now: float) -> None:
        """Try another node than that one; raises when there is no time to."""
        self._tried[address] = self._asked[address] = None
        if now >= self.deadline:
            raise self._given_up(address)

    # --- what to do -------------------------------------------------------------------------------

    @property
    def deadline(self) -> float:
        """When to give up; never, while nothing has failed."""
        if self._failed_at is None or self._since is None:
            return inf
        least = -inf if self._spent else self._failed_at + min(LEAST_S, self._retry_for)
        return max(self._since + self._retry_for - self._spent, least)

    @property
    def leave_at(self) -> float:
        """When to leave the present node, if it has not put the request in order by then."""
        if self._failed_at is None or not self._untried():
            return self.deadline
        return min(self.deadline, self._attached_at + WAITING_S)

    def next(self, now: float) -> str | None:
        """The address to try now; None: none before `next_at`. Raises when there is no time to."""
        if now >= self.deadline:
            raise self._given_up("")
        found = next(iter(self._untried()), None)
        if found is None and self._next_round_at is None:
            self._next_round_at = now + self._pause
            self._pause = min(2 * self._pause, PAUSE_MAX_S)
        elif found is None and self.next_at <= now:
            self._next_round_at = None
            self._tried.clear()
            found = self._given[0]
        return found

    @property
    def next_at(self) -> float:
        """When the next round begins, or there is no time for it."""
        begins = -inf if self._next_round_at is None else self._next_round_at
        return min(begins, self.deadline)

    def _untried(self) -> list[str]:
        known = dict.fromkeys((*self._given, *self._others))
        return [address for address in known if address not in self._tried]

    def _given_up(self, address: str) -> ClusterError:
        error = self._error
        assert error is not None, "nobody gives up before something failed"
        if not self._retry_for:
            return error
        waits = f", and {self.name(address)} waits for {self._waiting}" if self._waiting else ""
        names = ", ".join(dict.fromkeys(self.name(each) for each in self._asked))
        return ClusterError(
            error.code,
            f"{error.message}{waits}; no node went on with it within {self._retry_for:g} s "
            f"(asked: {names})",
            retryable=error.retryable,
        )

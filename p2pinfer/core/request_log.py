"""The leader's requests: the token log of each, who serves it, and whether the worker has it.

Forwarding is idempotent: a serving node that lost an answer forwards again with the tokens it has,
and gets the rest of the log. A request that comes by another node moves there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf

from p2pinfer.core.events import CancelRequest, RequestEnded, StartRequest
from p2pinfer.core.outbox import Outbox
from p2pinfer.errors import ERROR_CODES
from p2pinfer.limits import MAX_REQUESTS, MAX_STEP_SLOTS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Cancel, Drawn, DrawnToken, Ended, Forward

REPLY_KEPT_S = 60.0
"""A finished reply can be asked for again for this long."""

MAX_KEPT_REPLIES = MAX_REQUESTS
"""Finished replies kept; the oldest goes first."""

MOVED_S = 0.9
"""After a request moved, late messages of the node it moved from do not move it back. Less than
the period in which a serving node forwards again, so that a client may return."""

MAX_STEP_FAILURES = 3
"""Failed steps in a row without one token drawn; after that the requests end."""


@dataclass(slots=True)
class Entry:
    """One request in the leader's log. `tokens` are those of the reply, received and drawn."""

    request_id: int
    serving_id: str
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    tokens: list[int]
    started: bool = False
    ended: Ended | None = None
    ended_at: float = inf
    moved_from: str = ""
    moved_at: float = -inf


class RequestLog:
    """All requests of the cluster, kept by its leader; `in_force` says whether it may start any."""

    def __init__(self, box: Outbox) -> None:
        self._box = box
        self._entries: dict[int, Entry] = {}
        self._failures = 0

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return sum(entry.ended is None for entry in self._entries.values())

    @property
    def deadline(self) -> float:
        """When the first finished reply may be forgotten."""
        return min((e.ended_at + REPLY_KEPT_S for e in self._entries.values()), default=inf)

    def forget_old(self, now: float) -> None:
        """Forget finished replies that are old, or too many."""
        ended = sorted((e for e in self._entries.values() if e.ended), key=lambda e: e.ended_at)
        too_many = max(0, len(ended) - MAX_KEPT_REPLIES)
        for number, entry in enumerate(ended):
            if number < too_many or entry.ended_at + REPLY_KEPT_S <= now:
                del self._entries[entry.request_id]

    # --- from serving nodes -----------------------------------------------------------------------

    def forward(self, message: Forward, now: float) -> None:
        """Enter a request, or bring its serving node up to date."""
        entry = self._entries.get(message.request_id)
        if entry is None:
            self._enter(message)
            return
        if (message.prompt_ids, message.params) != (entry.prompt_ids, entry.params):
            self._refuse(message, "log_conflict", "this request id has another prompt or settings")
            return
        if message.serving_id == entry.moved_from and now < entry.moved_at + MOVED_S:
            return
        at = first_difference(message.received, entry.tokens)
        if at is not None:
            self._refuse(
                message,
                "log_conflict",
                f"token {at} that you have is {message.received[at]}, the log has "
                f"{entry.tokens[at]}; submit the prompt under a new request id",
            )
            return
        if message.serving_id != entry.serving_id:
            self._move(entry, message.serving_id, now)
        if len(message.received) > len(entry.tokens):
            if entry.ended:
                at = len(entry.tokens)
                self._refuse(message, "log_conflict", f"the reply ended with {at} tokens")
                return
            self._extend(entry, message.received)
        self._send_tail(entry, len(message.received))

    def _enter(self, message: Forward) -> None:
        if self.running >= MAX_REQUESTS:
            self._refuse(
                message,
                "overloaded",
                f"{MAX_REQUESTS} requests are queued or running already; try again later",
            )
            return
        self._entries[message.request_id] = Entry(
            request_id=message.request_id,
            serving_id=message.serving_id,
            prompt_ids=message.prompt_ids,
            params=message.params,
            tokens=list(message.received),
        )

    def _move(self, entry: Entry, serving_id: str, now: float) -> None:
        """The client came back through another node."""
        if entry.ended is None:
            moved = Ended(
                request_id=entry.request_id,
                reason="cancelled",
                total_tokens=len(entry.tokens),
                code="cancelled",
                message="the client continues this reply through another node",
            )
            self._box.send(entry.serving_id, moved)
        entry.moved_from, entry.moved_at = entry.serving_id, now
        entry.serving_id = serving_id

    def _extend(self, entry: Entry, received: Sequence[int]) -> None:
        """The client has more than the log: those tokens are forced, and drawn no more."""
        entry.tokens = list(received)
        if entry.started:
            self._box.order(CancelRequest(request_id=entry.request_id))
            entry.started = False

    def _send_tail(self, entry: Entry, start: int) -> None:
        tail = [
            DrawnToken(request_id=entry.request_id, index=index, token=entry.tokens[index])
            for index in range(start, len(entry.tokens))
        ]
        self._send_drawn(entry.serving_id, tail)
        if entry.ended:
            self._box.send(entry.serving_id, entry.ended)

    def cancel(self, message: Cancel, sender: str) -> None:
        """The serving node wants no more of a reply; from another node it says nothing."""
        entry = self._entries.get(message.request_id)
        if entry and entry.serving_id == sender and entry.ended is None:
            self._remove(entry)

    def serving_lost(self, node_id: str) -> None:
        """The clients of that node are gone with it."""
        for entry in list(self._entries.values()):
            if entry.serving_id == node_id and entry.ended is None:
                self._remove(entry)

    def _remove(self, entry: Entry) -> None:
        if entry.started:
            self._box.order(CancelRequest(request_id=entry.request_id))
        del self._entries[entry.request_id]

    def _refuse(self, message: Forward, code: str, text: str) -> None:
        ended = Ended(
            request_id=message.request_id,
            reason="error",
            total_tokens=len(message.received),
            code=code,
            message=text,
            retryable=ERROR_CODES.get(code, False),
        )
        self._box.send(message.serving_id, ended)

    # --- with the worker --------------------------------------------------------------------------

    def start_all(self) -> None:
        """A plan is in force: give the worker what it has not got yet."""
        for entry in self._entries.values():
            if entry.ended is None and not entry.started:
                entry.started = True
                self._box.order(
                    StartRequest(
                        request_id=entry.request_id,
                        prompt_ids=entry.prompt_ids,
                        received=tuple(entry.tokens),
                        params=entry.params,
                    )
                )

    def drawn(self, tokens: Iterable[DrawnToken]) -> None:
        """The worker drew tokens: write them down, and send them to the nodes that serve them."""
        by_node: defaultdict[str, list[DrawnToken]] = defaultdict(list)
        for token in tokens:
            entry = self._entries.get(token.request_id)
            # What was drawn for a request that was cancelled or extended since is old.
            if entry and entry.started and entry.ended is None and token.index == len(entry.tokens):
                entry.tokens.append(token.token)
                by_node[entry.serving_id].append(token)
                self._failures = 0
        for node_id, its_tokens in by_node.items():
            self._send_drawn(node_id, its_tokens)

    def ended(self, report: RequestEnded, now: float) -> None:
        """The worker says that a reply is complete, or impossible."""
        entry = self._entries.get(report.request_id)
        if entry is None or not entry.started or entry.ended:
            return
        code, message, known = report.code, report.message, len(entry.tokens)
        if not code and report.total_tokens > known:
            # Of an attempt before this one, which was cancelled.
            return
        if not code and report.total_tokens < known:
            code = "log_conflict"
            message = (
                f"you have {known} tokens of a reply that ends after {report.total_tokens}; "
                f"submit the prompt under a new request id"
            )
        ended = Ended(
            request_id=entry.request_id,
            reason="error" if code else report.reason,
            total_tokens=known,
            code=code,
            message=message[:4096],
            retryable=ERROR_CODES.get(code, False),
            ttft_s=report.ttft_s,
            tokens_per_s=report.tokens_per_s,
        )
        self._box.send(entry.serving_id, ended)
        if code:
            del self._entries[entry.request_id]
        else:
            entry.ended, entry.ended_at = ended, now

    def fail_started(self, code: str, message: str) -> None:
        """End in an error all requests that the worker has, and take them from it."""
        for entry in [e for e in self._entries.values() if e.started and e.ended is None]:
            ended = Ended(
                request_id=entry.request_id,
                reason="error",
                total_tokens=len(entry.tokens),
                code=code,
                message=message[:4096],
                retryable=ERROR_CODES.get(code, False),
            )
            self._box.send(entry.serving_id, ended)
            self._remove(entry)

    def step_failed(self, reason: str) -> None:
        """A step broke; when that goes on without progress, trying again is no cure."""
        self._failures += 1
        if self._failures >= MAX_STEP_FAILURES:
            self._failures = 0
            self.fail_started("internal", f"{MAX_STEP_FAILURES} steps in a row failed: {reason}")

    def _send_drawn(self, node_id: str, tokens: Sequence[DrawnToken]) -> None:
        for start in range(0, len(tokens), MAX_STEP_SLOTS):
            self._box.send(node_id, Drawn(tokens=tuple(tokens[start : start + MAX_STEP_SLOTS])))


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """The first index at which two runs of tokens differ, as far as both go."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), None)

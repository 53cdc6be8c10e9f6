"""The leader's requests: the token log of each, who serves it, and whether the worker has it.

Forwarding is idempotent: a serving node that lost an answer forwards again with the tokens it has,
and gets the rest of the log. A request that comes by another node moves there. A new leader takes
over the logs that the members agreed on; it draws more tokens of one only when a serving node
claims it by forwarding it in this leader's term, and forgets it when none does for a while. Only
committed tokens are sent to serving nodes.

A log lives as long as its leader leads: it is made when the node is elected, and dropped when it
loses its office.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from math import inf

from msgspec.structs import replace

from p2pinfer.core.agreement import Agreed
from p2pinfer.core.events import (
    CancelRequest,
    FenceSettled,
    NodeConfig,
    RequestEnded,
    StartRequest,
    TokensCommitted,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_entry import Entry, conflict_of, contradicts, error, merge, note
from p2pinfer.core.scheduler import capacity
from p2pinfer.errors import ERROR_CODES
from p2pinfer.limits import MAX_NODES, MAX_POSITIONS, MAX_REQUESTS, MAX_STEP_SLOTS
from p2pinfer.types import Failover, Fence
from p2pinfer.wire.messages import Cancel, Drawn, DrawnToken, Ended, Forward, Interruption

REPLY_KEPT_S = 60.0
"""A finished reply can be asked for again for this long."""

MAX_KEPT_REPLIES = MAX_REQUESTS
"""Finished replies kept; the oldest goes first. As many ids of removed requests are remembered."""

MAX_KEPT_TOKENS = MAX_POSITIONS
"""Tokens of all finished replies that are kept, their prompts included: about 40 MB, at 40 bytes a
token, and enough for one of the longest."""

MOVED_S = 0.9
"""After a request moved, or was claimed for the first time, no other node moves it: what the former
one still says is late. Less than the period in which a serving node forwards again, so that a
client may return."""

MAX_STEP_FAILURES = 3
"""Failed steps in a row without a token committed or a member lost; then the requests end."""


class RequestLog:
    """All requests of the cluster, kept by its leader. Times in seconds."""

    def __init__(self, config: NodeConfig, box: Outbox) -> None:
        self._orphan_timeout = config.orphan_timeout
        self._max_positions = config.model.max_positions if config.model else MAX_POSITIONS
        self._box = box
        self._entries: dict[int, Entry] = {}
        self._gone: dict[int, None] = {}
        self._to_cancel: list[int] = []
        self._fence: Fence | None = None
        self._settled: Fence | None = None
        self._failures = 0

    @property
    def running(self) -> int:
        """Requests that have not ended."""
        return sum(entry.ended is None for entry in self._entries.values())

    @property
    def largest(self) -> int:
        """Positions that the largest request that has not ended may come to; 0: there is none."""
        going = (entry for entry in self._entries.values() if entry.ended is None)
        return max(
            (capacity(e.prompt_tokens, e.params, self._max_positions) for e in going), default=0
        )

    @property
    def deadline(self) -> float:
        """When the first finished reply, or the first orphan, may be forgotten."""
        times = (min(e.ended_at + REPLY_KEPT_S, e.orphan_at) for e in self._entries.values())
        return min(times, default=inf)

    def wants(self, request_id: int) -> bool:
        """Whether a log that members have of a request is wanted: it has not ended here."""
        entry = self._entries.get(request_id)
        return request_id not in self._gone and (entry is None or entry.ended is None)

    def look(self, now: float) -> None:
        """Forget finished replies that are old, or too many, and requests that nobody claims."""
        for entry in [e for e in self._entries.values() if e.orphan_at <= now]:
            self._remove(entry)
        ended = sorted((e for e in self._entries.values() if e.ended), key=lambda e: e.ended_at)
        too_many = surplus([e.prompt_tokens + len(e.tokens) for e in ended])
        for number, entry in enumerate(ended):
            if number < too_many or entry.ended_at + REPLY_KEPT_S <= now:
                del self._entries[entry.request_id]

    # --- from serving nodes -----------------------------------------------------------------------

    def forward(self, message: Forward, now: float) -> None:
        """Enter a request, claim it, or bring its serving node up to date."""
        entry = self._entries.get(message.request_id)
        if entry is None:
            self._enter(message)
            return
        if message.serving_id != entry.serving_id and message.attempt < entry.attempt:
            if entry.begun:  # else the later attempt may yet turn out to contradict the log
                self._answer_earlier(message, entry)
            return
        held = entry.serving_id not in ("", message.serving_id) and now < entry.fixed_until
        if held and message.attempt == entry.attempt:
            return
        if conflict := conflict_of(message, entry):
            self._refuse(message, "log_conflict", conflict)
            return
        if message.serving_id != entry.serving_id:
            self._move(entry, message, now)
        entry.attempt = max(entry.attempt, message.attempt)
        if len(message.received) > len(entry.tokens):
            self._extend(entry, message.received)
        entry.committed = max(entry.committed, len(message.received))
        entry.sent = len(message.received)
        self._send_news([entry])
        if entry.ended:
            self._box.send(entry.serving_id, entry.ended)

    def _answer_earlier(self, message: Forward, entry: Entry) -> None:
        """The client has gone on through another node; or somebody else has, in its name, who has
        other tokens."""
        if conflict := conflict_of(message, entry):
            self._refuse(message, "log_conflict", conflict)
        else:
            self._box.send(message.serving_id, _moved(entry))

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
            params=message.params,
            prompt_tokens=len(message.prompt_ids),
            prompt_ids=message.prompt_ids,
            tokens=list(message.received),
            committed=len(message.received),
            serving_id=message.serving_id,
            sent=len(message.received),
            claimed=True,
            attempt=message.attempt,
        )

    def _move(self, entry: Entry, message: Forward, now: float) -> None:
        """The client came back through another node, or its node has found this leader."""
        if entry.serving_id and entry.ended is None:
            self._box.send(entry.serving_id, _moved(entry))
        if not entry.claimed:
            # Only now is it known which tokens the client had when the old leader was lost.
            entry.prompt_ids = message.prompt_ids
            position = entry.prompt_tokens + len(message.received)
            before, entry.interruptions = entry.interruptions, []
            for failover in before:
                note(entry, replace(failover, position=position))
        entry.serving_id, entry.claimed = message.serving_id, True
        entry.orphan_at, entry.fixed_until = inf, now + MOVED_S

    def _extend(self, entry: Entry, received: Sequence[int]) -> None:
        """The client has more than the log: those tokens are forced, and drawn no more."""
        entry.tokens = list(received)
        entry.ending = None
        if entry.started:
            # Its KV goes with it, so it begins again from 0.
            self._box.order(CancelRequest(request_id=entry.request_id))
            entry.started = False

    def cancel(self, message: Cancel, sender: str) -> None:
        """The serving node wants no more of a reply; from another node it says nothing.

        Of a request without a serving node any node may say so, unless it says only that its
        client is gone: that may be on its way to another node.
        """
        entry = self._entries.get(message.request_id)
        orphan = entry is None or not entry.serving_id
        if orphan and message.reason == "orphan":
            return
        if entry is None:
            # A log of it may be about to be taken over.
            self._bury(message.request_id)
        elif entry.ended is None and (orphan or entry.serving_id == sender):
            self._remove(entry)

    def serving_lost(self, node_id: str, now: float) -> None:
        """The requests of that node go on for a while: their clients may resume elsewhere."""
        for entry in self._entries.values():
            if entry.serving_id == node_id:
                entry.serving_id = ""
                if entry.ended is None:
                    entry.orphan_at = now + self._orphan_timeout

    def _remove(self, entry: Entry) -> None:
        if entry.logged:
            self._tell_to_forget(entry.request_id)
        del self._entries[entry.request_id]
        self._bury(entry.request_id)

    def _bury(self, request_id: int) -> None:
        """Remember that logs of this request are not wanted any more."""
        self._gone.pop(request_id, None)
        self._gone[request_id] = None
        if len(self._gone) > MAX_KEPT_REPLIES:
            del self._gone[next(iter(self._gone))]

    def _tell_to_forget(self, request_id: int) -> None:
        """The worker, and through it all others, may forget a request: now, or once it obeys."""
        if self._fence is None:
            self._to_cancel.append(request_id)
        else:
            self._box.order(CancelRequest(request_id=request_id))

    def _refuse(self, message: Forward, code: str, text: str) -> None:
        ended = Ended(
            request_id=message.request_id,
            reason="error",
            total_tokens=len(message.received),
            code=code,
            message=text,
            retryable=ERROR_CODES[code],
        )
        self._box.send(message.serving_id, ended)

    # --- a new plan -------------------------------------------------------------------------------

    def adopt(
        self,
        agreed: Sequence[Agreed],
        lost: tuple[str, ...],
        detect_s: float,
        exact: bool,
        now: float,
    ) -> None:
        """A plan is activated, with these logs: all requests are to be started anew.

        `lost` are the names of members whose loss brought the plan about, found out after
        `detect_s`; the clients of the requests that it interrupted are told, and whether the
        reply is `exact` all the same.
        """
        if lost:
            self._failures = 0
        interrupted = {e.request_id for e in self._entries.values() if e.started}
        for entry in self._entries.values():
            entry.started = entry.logged = False
            entry.ending = None
            entry.restart = 0
        self._fence, self._to_cancel = None, []
        rungs = {news.request_id: news.rung for news in agreed}
        for news in sorted(agreed, key=lambda news: news.request_id):
            if self._take_over(news, now):
                interrupted.add(news.request_id)
        for request_id in sorted(interrupted if lost else ()):
            entry = self._entries[request_id]
            if entry.ended is None:
                failover = Failover(
                    position=entry.prompt_tokens + entry.committed,
                    lost=tuple(dict.fromkeys(lost))[:MAX_NODES],
                    rung=rungs[request_id] if entry.restart else "replay",
                    detect_s=detect_s,
                    stall_s=0.0,
                    exact=exact,
                )
                note(entry, failover)

    def _take_over(self, news: Agreed, now: float) -> bool:
        """Take one agreed log; false if it is not wanted."""
        log, entry = news.log, self._entries.get(news.request_id)
        if not self.wants(news.request_id):
            # It ended while the logs were being gathered.
            self._to_cancel.append(news.request_id)
            return False
        if entry and not entry.begun and contradicts(entry, log):
            # It was forwarded to this leader before the logs were known.
            text = "the log that the cluster has of this request differs from what you have"
            self._send_end(entry, error(entry, "log_conflict", text))
            entry = None
        if entry is None:
            self._entries[news.request_id] = entry = Entry(
                request_id=news.request_id,
                params=log.params,
                prompt_tokens=log.prompt_tokens,
                prompt_ids=(),
                tokens=[],
                committed=0,
                orphan_at=now + self._orphan_timeout,
            )
        entry.logged = entry.begun = True
        entry.restart = merge(entry, news)
        return True

    def start_all(self, fence: Fence) -> None:
        """The plan of `fence` is in force and this node's worker obeys it: give it what it lacks.

        Whatever nobody has claimed since this node leads waits. First come, first served; those
        that were taken over by their ids.
        """
        if fence != self._fence:
            self._fence = fence
            for request_id in self._to_cancel:
                self._box.order(CancelRequest(request_id=request_id))
            self._to_cancel = []
            if self._settled == fence:
                self._settle()
        for entry in self._entries.values():
            if entry.claimed and not entry.started and entry.ended is None:
                self._start(entry)

    def _start(self, entry: Entry) -> None:
        entry.started = entry.logged = entry.begun = True
        self._gone.pop(entry.request_id, None)
        self._box.order(
            StartRequest(
                request_id=entry.request_id,
                prompt_ids=entry.prompt_ids,
                received=tuple(entry.tokens),
                params=entry.params,
                computed=entry.restart,
            )
        )
        # Should it have to be started once more, its KV will have been freed.
        entry.restart = 0

    # --- reports of the worker --------------------------------------------------------------------

    def committed(self, report: TokensCommitted) -> None:
        """Tokens are committed: send them to the nodes that serve them."""
        if report.fence != self._fence:
            return
        news: dict[int, Entry] = {}
        for token in report.tokens:
            entry = self._entries.get(token.request_id)
            if entry is None or not entry.started or entry.ended:
                continue
            self._failures = 0
            known = entry.tokens[token.index] if token.index < len(entry.tokens) else None
            if token.index > len(entry.tokens):
                # Of an attempt before this one, which was cancelled.
                continue
            if known is None:
                entry.tokens.append(token.token)
            elif known != token.token:
                # A client brought other tokens, of a log that was lost, while these were computed.
                text = f"token {token.index} that you have is {known}, the log has {token.token}"
                self._fail(entry, "log_conflict", text)
                news.pop(entry.request_id, None)
                continue
            entry.committed = max(entry.committed, token.index + 1)
            news[entry.request_id] = entry
        self._send_news(news.values())

    def settled(self, report: FenceSettled) -> None:
        """All that the logs held when the plan was activated is committed."""
        self._settled = report.fence
        if report.fence == self._fence:
            self._settle()

    def _settle(self) -> None:
        open_entries = [entry for entry in self._entries.values() if entry.ended is None]
        for entry in open_entries:
            entry.committed = len(entry.tokens)
        self._send_news(open_entries)
        for entry in open_entries:
            if entry.ending:
                self._finish(entry, *entry.ending)

    def ended(self, report: RequestEnded, now: float) -> None:
        """The worker says that a reply is complete, or impossible."""
        entry = self._entries.get(report.request_id)
        if report.fence != self._fence or entry is None or not entry.started or entry.ended:
            return
        known = len(entry.tokens)
        if report.code:
            self._fail(entry, report.code, report.message)
        elif report.total_tokens < known:
            self._fail(
                entry,
                "log_conflict",
                f"you have {known} tokens of a reply that ends after {report.total_tokens}; "
                f"submit the prompt under a new request id",
            )
        elif report.total_tokens == known and entry.committed < known:
            # The log that was agreed on was complete: the fence must be settled first.
            entry.ending = (report, now)
        elif report.total_tokens == known:
            self._finish(entry, report, now)
        # Otherwise it is of an attempt before this one, which was cancelled.

    def _finish(self, entry: Entry, report: RequestEnded, now: float) -> None:
        ended = Ended(
            request_id=entry.request_id, reason=report.reason, total_tokens=len(entry.tokens)
        )
        entry.ended, entry.ended_at, entry.orphan_at = ended, now, inf
        self._send_end(entry, ended)

    def fail_started(self, code: str, message: str) -> None:
        """End in an error all requests that the worker has, and take them from it."""
        for entry in [e for e in self._entries.values() if e.started and e.ended is None]:
            self._fail(entry, code, message)

    def step_failed(self, reason: str) -> None:
        """A step broke; when that goes on without progress, trying again is no cure."""
        self._failures += 1
        if self._failures >= MAX_STEP_FAILURES:
            self._failures = 0
            self.fail_started("internal", f"{MAX_STEP_FAILURES} steps in a row failed: {reason}")

    # --- to serving nodes -------------------------------------------------------------------------

    def _fail(self, entry: Entry, code: str, message: str) -> None:
        self._send_end(entry, error(entry, code, message))
        self._remove(entry)

    def _send_end(self, entry: Entry, ended: Ended) -> None:
        if entry.serving_id:
            self._box.send(entry.serving_id, ended)

    def _send_news(self, entries: Iterable[Entry]) -> None:
        """Send every serving node the committed tokens that it lacks, and what interrupted them."""
        by_node: defaultdict[str, list[tuple[DrawnToken, Failover | None]]] = defaultdict(list)
        for entry in entries:
            if not entry.serving_id:
                continue
            at = {failover.position: failover for failover in entry.interruptions}
            for index in range(entry.sent, entry.committed):
                token = DrawnToken(
                    request_id=entry.request_id, index=index, token=entry.tokens[index]
                )
                by_node[entry.serving_id].append((token, at.get(entry.prompt_tokens + index)))
            entry.sent = entry.committed
        for node_id, news in by_node.items():
            for start in range(0, len(news), MAX_STEP_SLOTS):
                part = news[start : start + MAX_STEP_SLOTS]
                interruptions = tuple(
                    Interruption(request_id=token.request_id, failover=failover)
                    for token, failover in part
                    if failover
                )
                tokens = tuple(token for token, _ in part)
                self._box.send(node_id, Drawn(tokens=tokens, interruptions=interruptions))


def surplus(sizes: Sequence[int]) -> int:
    """How many finished replies, the first of them, are to be forgotten, so that those that are
    kept are neither too many nor too long; `sizes` are their tokens, of the oldest first."""
    tokens = 0
    for kept, size in enumerate(reversed(sizes)):
        tokens += size
        if kept == MAX_KEPT_REPLIES or tokens > MAX_KEPT_TOKENS:
            return len(sizes) - kept
    return 0


def _moved(entry: Entry) -> Ended:
    """What a node is told that does not serve a request any more."""
    return Ended(
        request_id=entry.request_id,
        reason="cancelled",
        total_tokens=entry.sent,
        code="cancelled",
        message="the client continues this reply through another node",
    )

"""The requests that this node's own clients have made: the serving node's side of a reply.

Submitting is idempotent: the same id again, over whatever connection, attaches to the reply that
goes on and gets what the client lacks of it. The leader draws; what it sends is written down here
before it is delivered, so a client sees no gap, no repetition and no contradiction. When the leader
is lost a reply waits for the next one, and is forwarded to it with all tokens that it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf

from msgspec.structs import replace

from p2pinfer.core.events import (
    ClientCancelled,
    ClientSubmitted,
    Conclude,
    Deliver,
    NodeConfig,
    ReplyTo,
    RequestAccepted,
    RequestFinished,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_entry import first_difference
from p2pinfer.core.request_log import REPLY_KEPT_S, surplus
from p2pinfer.errors import ClusterError, InvalidRequestError
from p2pinfer.limits import MAX_FAILOVERS, MAX_REASON_CHARS, MAX_REQUESTS
from p2pinfer.types import Failover, SamplingParams
from p2pinfer.wire.messages import (
    Accepted,
    Cancel,
    Contact,
    Drawn,
    DrawnToken,
    Ended,
    Failed,
    Forward,
    Interruption,
)

FORWARD_RETRY_S = 1.0
FORWARD_RETRY_MAX_S = 8.0
"""A request is forwarded again after this long without a word of it; the wait doubles up to the
second value. It is cheap, and mends whatever a broken connection lost."""

GAP_RETRY_S = 0.2
"""The same when a gap was seen: about the time in which the leader's answer should be here."""

TELL_AFTER_S = 1.0
"""A client whose reply is interrupted is told what it waits for after this long: most changes of
plan are over by then."""

Interrupted = tuple[int, tuple[str, ...]]
"""What tells two interruptions of a reply apart: the leader's position, and who was lost."""


@dataclass(slots=True)
class Reply:
    """One request of a client of this node. `tokens` are those of the reply so far."""

    request_id: int
    route: bytes
    prompt_ids: tuple[int, ...]
    params: SamplingParams
    tokens: list[int]
    submitted_at: float
    waiting: bool
    """The cluster has not been ready since this was submitted."""

    attempt: int = 0
    """That of the client's last submission here."""

    told: str = ""
    """What its client knows that it waits for."""

    stalled_at: float = inf
    """Since when there is no plan in force that could bring it on."""

    first_at: float = inf
    last_at: float = inf
    drawn: int = 0
    """When the first and the last token came from a leader, and how many did."""

    failovers: dict[Interrupted, Failover] = field(default_factory=dict)
    interruptions: list[Interrupted] = field(default_factory=list)
    """Those of `failovers` that no token has come after yet."""

    forward_at: float = -inf
    forwarded_at: float = -inf
    retry_s: float = FORWARD_RETRY_S
    end: Conclude | None = None
    ended_at: float = inf


class Serving:
    """All replies of this node's clients, kept for a while after their end. Times in seconds.

    `others` says through which members a client may go on when this node is gone.
    """

    def __init__(
        self, config: NodeConfig, box: Outbox, others: Callable[[], tuple[Contact, ...]] = tuple
    ) -> None:
        self.leader_id = ""
        self._others = others
        self._term = 0
        self._config = config
        self._box = box
        self._replies: dict[int, Reply] = {}
        self._progress_at = -inf

    def _open(self) -> list[Reply]:
        return [reply for reply in self._replies.values() if reply.end is None]

    # --- clients ----------------------------------------------------------------------------------

    def submit(self, request: ClientSubmitted, waiting: str, now: float) -> None:
        """A client submits, resumes or repeats a request; `waiting` says what it must wait for."""
        reply, waiting = self._replies.get(request.request_id), waiting[:MAX_REASON_CHARS]
        if reply and reply.end and reply.end.code:
            # It ended in an error: the same id again is a new attempt.
            del self._replies[request.request_id]
            reply = None
        try:
            if reply is None:
                self._check(request)
            else:
                _check_same(request, reply)
        except ClusterError as error:
            self._box.add(
                ReplyTo(
                    route=request.route,
                    message=Failed(
                        request_id=request.request_id,
                        code=error.code,
                        message=error.message,
                        retryable=error.retryable,
                    ),
                )
            )
            return
        if reply is None:
            self._accept(request, waiting, now)
        else:
            self._attach(reply, request, waiting)
        if request.stopped:
            self.cancelled(ClientCancelled(request_id=request.request_id, reason="stop"), now)

    def _check(self, request: ClientSubmitted) -> None:
        request.params.check()
        prompt, model = len(request.prompt_ids), self._config.model
        if not prompt:
            raise InvalidRequestError("the prompt has no tokens; give some text", "empty_prompt")
        if model and prompt + 1 > model.max_positions:
            raise InvalidRequestError(
                f"the prompt has {prompt} tokens; with one token of reply {model.name} has room "
                f"for {model.max_positions - 1}: shorten it",
                "prompt_too_long",
            )
        if len(self._open()) >= MAX_REQUESTS:
            raise ClusterError(
                "overloaded",
                f"{MAX_REQUESTS} requests are queued or running already; try again later",
                retryable=True,
            )

    def _accept(self, request: ClientSubmitted, waiting: str, now: float) -> None:
        reply = self._replies[request.request_id] = Reply(
            request_id=request.request_id,
            route=request.route,
            prompt_ids=request.prompt_ids,
            params=request.params,
            tokens=list(request.received),
            submitted_at=now,
            waiting=bool(waiting),
            attempt=request.attempt,
            told=waiting,
            stalled_at=now if waiting else inf,
        )
        self._answer(reply)
        self._box.add(
            RequestAccepted(
                request_id=request.request_id,
                prompt_tokens=len(request.prompt_ids),
                waiting=waiting,
            )
        )

    def _attach(self, reply: Reply, request: ClientSubmitted, waiting: str) -> None:
        reply.route = request.route
        if request.attempt > reply.attempt:
            # Another node may have served it meanwhile: the leader must know that we do again.
            reply.attempt, reply.forward_at = request.attempt, -inf
        reply.told = waiting if reply.waiting else ""
        self._answer(reply)
        held, known = len(request.received), len(reply.tokens)
        if held > known and reply.end is None:
            reply.tokens = list(request.received)
            reply.forward_at = -inf
        elif held < known:
            self._deliver(reply, held)
        if reply.end:
            self._box.add(replace(reply.end, route=reply.route))

    def _answer(self, reply: Reply) -> None:
        accepted = Accepted(
            request_id=reply.request_id,
            served_by=self._config.member.name,
            prompt_ids=reply.prompt_ids,
            waiting=reply.told,
            others=self._others(),
        )
        self._box.add(ReplyTo(route=reply.route, message=accepted))

    def cancelled(self, request: ClientCancelled, now: float) -> None:
        """A client wants no more, or a stop string was seen in what it got."""
        reply = self._replies.get(request.request_id)
        if reply is None or reply.end:
            return
        if request.reason == "stop" and reply.forward_at == -inf and self.leader_id:
            self._forward(reply, now)  # or it would be another node's, which we cannot end
        self._cancel_at_leader(reply, request.reason)
        if request.reason == "stop":
            self._conclude(reply, "stop", now)
        else:
            self._conclude(reply, "cancelled", now, "cancelled", "the client cancelled it")

    # --- the leader -------------------------------------------------------------------------------

    def leader_found(self, leader_id: str, term: int) -> None:
        """Somebody leads in `term`: every open reply is forwarded to it at once, with its tokens.

        Saying so again changes nothing.
        """
        if (leader_id, term) == (self.leader_id, self._term):
            return
        self.leader_id, self._term = leader_id, term
        for reply in self._open():
            reply.forward_at = reply.forwarded_at = -inf
            reply.retry_s = FORWARD_RETRY_S

    def leader_lost(self) -> None:
        """Nobody leads: what is open waits for the next leader."""
        self.leader_id = ""

    def drawn(self, message: Drawn, now: float) -> None:
        """The present leader committed tokens: write them down, deliver those that are new."""
        for interruption in message.interruptions:
            self._interrupted(interruption)
        news: dict[int, int] = {}
        unwanted: dict[int, None] = {}
        for token in message.tokens:
            reply = self._replies.get(token.request_id)
            if reply is None or reply.end:
                unwanted[token.request_id] = None
                continue
            known = len(reply.tokens)
            if self._write(reply, token, now):
                news.setdefault(token.request_id, known)
        for request_id, start in news.items():
            self._deliver(self._replies[request_id], start)
        for request_id in unwanted:
            # Nobody waits for it here: the leader may free its slot.
            self._box.send(self.leader_id, Cancel(request_id=request_id))

    def _interrupted(self, interruption: Interruption) -> None:
        """The leader says that a reply was interrupted before the tokens that come now."""
        reply, failover = self._replies.get(interruption.request_id), interruption.failover
        if reply is None or reply.end or len(reply.failovers) >= MAX_FAILOVERS:
            return
        key = (failover.position, failover.lost)
        passed = failover.position < len(reply.prompt_ids) + len(reply.tokens)
        if not passed and key not in reply.failovers:
            reply.failovers[key] = failover
            reply.interruptions.append(key)

    def _write(self, reply: Reply, token: DrawnToken, now: float) -> bool:
        """Append a token if it is the next one; a gap is asked for by forwarding again."""
        known = len(reply.tokens)
        if token.index > known:
            _ask_soon(reply, now)
            return False
        if token.index < known:
            if reply.tokens[token.index] != token.token:
                # Its client came back with tokens of another log: what follows is not its reply.
                self._give_up(
                    reply,
                    now,
                    "log_conflict",
                    f"token {token.index} that you have is {reply.tokens[token.index]}, the log "
                    f"has {token.token}; submit the prompt under a new request id",
                )
            return False
        before = reply.last_at if reply.drawn else reply.submitted_at
        for key in reply.interruptions:
            reply.failovers[key] = replace(
                reply.failovers[key],
                position=len(reply.prompt_ids) + known,
                stall_s=max(0.0, now - before),
            )
        reply.interruptions.clear()
        reply.tokens.append(token.token)
        reply.first_at = min(reply.first_at, now)
        reply.last_at = self._progress_at = now
        reply.drawn += 1
        reply.retry_s = FORWARD_RETRY_S
        reply.forward_at = now + reply.retry_s
        return True

    def ended(self, message: Ended, now: float) -> None:
        """The leader says that a reply is complete, or failed."""
        reply = self._replies.get(message.request_id)
        if reply is None or reply.end:
            return
        if not message.code and message.total_tokens != len(reply.tokens):
            # Some tokens were lost on the way: a reply is never cut short in silence.
            _ask_soon(reply, now)
            return
        self._conclude(
            reply,
            message.reason,
            now,
            message.code,
            message.message,
            retryable=message.retryable,
        )

    def fail_all(self, code: str, message: str, now: float) -> None:
        """End every open reply in a retryable error."""
        for reply in self._open():
            self._conclude(reply, "error", now, code, message, retryable=True)

    # --- time -------------------------------------------------------------------------------------

    def look(self, *, ready: bool, waiting: str, leaderless: bool, now: float) -> None:
        """Forward what is due, give up what stood still for too long, forget what is old.

        `ready`: a plan is in force; where not, `waiting` says what for. `leaderless`: nobody leads
        a cluster that has had a plan.
        """
        patience, waiting = self._config.wait_for_nodes, waiting[:MAX_REASON_CHARS]
        for reply in self._open():
            if ready:
                self._tell(reply, "")
                reply.waiting, reply.stalled_at = False, inf
            else:
                reply.stalled_at = min(reply.stalled_at, now)
            if now >= self._patient_until(reply):
                code = "no_quorum" if leaderless else "not_ready"
                text = f"the cluster was not ready for {patience:g} s; it waits for {waiting}"
                self._give_up(reply, now, code, text, retryable=True)
                continue
            if not ready and (reply.waiting or now >= reply.stalled_at + TELL_AFTER_S):
                self._tell(reply, waiting)
            if self.leader_id and now >= reply.forward_at:
                self._forward(reply, now)
        self._forget_old(now)

    def _patient_until(self, reply: Reply) -> float:
        """When a reply that stands still is given up. A token for any of them shows that the
        cluster works."""
        return max(reply.stalled_at, self._progress_at) + self._config.wait_for_nodes

    def _tell(self, reply: Reply, waiting: str) -> None:
        """Tell a client what it waits for, if that has changed."""
        if waiting != reply.told:
            reply.told = waiting
            self._answer(reply)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        times = [inf]
        for reply in self._replies.values():
            if reply.end:
                times.append(reply.ended_at + REPLY_KEPT_S)
                continue
            times.append(self._patient_until(reply))
            if self.leader_id:
                times.append(reply.forward_at)
        return min(times)

    def _forward(self, reply: Reply, now: float) -> None:
        reply.forwarded_at, reply.forward_at = now, now + reply.retry_s
        reply.retry_s = min(2 * reply.retry_s, FORWARD_RETRY_MAX_S)
        forward = Forward(
            request_id=reply.request_id,
            serving_id=self._config.member.node_id,
            prompt_ids=reply.prompt_ids,
            received=tuple(reply.tokens),
            params=reply.params,
            attempt=reply.attempt,
        )
        self._box.send(self.leader_id, forward)

    def _forget_old(self, now: float) -> None:
        ended = sorted((r for r in self._replies.values() if r.end), key=lambda r: r.ended_at)
        too_many = surplus([len(r.prompt_ids) + len(r.tokens) for r in ended])
        for number, reply in enumerate(ended):
            if number < too_many or reply.ended_at + REPLY_KEPT_S <= now:
                del self._replies[reply.request_id]

    # --- outputs ----------------------------------------------------------------------------------

    def _deliver(self, reply: Reply, start: int) -> None:
        self._box.add(
            Deliver(
                route=reply.route,
                request_id=reply.request_id,
                start=start,
                tokens=tuple(reply.tokens[start:]),
            )
        )

    def _cancel_at_leader(self, reply: Reply, reason: str) -> None:
        if self.leader_id:
            self._box.send(self.leader_id, Cancel(request_id=reply.request_id, reason=reason))

    def _give_up(
        self, reply: Reply, now: float, code: str, message: str, *, retryable: bool = False
    ) -> None:
        """End a reply in an error of this node's own; the leader may free its slot."""
        self._cancel_at_leader(reply, "client")
        self._conclude(reply, "error", now, code, message, retryable=retryable)

    def _conclude(
        self,
        reply: Reply,
        reason: str,
        now: float,
        code: str = "",
        message: str = "",
        *,
        retryable: bool = False,
    ) -> None:
        seconds = reply.last_at - reply.first_at
        ttft_s = reply.first_at - reply.submitted_at if reply.drawn else 0.0
        tokens_per_s = (reply.drawn - 1) / seconds if reply.drawn > 1 and seconds > 0 else 0.0
        pending = set(reply.interruptions)
        reply.end = Conclude(
            route=reply.route,
            request_id=reply.request_id,
            reason=reason,
            total_tokens=len(reply.tokens),
            code=code,
            message=message,
            retryable=retryable,
            ttft_s=ttft_s,
            tokens_per_s=tokens_per_s,
            failovers=tuple(f for key, f in reply.failovers.items() if key not in pending),
        )
        reply.ended_at = now
        self._box.add(reply.end)
        self._box.add(
            RequestFinished(
                request_id=reply.request_id,
                reason=reason,
                prompt_tokens=len(reply.prompt_ids),
                reply_tokens=len(reply.tokens),
                ttft_s=ttft_s,
                tokens_per_s=tokens_per_s,
                code=code,
            )
        )


def _ask_soon(reply: Reply, now: float) -> None:
    """Something was lost on the way: forward again, but once for a whole burst of such news."""
    soon = max(now, reply.forwarded_at + GAP_RETRY_S)
    reply.forward_at = min(reply.forward_at, soon)


def _check_same(request: ClientSubmitted, reply: Reply) -> None:
    """Raise `ClusterError` `log_conflict` when a repeated submission is not the same request."""
    if (request.prompt_ids, request.params) != (reply.prompt_ids, reply.params):
        raise ClusterError(
            "log_conflict",
            f"request id {request.request_id:#x} is in use with another prompt or other settings; "
            f"choose a new id",
        )
    at = first_difference(request.received, reply.tokens)
    if at is not None:
        raise ClusterError(
            "log_conflict",
            f"token {at} that you have is {request.received[at]}, the reply has "
            f"{reply.tokens[at]}; submit the prompt under a new request id",
        )
    if reply.end and len(request.received) > len(reply.tokens):
        raise ClusterError(
            "log_conflict",
            f"you have {len(request.received)} tokens of a reply that ended with "
            f"{len(reply.tokens)}; submit the prompt under a new request id",
        )

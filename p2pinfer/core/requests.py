"""The requests that this node's own clients have made: the serving node's side of a reply.

Submitting is idempotent: the same id again, over whatever connection, attaches to the reply that
goes on and gets what the client lacks of it. The leader draws; what it sends is written down here
before it is delivered, so a client sees no gap, no repetition and no contradiction.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

from p2pinfer.core.events import (
    ClientCancelled,
    ClientSubmitted,
    Conclude,
    Deliver,
    FrameDropped,
    NodeConfig,
    ReplyTo,
    RequestAccepted,
    RequestFinished,
)
from p2pinfer.core.outbox import Outbox
from p2pinfer.core.request_log import MAX_KEPT_REPLIES, REPLY_KEPT_S, first_difference
from p2pinfer.errors import ClusterError, InvalidRequestError
from p2pinfer.limits import MAX_REQUESTS
from p2pinfer.types import SamplingParams
from p2pinfer.wire.messages import Accepted, Cancel, Drawn, DrawnToken, Ended, Failed, Forward

FORWARD_RETRY_S = 1.0
FORWARD_RETRY_MAX_S = 8.0
"""A request is forwarded again after this long without a word of it; the wait doubles up to the
second value. It is cheap, and mends whatever a broken connection lost."""

GAP_RETRY_S = 0.2
"""The same when a gap was seen: about the time in which the leader's answer should be here."""


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

    forward_at: float = -inf
    forwarded_at: float = -inf
    retry_s: float = FORWARD_RETRY_S
    end: Conclude | None = None
    ended_at: float = inf


class Serving:
    """All replies of this node's clients, kept for a while after their end. Times in seconds."""

    def __init__(self, config: NodeConfig, box: Outbox) -> None:
        self.leader_id = ""
        self._config = config
        self._box = box
        self._replies: dict[int, Reply] = {}

    def _open(self) -> list[Reply]:
        return [reply for reply in self._replies.values() if reply.end is None]

    # --- clients ----------------------------------------------------------------------------------

    def submit(self, request: ClientSubmitted, waiting: str, now: float) -> None:
        """A client submits, resumes or repeats a request; `waiting` says what it must wait for."""
        reply = self._replies.get(request.request_id)
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
        self._replies[request.request_id] = Reply(
            request_id=request.request_id,
            route=request.route,
            prompt_ids=request.prompt_ids,
            params=request.params,
            tokens=list(request.received),
            submitted_at=now,
            waiting=bool(waiting),
        )
        self._answer(request, waiting)
        self._box.add(
            RequestAccepted(
                request_id=request.request_id,
                prompt_tokens=len(request.prompt_ids),
                waiting=waiting,
            )
        )

    def _attach(self, reply: Reply, request: ClientSubmitted, waiting: str) -> None:
        reply.route = request.route
        self._answer(request, waiting if reply.waiting else "")
        held, known = len(request.received), len(reply.tokens)
        if held > known and reply.end is None:
            reply.tokens = list(request.received)
            reply.forward_at = -inf
        elif held < known:
            self._deliver(reply, held)
        if reply.end:
            self._box.add(_conclusion_for(reply, reply.end))

    def _answer(self, request: ClientSubmitted, waiting: str) -> None:
        accepted = Accepted(
            request_id=request.request_id,
            served_by=self._config.member.name,
            prompt_ids=request.prompt_ids,
            waiting=waiting[:4096],
        )
        self._box.add(ReplyTo(route=request.route, message=accepted))

    def cancelled(self, request: ClientCancelled, now: float) -> None:
        """A client wants no more, or a stop string was seen in what it got."""
        reply = self._replies.get(request.request_id)
        if reply is None or reply.end:
            return
        self._cancel_at_leader(reply, "stop" if request.reason == "stop" else "client")
        if request.reason == "stop":
            self._conclude(reply, "stop", now)
        else:
            self._conclude(reply, "cancelled", now, "cancelled", "the client cancelled it")

    # --- the leader -------------------------------------------------------------------------------

    def leader_found(self, leader_id: str) -> None:
        """Somebody leads: what waited for that is forwarded now."""
        self.leader_id = leader_id
        for reply in self._open():
            reply.forward_at = -inf

    def leader_lost(self, message: str, now: float) -> None:
        """Nobody leads: end every open reply in a retryable error."""
        self.leader_id = ""
        self.fail_all("leader_lost", message, now)

    def drawn(self, message: Drawn, now: float) -> None:
        """The leader drew tokens: write them down, deliver those that are new, in order."""
        news: dict[int, int] = {}
        for token in message.tokens:
            reply = self._replies.get(token.request_id)
            if reply is None or reply.end:
                # Nobody waits for it here: the leader may free its slot.
                cancel = Cancel(request_id=token.request_id)
                self._box.send(self.leader_id, cancel)
                continue
            known = len(reply.tokens)
            if self._write(reply, token, now):
                news.setdefault(token.request_id, known)
        for request_id, start in news.items():
            self._deliver(self._replies[request_id], start)

    def _write(self, reply: Reply, token: DrawnToken, now: float) -> bool:
        """Append a token if it is the next one; a gap is asked for by forwarding again."""
        known = len(reply.tokens)
        if token.index > known:
            _ask_soon(reply, now)
            return False
        if token.index < known:
            if reply.tokens[token.index] != token.token:
                self._box.add(
                    FrameDropped(
                        reason=f"DRAWN: token {token.index} of request {reply.request_id:#x} "
                        f"is {reply.tokens[token.index]}, not {token.token}"
                    )
                )
            return False
        reply.tokens.append(token.token)
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
            ttft_s=message.ttft_s,
            tokens_per_s=message.tokens_per_s,
        )

    def fail_all(self, code: str, message: str, now: float) -> None:
        """End every open reply in a retryable error."""
        for reply in self._open():
            self._conclude(reply, "error", now, code, message, retryable=True)

    # --- time -------------------------------------------------------------------------------------

    def look(self, *, ready: bool, waiting: str, now: float) -> None:
        """Forward what is due, give up what waited too long, forget what is old."""
        for reply in self._open():
            if ready:
                reply.waiting = False
            patience = self._config.wait_for_nodes
            if reply.waiting and now >= reply.submitted_at + patience:
                self._cancel_at_leader(reply, "client")
                self._conclude(
                    reply,
                    "error",
                    now,
                    "not_ready",
                    f"the cluster was not ready within {patience:g} s; it waits for {waiting}",
                    retryable=True,
                )
            elif self.leader_id and now >= reply.forward_at:
                self._forward(reply, now)
        self._forget_old(now)

    @property
    def deadline(self) -> float:
        """When this wants to look again."""
        times = [inf]
        for reply in self._replies.values():
            if reply.end:
                times.append(reply.ended_at + REPLY_KEPT_S)
                continue
            if self.leader_id:
                times.append(reply.forward_at)
            if reply.waiting:
                times.append(reply.submitted_at + self._config.wait_for_nodes)
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
        )
        self._box.send(self.leader_id, forward)

    def _forget_old(self, now: float) -> None:
        ended = sorted((r for r in self._replies.values() if r.end), key=lambda r: r.ended_at)
        too_many = max(0, len(ended) - MAX_KEPT_REPLIES)
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

    def _conclude(
        self,
        reply: Reply,
        reason: str,
        now: float,
        code: str = "",
        message: str = "",
        *,
        retryable: bool = False,
        ttft_s: float = 0.0,
        tokens_per_s: float = 0.0,
    ) -> None:
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


def _conclusion_for(reply: Reply, end: Conclude) -> Conclude:
    """The end of a reply again, for the client's present connection."""
    return Conclude(
        route=reply.route,
        request_id=end.request_id,
        reason=end.reason,
        total_tokens=end.total_tokens,
        ttft_s=end.ttft_s,
        tokens_per_s=end.tokens_per_s,
    )

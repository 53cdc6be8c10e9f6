"""Replies to the clients of this node: text in, tokens to the core; tokens out, text to the client.

One `_Reply` per (connection, request). A client that reads slowly is buffered for, token by token;
one that is gone is found out by sending: after a second of silence an empty CHUNK goes out, which
also tells the client that its request lives, and a connection that no longer exists refuses it.
(ZeroMQ's own notification of a client's end, ROUTER_NOTIFY, is a draft that releases lack.)
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from math import inf
from queue import Empty, SimpleQueue
from typing import Final

from p2pinfer.core.events import ClientCancelled, ClientSubmitted, Conclude, Deliver, Input
from p2pinfer.errors import InvalidRequestError
from p2pinfer.limits import MAX_PENDING_CLIENTS, MAX_REASON_CHARS
from p2pinfer.model.tokenizer import IncrementalDetokenizer, Tokenizer
from p2pinfer.transport import Reply
from p2pinfer.wire.messages import Chunk, ControlMessage, Failed, Finished, Submit

KEEPALIVE_S: Final = 1.0
"""Silence towards a client after which an empty CHUNK is sent."""

RETRY_S: Final = 0.05
"""How soon a client whose queue was full is tried again."""

Send = Callable[[bytes, ControlMessage], Reply]


@dataclass
class _Reply:
    """One reply to one client. `next` is the index of the next token that it has not been sent."""

    route: bytes
    submit: Submit
    detokenizer: IncrementalDetokenizer
    began: float
    next: int = 0
    first_at: float = 0.0
    last_at: float = 0.0
    drawn: int = 0
    unsent: deque[ControlMessage] = field(default_factory=deque)
    spoken_at: float = 0.0
    over: bool = False
    """The last message is in `unsent`."""


class Serving:
    """The replies in progress. `wake` is called, from another thread, when `tokenised` has news."""

    def __init__(
        self,
        *,
        send: Send,
        wake: Callable[[], None],
        tokenizer: Tokenizer | None,
        vocab_size: int,
    ) -> None:
        self._send = send
        self._wake = wake
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._replies: dict[tuple[bytes, int], _Reply] = {}
        # One thread: a megabyte of text takes about a second, in which heartbeats go on.
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenise")
        self._done: SimpleQueue[tuple[_Reply, tuple[int, ...] | InvalidRequestError]] = (
            SimpleQueue()
        )
        self._sweep_at = inf

    @property
    def deadline(self) -> float:
        """When `sweep` is next wanted, in seconds."""
        return self._sweep_at

    @property
    def requests(self) -> int:
        """Replies in progress."""
        return len(self._replies)

    def close(self) -> None:
        """Wait for no one."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    # --- from clients -----------------------------------------------------------------------------

    def submit(self, route: bytes, message: Submit, now: float) -> list[Input]:
        """A client's request: at once for the core if it is in token ids, later if it is text."""
        if len(self._replies) >= MAX_PENDING_CLIENTS:
            self._refuse(route, message.request_id, "overloaded", "this node has too many clients")
            return []
        tokenizer = self._tokenizer
        if tokenizer is None:
            self._refuse(
                route,
                message.request_id,
                "invalid_request",
                "this node is a witness and has no model; submit through another node",
            )
            return []
        largest = max((*message.prompt_ids, *message.received), default=0)
        if largest >= self._vocab_size:
            self._refuse(
                route,
                message.request_id,
                "invalid_request",
                f"token id {largest} is not in the model's vocabulary of {self._vocab_size}",
            )
            return []
        reply = _Reply(
            route=route,
            submit=message,
            detokenizer=IncrementalDetokenizer(tokenizer, message.params.stop),
            began=now,
            spoken_at=now,
            next=len(message.received),
        )
        # The client has the text of the tokens that it has received.
        reply.detokenizer.push(self._visible(message.received))
        self._replies[route, message.request_id] = reply
        self._sweep_at = min(self._sweep_at, now + KEEPALIVE_S)
        if message.text:
            self._pool.submit(tokenizer.encode, message.text).add_done_callback(
                lambda future: self._encoded(reply, future)
            )
            return []
        return [_submitted(reply, message.prompt_ids)]

    def _encoded(self, reply: _Reply, future: Future[tuple[int, ...]]) -> None:
        if future.cancelled():
            return
        error = future.exception()
        if error is None:
            self._done.put((reply, future.result()))
        elif isinstance(error, InvalidRequestError):
            self._done.put((reply, error))
        else:
            self._done.put((reply, InvalidRequestError(f"the prompt cannot be tokenised: {error}")))
        self._wake()

    def tokenised(self) -> list[Input]:
        """Requests whose text has become token ids since the last call."""
        found: list[Input] = []
        while True:
            try:
                reply, result = self._done.get_nowait()
            except Empty:
                return found
            request_id = reply.submit.request_id
            if self._replies.get((reply.route, request_id)) is not reply:
                continue  # cancelled meanwhile
            if isinstance(result, InvalidRequestError):
                del self._replies[reply.route, request_id]
                self._refuse(reply.route, request_id, result.code, result.message)
            else:
                found.append(_submitted(reply, result))

    def forget(self, route: bytes, request_id: int) -> None:
        """The core has answered the request by FAILED itself."""
        self._replies.pop((route, request_id), None)

    # --- from the core ----------------------------------------------------------------------------

    def deliver(self, order: Deliver, now: float) -> list[Input]:
        """Send on reply tokens; returns a cancellation when they complete a stop string."""
        reply = self._replies.get((order.route, order.request_id))
        if reply is None or reply.over or reply.detokenizer.stopped:
            return []
        if not reply.drawn:
            self._forget_others(reply)
        tokens, text = self._until_stop(reply, order.tokens[max(0, reply.next - order.start) :])
        if not tokens:
            return []
        reply.drawn += len(tokens)
        reply.first_at = reply.first_at or now
        reply.last_at = now
        reply.unsent.append(
            Chunk(request_id=order.request_id, start=reply.next, tokens=tokens, text=text)
        )
        reply.next += len(tokens)
        lost = self._flush(reply, now)
        if reply.detokenizer.stopped and not lost:
            return [ClientCancelled(request_id=order.request_id, reason="stop")]
        return lost

    def conclude(self, order: Conclude, now: float) -> None:
        """Send the last message of a reply."""
        for reply in self._of_request(order.request_id):
            if reply.route != order.route:
                self.forget(reply.route, order.request_id)
                continue
            reply.over = True
            reply.unsent.append(_last_message(reply, order))
            self._flush(reply, now)

    # --- time -------------------------------------------------------------------------------------

    def sweep(self, now: float) -> list[Input]:
        """Try again what clients did not take; find those that are gone."""
        lost: list[Input] = []
        for reply in tuple(self._replies.values()):
            if not reply.unsent and reply.spoken_at + KEEPALIVE_S <= now:
                reply.unsent.append(
                    Chunk(request_id=reply.submit.request_id, start=reply.next, tokens=())
                )
            lost += self._flush(reply, now)
        wanted = (
            now + RETRY_S if reply.unsent else reply.spoken_at + KEEPALIVE_S
            for reply in self._replies.values()
        )
        self._sweep_at = min(wanted, default=inf)
        return lost

    def _flush(self, reply: _Reply, now: float) -> list[Input]:
        """Send what the client takes; returns a cancellation when it is gone."""
        request_id = reply.submit.request_id
        while reply.unsent:
            sent = self._send(reply.route, reply.unsent[0])
            if sent is Reply.FULL:
                self._sweep_at = min(self._sweep_at, now + RETRY_S)
                return []
            if sent is Reply.GONE:
                self.forget(reply.route, request_id)
                elsewhere = bool(self._of_request(request_id))
                over = reply.over or elsewhere
                return [] if over else [ClientCancelled(request_id=request_id, reason="orphan")]
            reply.unsent.popleft()
            reply.spoken_at = now
        if reply.over:
            self.forget(reply.route, request_id)
        return []

    # --- small things -----------------------------------------------------------------------------

    def _of_request(self, request_id: int) -> list[_Reply]:
        return [r for (_, known), r in self._replies.items() if known == request_id]

    def _forget_others(self, reply: _Reply) -> None:
        """The client has come again by another connection, and tokens go there now."""
        for other in self._of_request(reply.submit.request_id):
            if other is not reply:
                self.forget(other.route, other.submit.request_id)

    def _until_stop(self, reply: _Reply, tokens: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
        """The next tokens of a reply as far as it goes, and their text.

        The token that completes a stop string is the last one, however many come with it: else the
        reply's tokens would depend on when they came.
        """
        pieces: list[str] = []
        for token in tokens:
            pieces.append(reply.detokenizer.push(self._visible((token,))))
            if reply.detokenizer.stopped:
                break
        return tokens[: len(pieces)], "".join(pieces)

    def _visible(self, tokens: tuple[int, ...]) -> list[int]:
        """An end-of-text token is a token of the reply, but no text."""
        assert self._tokenizer is not None
        return [token for token in tokens if token not in self._tokenizer.eos_ids]

    def _refuse(self, route: bytes, request_id: int, code: str, message: str) -> None:
        retryable = code == "overloaded"
        self._send(
            route,
            Failed(request_id=request_id, code=code, message=message, retryable=retryable),
        )


def _submitted(reply: _Reply, prompt_ids: tuple[int, ...]) -> ClientSubmitted:
    message = reply.submit
    return ClientSubmitted(
        route=reply.route,
        request_id=message.request_id,
        prompt_ids=prompt_ids,
        received=message.received,
        params=message.params,
        attempt=message.attempt,
        stopped=reply.detokenizer.stopped,
    )


def _last_message(reply: _Reply, order: Conclude) -> ControlMessage:
    request_id = order.request_id
    text = reply.detokenizer.finish()
    stopped = reply.detokenizer.stopped
    if not stopped and (order.code or order.reason not in ("stop", "length")):
        return Failed(
            request_id=request_id,
            code=order.code or "cancelled",
            message=(order.message or "the request was cancelled")[:MAX_REASON_CHARS],
            retryable=order.retryable,
        )
    span = reply.last_at - reply.first_at
    own_rate = (reply.drawn - 1) / span if span > 0.001 else 0.0
    return Finished(
        request_id=request_id,
        reason="stop" if stopped else order.reason,
        total_tokens=reply.next,
        text=text,
        ttft_s=order.ttft_s or max(0.0, reply.first_at - reply.began),
        tokens_per_s=order.tokens_per_s or own_rate,
        failovers=order.failovers,
    )

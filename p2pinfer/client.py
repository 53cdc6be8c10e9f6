"""A client of a cluster: submits prompts to any node, follows replies, asks for status.

Each call makes its own connection to the first of the given addresses that answers, and closes it;
a `Client` holds nothing open. Events are the protocol's own messages.
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import zmq

from p2pinfer.config import format_address, parse_address
from p2pinfer.errors import ClusterError, InvalidRequestError, LocalProtocolError
from p2pinfer.limits import MAX_CONTROL_BYTES, MAX_TEXT_CHARS
from p2pinfer.transport import LinkKind, PairLimits, SocketPair
from p2pinfer.types import SamplingParams
from p2pinfer.wire.codec import decode, encode
from p2pinfer.wire.messages import (
    Accepted,
    Cancel,
    Chunk,
    ControlMessage,
    Done,
    Drain,
    Failed,
    Finished,
    Plane,
    PlanRequest,
    StatusReply,
    StatusRequest,
    Submit,
)

Event = Accepted | Chunk | Finished
"""What `submit` yields: the request is known (or waits: see `Accepted.waiting`), more of the reply,
and its end."""

CONNECT_S: Final = 3.0
"""How long an address may take to answer before the next one is tried."""

SILENCE_S: Final = 10.0
"""A node that serves us speaks at least every second, if only by an empty CHUNK."""

DRAIN_S: Final = 60.0
"""A node answers a DRAIN when it is done with it, or after its own time-out."""

GOODBYE_MS: Final = 300
"""How long a CANCEL may take to leave when a call is broken off."""

_QUEUE: Final = 65_536
"""Frames held for a caller that handles events slowly; then the node holds them."""


class Client:
    """Speaks to the first of `addresses` (`tcp://host:port` or `host:port`) that answers.

    `timeout` bounds, in seconds, how long a node may be silent. Raises `UsageError` for an address
    that is none.
    """

    def __init__(self, addresses: Sequence[str], *, timeout: float = SILENCE_S) -> None:
        self.addresses = tuple(format_address(*parse_address(text)) for text in addresses)
        self._timeout = timeout

    def submit(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: int | None = None,
        received: Sequence[int] = (),
    ) -> Iterator[Event]:
        """Submit a prompt, text or token ids, and yield what happens until the reply is complete.

        `received` are reply tokens of this `request_id` that the caller has already. Ending the
        iteration early, or Ctrl-C, cancels the request. Raises `InvalidRequestError` for a request
        that no cluster would take, and `ClusterError` with the protocol's code for a failed one.
        """
        if request_id is None:
            request_id = new_request_id()
        message = _submit_message(request_id, prompt, params, received)
        with self._connected() as link:
            link.send(message)
            over, tokens = False, len(received)
            try:
                while not over:
                    match answer := link.receive(self._timeout):
                        case Failed(request_id=known) if known in (0, request_id):
                            over = True
                            raise ClusterError(
                                answer.code, answer.message, retryable=answer.retryable
                            )
                        case Accepted(request_id=known) if known == request_id:
                            yield answer
                        case Chunk(request_id=known) if known == request_id and answer.tokens:
                            _check_whole(tokens, answer.start)
                            tokens += len(answer.tokens)
                            yield answer
                        case Finished(request_id=known) if known == request_id:
                            over = True
                            _check_whole(tokens, answer.total_tokens)
                            yield answer
            finally:
                if not over:
                    link.send(Cancel(request_id=request_id))

    def submit_json_object(
        self,
        prompt: str | Sequence[int],
        params: SamplingParams,
        *,
        request_id: int | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> dict[str, Any]:
        """Submit, wait for the whole reply, and return it as one object for JSON.

        A failure is in the object (`finish_reason` `error`, `error` with `code` and `message`),
        with the text and tokens that came before it.
        """
        request_id = new_request_id() if request_id is None else request_id
        reply: dict[str, Any] = {
            "request_id": format(request_id, "016x"),
            "text": "",
            "token_ids": [],
            "prompt_token_ids": [],
            "finish_reason": "error",
            "error": None,
            "ttft_s": None,
            "tokens_per_s": None,
            "served_by": None,
            "failovers": [],
        }
        try:
            for event in self.submit(prompt, params, request_id=request_id):
                _record(reply, event)
                if on_event is not None:
                    on_event(event)
        except ClusterError as error:
            reply["error"] = {"code": error.code, "message": error.message}
        return reply

    def cancel(self, request_id: int) -> None:
        """Cancel a request that the node serves; nothing happens if it does not (any more)."""
        with self._connected() as link:
            link.send(Cancel(request_id=request_id))

    def status(self) -> dict[str, Any]:
        """The `status --json` object, as the first node that answers sees the cluster."""
        answer = self._ask(StatusRequest(request_id=new_request_id()), self._timeout)
        assert isinstance(answer, StatusReply)
        status: dict[str, Any] = json.loads(answer.body)
        return status

    def plan(self, without: str = "") -> dict[str, Any]:
        """The `plan --json` object: who holds what, or would if the node `without` were gone.

        Raises `ClusterError` where there is no plan, or no such node.
        """
        answer = self._ask(PlanRequest(request_id=new_request_id(), without=without), self._timeout)
        assert isinstance(answer, StatusReply)
        plan: dict[str, Any] = json.loads(answer.body)
        return plan

    def drain(self, name: str) -> None:
        """Let the node `name` hand over what it holds and leave; returns when it has left.

        An empty name is the asked node itself, which then forgets its cluster. Raises
        `ClusterError` when there is no such node, or the others cannot take over.
        """
        self._ask(Drain(request_id=new_request_id(), name=name), DRAIN_S)

    def _ask(self, question: StatusRequest | PlanRequest | Drain, within: float) -> ControlMessage:
        """The answer to a question; raises `ClusterError` where that is FAILED."""
        with self._connected() as link:
            link.send(question)
            while True:
                match answer := link.receive(within):
                    case StatusReply() | Done() if answer.request_id == question.request_id:
                        return answer
                    case Failed() if answer.request_id in (0, question.request_id):
                        raise ClusterError(answer.code, answer.message, retryable=answer.retryable)

    @contextmanager
    def _connected(self) -> Iterator[_Link]:
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        pair = SocketPair(context, limits=PairLimits(MAX_CONTROL_BYTES, _QUEUE, _QUEUE))
        try:
            yield self._first_that_answers(pair)
        finally:
            pair.shutdown(GOODBYE_MS)
            context.term()

    def _first_that_answers(self, pair: SocketPair) -> _Link:
        for address in self.addresses:
            pair.open(address)
            link = _Link(pair, address)
            if link.is_up(min(CONNECT_S, self._timeout)):
                return link
            pair.close(address)
        raise ClusterError(
            "not_ready",
            f"no node answers at {', '.join(self.addresses)}: is the address right, and does it "
            "run? Start one with: p2pinfer node start",
            retryable=True,
        )


class _Link:
    """A connection to one node, for one call."""

    def __init__(self, pair: SocketPair, address: str) -> None:
        self._pair = pair
        self._address = address
        self._answers: list[bytes] = []
        self._down = False
        self._poller = zmq.Poller()
        for each in pair.pollables():
            self._poller.register(each, zmq.POLLIN)

    def is_up(self, within: float) -> bool:
        """Wait until the node has answered the connect; False if it does not, or refuses."""
        deadline = time.monotonic() + within
        while time.monotonic() < deadline:
            self._poll(deadline)
            for event in self._pair.events():
                if event.address:
                    return event.kind is LinkKind.UP
        return False

    def send(self, message: ControlMessage) -> None:
        """Queue a message; a connection that is gone shows when an answer is awaited."""
        try:
            self._pair.send(self._address, encode(message))
        except LocalProtocolError as error:
            raise InvalidRequestError(str(error)) from error

    def receive(self, within: float) -> ControlMessage:
        """The next message from the node; raises `ClusterError` when it is gone or silent."""
        deadline = time.monotonic() + within
        while not self._answers:
            if time.monotonic() >= deadline:
                raise ClusterError(
                    "node_lost",
                    f"the node at {self._address} has been silent for {within:g} s: it hangs, or "
                    "another program listens there; ask another node with --to",
                    retryable=True,
                )
            self._poll(deadline)
            self._down |= any(event.kind is LinkKind.DOWN for event in self._pair.events())
            # What came before the connection broke still counts.
            self._answers = [frame for _, frame in self._pair.receive_answers()]
            if self._down and not self._answers:
                raise ClusterError(
                    "node_lost",
                    f"the connection to the node at {self._address} broke; "
                    "submit again, to another node with --to if it does not come back",
                    retryable=True,
                )
        message = decode(self._answers.pop(0), Plane.CONTROL)
        assert isinstance(message, ControlMessage)
        return message

    def _poll(self, deadline: float) -> None:
        self._poller.poll(max(1, int((deadline - time.monotonic()) * 1000)))


def new_request_id() -> int:
    """A request id that no other client will choose: 63 random bits."""
    return secrets.randbits(63)


def _check_whole(have: int, said: int) -> None:
    """A reply with a hole must not look like a reply."""
    if have != said:
        raise ClusterError(
            "internal", f"tokens {have} to {said} of the reply were lost", retryable=True
        )


def _submit_message(
    request_id: int, prompt: str | Sequence[int], params: SamplingParams, received: Sequence[int]
) -> Submit:
    params.check()
    if isinstance(prompt, str):
        _check_unicode("the prompt", prompt)
        if len(prompt) > MAX_TEXT_CHARS:
            raise InvalidRequestError(
                f"the prompt is too long: at most {MAX_TEXT_CHARS} characters can be sent",
                code="prompt_too_long",
            )
    for each in params.stop:
        _check_unicode("a stop string", each)
    text, ids = (prompt, ()) if isinstance(prompt, str) else ("", tuple(prompt))
    return Submit(
        request_id=request_id,
        text=text,
        prompt_ids=ids,
        params=params,
        received=tuple(received),
        # The clock of whoever submits last is the latest, as far as people's clocks go.
        attempt=time.time_ns() // 1_000_000,
    )


def _check_unicode(what: str, text: str) -> None:
    """Text from a terminal or a pipe may hold bytes that were no UTF-8, as lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"{what} is not UTF-8 text (character {error.start + 1}); send plain text"
        ) from error


def _record(reply: dict[str, Any], event: Event) -> None:
    """Enter an event into the object of `submit_json_object`."""
    match event:
        case Accepted():
            reply["served_by"] = event.served_by
            reply["prompt_token_ids"] = list(event.prompt_ids)
        case Chunk():
            reply["text"] += event.text
            reply["token_ids"] += event.tokens
        case Finished():
            reply["text"] += event.text
            reply["finish_reason"] = event.reason
            reply["ttft_s"] = round(event.ttft_s, 6)
            reply["tokens_per_s"] = round(event.tokens_per_s, 3)
            reply["failovers"] = [
                {
                    "position": failover.position,
                    "lost": list(failover.lost),
                    "rung": failover.rung,
                    "detect_s": round(failover.detect_s, 6),
                    "stall_s": round(failover.stall_s, 6),
                    "exact": failover.exact,
                }
                for failover in event.failovers
            ]


__all__ = ["Client", "Event", "new_request_id"]
